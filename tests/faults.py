"""A kernel that misbehaves on demand: stands in for `os` in the one module through which the engine touches files."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

WRITING = ("pwrite", "fsync", "replace", "unlink", "makedirs", "ftruncate", "posix_fallocate")
"""What changes the disk."""


class Kernel:
    """The `os` module, with every named call passed to `fault` first.

    Args:
        names: the calls to watch. fault: gets the call's number (from 1) and name; raises, kills or returns.
    """

    def __init__(self, names: tuple[str, ...], fault: Callable[[int, str], None]) -> None:
        self._names, self._fault = names, fault
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> object:
        real = getattr(os, name)
        if name not in self._names:
            return real

        def call(*args: object, **kwargs: object) -> object:
            self.calls.append(name)
            self._fault(len(self.calls), name)
            return real(*args, **kwargs)

        return call


def fails(number: int, error: int, *, ever_after: bool = False) -> Callable[[int, str], None]:
    """A fault that raises `error` at one call, or from it on."""

    def fault(count: int, name: str) -> None:
        if count == number or (ever_after and count > number):
            raise OSError(error, os.strerror(error))

    return fault


def kills(number: int) -> Callable[[int, str], None]:
    """A fault that ends the process as `kill -9` does, before the call is carried out."""

    def fault(count: int, name: str) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return fault


def none(count: int, name: str) -> None:
    """No fault: the calls are only counted."""
