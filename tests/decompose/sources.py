"""Pairs of matrices in memory, streamed as the engine streams files, and spectra to build them from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from streamrepair.decompose.convert import STORED_TYPE, Raw, narrow, widen
from streamrepair.decompose.operator import Panel, block_rows

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class ArraySource:
    """W_base and W_ft as stored, either way round; `panel_blocks` grid blocks make a panel."""

    base: Raw
    ft: Raw
    dtype: str
    panel_blocks: int = 1

    @property
    def wide(self) -> bool:
        return bool(self.ft.shape[1] > self.ft.shape[0])

    @property
    def rows(self) -> int:
        return int(max(self.ft.shape))

    @property
    def cols(self) -> int:
        return int(min(self.ft.shape))

    def panels(self) -> Iterator[Panel]:
        whole = Panel(0, self.base, self.ft, self.dtype, self.dtype, self.wide)
        height = self.panel_blocks * block_rows(self.cols)
        for start in range(0, self.rows, height):
            yield whole.part(start, min(self.rows, start + height))

    def delta(self) -> Doubles:
        """Δ in float64, tall: what a backend is to decompose, exactly."""
        ft, base = np.empty(self.ft.shape), np.empty(self.ft.shape)
        widen(self.ft, self.dtype, ft)
        widen(self.base, self.dtype, base)
        return (ft - base).T if self.wide else ft - base

    def transposed(self) -> ArraySource:
        """The same pair stored the other way round."""
        base, ft = np.ascontiguousarray(self.base.T), np.ascontiguousarray(self.ft.T)
        return ArraySource(base, ft, self.dtype, self.panel_blocks)


def stored(values: ArrayLike, dtype: str) -> Raw:
    """`values` rounded to a stored dtype."""
    work: NDArray[np.float32 | np.float64] = np.array(values, np.float64 if dtype == "F64" else np.float32, order="C")
    out: Raw = np.empty(work.shape, STORED_TYPE[dtype])
    narrow(work, dtype, out)
    return out


def from_delta(delta: ArrayLike, dtype: str = "F64", panel_blocks: int = 1) -> ArraySource:
    """A pair whose W_base is zero, so that Δ is `delta` as stored: the sharpest control of its spectrum."""
    ft = stored(delta, dtype)
    return ArraySource(np.zeros_like(ft), ft, dtype, panel_blocks)


def fine_tuned(delta: Doubles, dtype: str, panel_blocks: int = 1, seed: int = 5) -> ArraySource:
    """A pair with W_base ten times the root mean square of `delta`, both rounded to `dtype`."""
    size = 10.0 * float(np.sqrt(np.mean(np.square(delta))))
    base = size * np.random.default_rng(seed).standard_normal(delta.shape)
    return ArraySource(stored(base, dtype), stored(base + delta, dtype), dtype, panel_blocks)


def merged_adapter(m: int, n: int, rank: int, seed: int = 0) -> ArraySource:
    """A float32 weight and the same with a low-rank update added: what is not of low rank is rounding."""
    rng = np.random.default_rng(seed)
    base = (0.02 * rng.standard_normal((m, n))).astype(np.float32)
    update = 0.02 * rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))
    return ArraySource(base, stored(base + update, "F32"), "F32")


def with_spectrum(s: ArrayLike, m: int, seed: int = 0) -> Doubles:
    """(m, n) U·diag(s)·Vᵀ with random orthonormal U, V; m ≥ n = len(s)."""
    rng = np.random.default_rng(seed)
    values = np.asarray(s, np.float64)
    n = len(values)
    u = np.linalg.qr(rng.standard_normal((m, n)))[0]
    v = np.linalg.qr(rng.standard_normal((n, n)))[0]
    product: Doubles = (u * values) @ v.T
    return product


def low_rank_plus_noise(m: int, n: int, rank: int, seed: int = 0) -> Doubles:
    """Gaussian noise and `rank` directions 6 to 16 times as large: a spectrum with a gap at τ."""
    rng = np.random.default_rng(seed)
    signal = rng.standard_normal((m, rank)) * np.geomspace(8.0, 3.0, rank)
    directions = np.linalg.qr(rng.standard_normal((n, rank)))[0].T * 2.0
    noisy: Doubles = rng.standard_normal((m, n)) + signal @ directions
    return noisy
