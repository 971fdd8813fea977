"""A few rows of every merge, computed once more and held against what is about to be written.

Certificates are about what is kept; that the product of it with the delta, the sum and the rounding were carried out is
seen here, whatever carried them out. A row in 128 costs less than a hundredth of a merge on the CPU; beside one on a
GPU, where 1600 vectors of 8192 columns are kept, some 20 ms for 1024 rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamrepair.decompose.arithmetic import Vectors
from streamrepair.decompose.convert import Raw, Real, difference, merge_type, widen
from streamrepair.decompose.operator import Panel

STRIDE = 128
"""Rows of which one is computed again; another one of each, so that no place in a kernel's tile is left out."""
_ROUNDING = {"BF16": 2.0**-8 + 2.0**-18, "F16": 2.0**-11 + 2.0**-18, "F32": 2.0**-24 + 2.0**-47, "F64": 2.0**-47}
"""Half a unit in the last place or more, relative, and 64 times that of the precision that the sum is formed in: a BLAS
adds a product onto W_base in as many parts as it cuts the kept vectors into, and rounds each time."""
_LEAST = {"BF16": 2.0**-133, "F16": 2.0**-24, "F32": 2.0**-149, "F64": 2.0**-1058}
"""Half a unit in the last place of a subnormal number or more; of F64 what subnormal products may add up to."""
_LARGEST = {"BF16": 3.38e38, "F16": 65_504.0, "F32": 3.402e38, "F64": 1.797e308}
_LARGEST_SUM = {"BF16": 3.38e38, "F16": 3.38e38, "F32": 1.797e308, "F64": 1.797e308}
"""Likewise, of the precision that it is merged in."""
_PRODUCTS = {"BF16": 1e-5, "F16": 1e-5, "F32": 1e-12, "F64": 1e-12}
"""Rounding of Δ·Vᵀ·V in the precision that it is merged in, in units of the norm of Δ's row."""


class WrongMergeError(RuntimeError):
    """Values are not those of W_base + Δ*."""


class _Rows(NamedTuple):
    """Rows of a panel, (r, n), as stored: copies, upright where the panel is wide."""

    places: NDArray[np.intp]
    waiting: NDArray[np.bool_]
    """(r,) which of them were not held against a result yet."""
    base: Raw
    base_dtype: str
    ft: Raw
    ft_dtype: str


class SpotCheck:
    """Watches the panels that a merge takes, and holds its results against some of their rows.

    Args:
        vh: (k, n) kept vectors, of any device. out_dtype: what results are stored as.
    """

    def __init__(self, vh: Vectors, out_dtype: str) -> None:
        self._vh, self._out_dtype = vh, out_dtype
        self._basis: Real | None = None
        self._watched: list[_Rows] = []

    def watched(self, panels: Iterable[Panel]) -> Iterator[Panel]:
        """The panels, of whose rows some are remembered: a merge may be behind when their memory holds others."""
        for panel in panels:
            places = sampled(panel.start, panel.start + panel.rows)
            base, ft = (stored.T if panel.wide else stored for stored in (panel.base, panel.ft))
            here = places - panel.start
            waiting = np.ones(len(places), bool)
            self._watched.append(_Rows(places, waiting, base[here], panel.base_dtype, ft[here], panel.ft_dtype))
            yield panel

    def check(self, block: Panel, merged: Raw) -> None:
        """Hold a block's result, as stored, against the rows of it that are remembered.

        Raises:
            WrongMergeError: a value is off by more than its rounding.
        """
        upright = merged.T if block.wide else merged
        for rows in self._watched:
            here = (rows.places >= block.start) & (rows.places < block.start + block.rows)
            if here.any():
                places, base, ft = rows.places[here], rows.base[here], rows.ft[here]
                self._hold(rows._replace(places=places, base=base, ft=ft), upright[places - block.start])
                rows.waiting[here] = False
        self._watched = [rows for rows in self._watched if rows.waiting.any()]

    def finish(self) -> None:
        """Hold that there was a result for every row that is remembered.

        Raises:
            WrongMergeError: there was none for one: a part of the matrix is missing.
        """
        if self._watched:
            rows = self._watched[0]
            raise WrongMergeError(f"there is no result for row {rows.places[rows.waiting][0]}")

    def _hold(self, rows: _Rows, merged: Raw) -> None:
        if self._basis is None:  # float64 vectors of a GPU would take twice the time
            self._basis = np.asarray(self._vh, merge_type(self._out_dtype))
        basis, dtype = self._basis, self._out_dtype
        found, expected, delta = np.empty(merged.shape), np.empty(merged.shape), np.empty(merged.shape, basis.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            difference(rows.ft, rows.ft_dtype, rows.base, rows.base_dtype, delta)
            widen(rows.base, rows.base_dtype, expected)
            expected += (delta @ basis.T) @ basis
            widen(merged, dtype, found)
            # Not by squares: they could vanish where the delta does not.
            norms = np.hypot.reduce(delta.astype(np.float64, copy=False), axis=1, keepdims=True)
            sizes = np.abs(expected)
            right = np.abs(found - expected) <= _ROUNDING[dtype] * sizes + _LEAST[dtype] + _PRODUCTS[dtype] * norms
            # What overflows, on the way too, is seen, and said otherwise, where rounding errors are summed.
            held = (sizes < _LARGEST[dtype]) & (sizes + norms < _LARGEST_SUM[dtype])
        if wrong := np.argwhere(~right & held).tolist():
            row, column = wrong[0]
            raise WrongMergeError(
                f"the result has {found[row, column]:.6g} in row {rows.places[row]} where W_base + Δ* is "
                f"{expected[row, column]:.6g}"
            )


def sampled(start: int, stop: int) -> NDArray[np.intp]:
    """The rows from `start` to `stop` that are computed again: one of every `STRIDE`, and the last."""
    stretches = np.arange(start // STRIDE, -(-stop // STRIDE))
    places = stretches * STRIDE + stretches * 61 % STRIDE
    return np.unique(np.append(places[(places >= start) & (places < stop)], stop - 1))
