"""The second pass on a device: W_base + (Δ·Vᵀ)·V block by block, one block ahead of what the caller writes.

Where memory runs out, blocks are halved, and in the end the rest of the matrix is merged on the CPU: blocks that were
handed over stay as they are, since every row of the result is its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from streamrepair.decompose.arithmetic import Merger, Vectors, rescued
from streamrepair.decompose.convert import Raw, merge_type
from streamrepair.decompose.device.faults import no_memory
from streamrepair.decompose.device.rates import ieee_products
from streamrepair.decompose.device.spectrum import rows_on
from streamrepair.decompose.device.staging import TORCH_TYPE, Crossing, Download, Upload
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.operator import Panel
from streamrepair.errors import NumericalError, brief

_LEAST_ROWS = 64
"""Blocks are not halved below this: the CPU is as quick."""


class DeviceMerger(Merger):
    """The merge of one matrix.

    Args:
        vh: (k, n) kept vectors; those on the device are used where they are.
        upload: the way of blocks to the device. host: the CPU for when the device fails; a fresh one by default.
    """

    def __init__(
        self,
        vh: Vectors,
        out_dtype: str,
        *,
        device: torch.device,
        upload: Upload,
        host: HostArithmetic | None,
    ) -> None:
        self._vh, self._out_dtype, self._device, self._upload = vh, out_dtype, device, upload
        self._target = TORCH_TYPE[out_dtype]
        self._dtype = torch.float32 if merge_type(out_dtype) is np.float32 else torch.float64
        self._basis: Tensor | None = None
        self._lost: Tensor | None = None
        self._download: Download | None = None
        self._rows: int | None = None
        self._fallback = host
        self._host: Merger | None = None
        self._climbed: list[str] = []

    @property
    def climbed(self) -> tuple[str, ...]:
        """Why work was moved to the CPU, if it was."""
        return tuple(self._climbed)

    def lost(self) -> float:
        """Squared rounding error so far; waits for the device.

        Raises:
            NumericalError: the device failed.
        """
        here = self._host.lost() if self._host else 0.0
        try:
            return here + (float(self._lost) if self._lost is not None else 0.0)
        except RuntimeError as error:
            raise NumericalError(brief(error)) from error

    def merged(self, panels: Iterable[Panel]) -> Iterator[tuple[Panel, Raw]]:
        """Each block with its result; the next one is computed meanwhile, across panels too.

        Raises:
            NumericalError: the device failed, and results or vectors on it are lost.
        """
        sent: tuple[Panel, Crossing] | None = None
        for panel in panels:
            waiting = deque(panel.blocks())
            while waiting and self._host is None:
                block = self._bounded(waiting)
                crossing = self._try(block)
                if crossing is None:  # smaller, or on the CPU
                    waiting.appendleft(block)
                    continue
                if sent is not None:
                    yield sent[0], _arrived(sent[1])
                sent = block, crossing
            if self._host is not None:
                if sent is not None:
                    yield sent[0], _arrived(sent[1])
                    sent = None
                yield from self._host.merged(waiting)
        if sent is not None:
            yield sent[0], _arrived(sent[1])

    def _bounded(self, waiting: deque[Panel]) -> Panel:
        """The next block, cut to as many rows as were found to fit."""
        block = waiting.popleft()
        if self._rows is None or block.rows <= self._rows:
            return block
        waiting.appendleft(block.part(self._rows, block.rows))
        return block.part(0, self._rows)

    def _try(self, block: Panel) -> Crossing | None:
        """Queue a block's merge; None if it failed, and the next attempt is to be another one."""
        try:
            with ieee_products():
                return self._queued(block)
        except RuntimeError as error:
            if no_memory(error) and block.rows > _LEAST_ROWS:
                self._rows = max(_LEAST_ROWS, block.rows // 2)
                return None
            failure = brief(error)
        self._to_host(failure)
        return None

    def _to_host(self, failure: str) -> None:
        """Go on with the CPU."""
        self._climbed.append(f"merge: {failure}")
        self._basis = None
        self._host = (self._fallback or HostArithmetic()).merger(rescued(self._vh), self._out_dtype)

    def _queued(self, block: Panel) -> Crossing:
        if self._download is None:  # not before: a card that broke has no stream to give, which is met here as all else
            self._download = Download(self._device)
        if self._basis is None:
            self._basis = rows_on(self._vh, self._device).to(self._dtype)
        shape = block.base.shape
        delta = self._upload.delta(block, torch.empty(shape, dtype=self._dtype, device=self._device))
        merged = self._upload.base(block, torch.empty(shape, dtype=self._dtype, device=self._device))
        if block.wide:
            merged.addmm_(self._basis.T, self._basis @ delta)
        else:
            merged.addmm_(delta @ self._basis.T, self._basis)
        del delta
        rounded = merged.to(self._target)
        lost = self._loss(merged, rounded)
        total = lost if self._lost is None else self._lost + lost
        crossing = self._download.send(rounded, self._out_dtype)
        self._lost = total  # only now: a block that fails on the way is merged again
        return crossing

    def _loss(self, exact: Tensor, rounded: Tensor) -> Tensor:
        """Squared error of rounding, as a float64 tensor that nobody waits for; infinite where a value overflowed."""
        if rounded.dtype == exact.dtype:
            overflowed = torch.full((), np.inf, dtype=torch.float64, device=self._device)
            return torch.where(torch.isfinite(exact).all(), torch.zeros_like(overflowed), overflowed)
        norm: Tensor = torch.linalg.vector_norm(exact.sub_(rounded), dtype=torch.float64)
        return norm.square()


def _arrived(crossing: Crossing) -> Raw:
    try:
        return crossing.arrived()
    except RuntimeError as error:
        raise NumericalError(brief(error)) from error
