"""The delta of one matrix as a stream of row panels: all that the decompositions know of a checkpoint.

A matrix enters *tall*: `rows` is its longer side, `cols` (n) its shorter one. A wide weight is handed over as stored,
marked `wide`, and read transposed, so that nothing past this module asks which way round it lies. Panels come in order,
on a fixed grid of blocks, and floating-point sums are formed block by block, so that the numbers do not depend on how
many blocks a memory budget lets one panel hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from streamrepair.decompose.convert import Raw, widen

_BLOCK_ELEMENTS = 1 << 23
_LEAST_ROWS, _MOST_ROWS = 256, 2048
_SAMPLED = 16


@dataclass(frozen=True, slots=True)
class Panel:
    """Consecutive rows (of the tall orientation) of both matrices, as stored."""

    start: int
    """First row."""
    base: Raw
    """W_base: (rows, n), or (n, rows) if `wide`."""
    ft: Raw
    """W_ft, likewise."""
    base_dtype: str
    ft_dtype: str
    wide: bool
    """Whether the arrays are transposed: their second axis is the long one."""

    @property
    def rows(self) -> int:
        """Rows of the tall orientation."""
        return int(self.ft.shape[1] if self.wide else self.ft.shape[0])

    def part(self, start: int, stop: int) -> Panel:
        """Some of the panel's rows; a view."""
        rows = (slice(None), slice(start, stop)) if self.wide else (slice(start, stop),)
        return Panel(self.start + start, self.base[rows], self.ft[rows], self.base_dtype, self.ft_dtype, self.wide)

    def blocks(self) -> Iterator[Panel]:
        """The panel on the grid of blocks."""
        height = block_rows(self.ft.shape[0] if self.wide else self.ft.shape[1])
        for start in range(0, self.rows, height):
            yield self.part(start, min(self.rows, start + height))


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


def sampled_squares(block: Panel) -> float:
    """About ‖W_ft‖_F² of a block, by every 16th of its rows as they are stored."""
    rows = block.ft[::_SAMPLED]
    values = np.empty(rows.shape)
    widen(rows, block.ft_dtype, values)
    return float(np.square(values, out=values).sum()) * (block.ft.size / rows.size)


def block_rows(cols: int) -> int:
    """Rows of a block of a tall matrix with `cols` columns: set by the shape, so that budgets change no numbers."""
    rows = 1 << max(0, (_BLOCK_ELEMENTS // max(1, cols)).bit_length() - 1)
    return min(_MOST_ROWS, max(_LEAST_ROWS, rows))


def blocks(source: PanelSource) -> Iterator[Panel]:
    """All of a source on the grid of blocks."""
    for panel in source.panels():
        yield from panel.blocks()
