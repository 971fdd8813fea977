"""The delta of one matrix as a stream of row panels: all that the decompositions know of a checkpoint.

A matrix enters *tall*: `rows` is its longer side, `cols` (n) its shorter one; a wide weight is handed over transposed,
as a view, so that nothing past this module asks which way round it was stored. Panels come in order, on a fixed grid of
blocks, and floating-point sums are formed block by block, so that the numbers do not depend on how many blocks a
memory budget lets one panel hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from streamrepair.decompose.blocks import block_rows


@dataclass(frozen=True, slots=True)
class Panel:
    """Consecutive rows of both matrices, as stored."""

    start: int
    """First row (of the tall orientation)."""
    base: Tensor
    """(rows, n) of W_base in its stored dtype, on the CPU; a transposed view for a wide weight."""
    ft: Tensor
    """(rows, n) of W_ft, likewise."""


class PanelSource(Protocol):
    """A pair of matrices of equal shape that can be streamed any number of times."""

    @property
    def rows(self) -> int:
        """The longer side."""
        ...

    @property
    def cols(self) -> int:
        """The shorter side, n."""
        ...

    def panels(self) -> Iterator[Panel]:
        """All rows in order; every panel but the last holds a multiple of `block_rows(cols)` rows."""
        ...


def delta(panel: Panel, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """W_ft − W_base of a panel, (rows, n) on `device`, subtracted in `dtype`.

    float32 holds every bfloat16, float16 and float32 value, so only the subtraction rounds; for neighbouring values it
    does not (Sterbenz).
    """
    difference = panel.ft.to(device=device, dtype=dtype, non_blocking=True)
    if difference.data_ptr() == panel.ft.data_ptr():  # already of that dtype and device: leave the input alone
        return difference - panel.base.to(device=device, dtype=dtype)
    return difference.sub_(panel.base.to(device=device, dtype=dtype, non_blocking=True))


def delta_blocks(source: PanelSource, device: torch.device, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """The delta on the fixed grid of blocks, each (≤ block_rows(n), n)."""
    height = block_rows(source.cols)
    for panel in source.panels():
        for start in range(0, len(panel.ft), height):
            part = Panel(panel.start + start, panel.base[start : start + height], panel.ft[start : start + height])
            yield delta(part, device, dtype)
