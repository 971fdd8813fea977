"""A delta held whole in float32: ΔᵀΔ as an operator, of which no Gram matrix is formed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from streamrepair.decompose.convert import Doubles, Singles
from streamrepair.decompose.halves import Both, in_halves
from streamrepair.decompose.krylov_search import Operator, Pairs

_ROWS = 2048
"""Rows whose images are summed in float32."""


class HeldDelta(Operator):
    """ΔᵀΔ by products with Δ.

    Args:
        delta: (m, n), m ≥ n, in either order. both: does two halves of the products with a large one.
    """

    def __init__(self, delta: Singles, both: Both) -> None:
        self._delta, self._both = delta, both

    @property
    def size(self) -> int:
        """n."""
        return int(self._delta.shape[1])

    def times(self, vectors: Doubles) -> Doubles:
        """(k, n) ΔᵀΔ·v for each row v of `vectors`, to float32's precision."""
        m, n = self._delta.shape
        rows = vectors.astype(np.float32)
        lifted: Singles = np.empty((m, len(rows)), np.float32)
        images = np.empty((len(rows), n))

        def lift(part: slice) -> None:
            np.matmul(self._delta[part], rows.T, out=lifted[part])

        def lower(part: slice) -> None:
            images[:, part] = lifted.T @ self._delta[:, part]

        in_halves(lift, m, n, self._both)
        in_halves(lower, n, n, self._both)
        return images

    def refined(self, pairs: Pairs) -> Pairs:
        """By Rayleigh–Ritz with lengths and angles of the float32 products Δ·v, in float64."""
        _, vectors, _ = pairs
        rows = vectors.astype(np.float32)
        inner, images = np.zeros((len(rows), len(rows))), np.zeros(rows.shape)
        for start in range(0, len(self._delta), _ROWS):
            delta = self._delta[start : start + _ROWS]
            lifted = delta @ rows.T
            images += lifted.T @ delta
            lengths = lifted.astype(np.float64)
            inner += lengths.T @ lengths
        values, mix = np.linalg.eigh(inner)
        vectors, images = mix.T @ vectors, mix.T @ images
        images -= values[:, None] * vectors
        return values[::-1], vectors[::-1], np.linalg.norm(images, axis=1)[::-1]


class Held(NamedTuple):
    """What one pass over both sides leaves in memory."""

    operator: HeldDelta
    images: Doubles
    """(p, n) Δᵀ(ΔX) for the probes X, in float64."""
    trace: float
    """‖Δ‖_F²."""
    weight: float
    """About ‖W_ft‖_F."""
