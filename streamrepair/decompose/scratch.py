"""Reused working arrays of one worker.

A fresh array of megabytes costs the kernel a page fault and a cleared page per 4 kB, its release as much again: with
new arrays per block a third of a run's processor time went there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

LARGE_ARRAY_BYTES = 16_000_000
"""Arrays above this are let go as soon as a step is done with them, smaller ones are kept for the next matrix."""
RETAINED_BYTES = 96_000_000
"""What a worker may keep between tasks; larger tasks compute long enough to pay for fresh memory."""


class Scratch:
    """Named arrays that keep their memory; not to be shared between threads."""

    def __init__(self) -> None:
        self._held: dict[str, NDArray[np.uint8]] = {}
        self._purpose: object = None

    def array(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An uninitialised C-contiguous array; it overwrites whatever bore this name before."""
        return self._named(name, shape, np.dtype(dtype), np.empty)[0]

    def zeros(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Likewise, filled with zeros."""
        array, fresh = self._named(name, shape, np.dtype(dtype), np.zeros)  # fresh pages are zeros already
        if not fresh:
            array.fill(0)
        return array

    def _named(
        self,
        name: str,
        shape: tuple[int, ...],
        kind: np.dtype[Any],
        made: Callable[[int, DTypeLike], NDArray[np.uint8]],
    ) -> tuple[NDArray[Any], bool]:
        """An array of this name, and whether it was made anew."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        fresh = name not in self._held or len(self._held[name]) < nbytes
        if fresh:
            self._held.pop(name, None)  # first: the old and the new would otherwise be held at once
            self._held[name] = made(nbytes, np.uint8)
        return self._held[name][:nbytes].view(kind).reshape(shape), fresh

    def begin(self, purpose: object) -> None:
        """A new matrix: what is held stays only if the last one was alike, so that no more is held than it needs."""
        if purpose != self._purpose:
            self._held.clear()
            self._purpose = purpose

    def release(self, name: str) -> None:
        """Let an array go if it is large; whoever still refers to it keeps it alive."""
        if name in self._held and len(self._held[name]) > LARGE_ARRAY_BYTES:
            del self._held[name]

    def drop(self, *names: str) -> None:
        """Let arrays go whatever their size."""
        for name in names:
            self._held.pop(name, None)

    def settle(self) -> None:
        """Between tasks: let everything go if there is a large array, or more than a worker may keep."""
        sizes = [len(held) for held in self._held.values()]
        if max(sizes, default=0) > LARGE_ARRAY_BYTES or sum(sizes) > RETAINED_BYTES:
            self._held.clear()

    def clear(self) -> None:
        """Let everything go."""
        self._held.clear()
