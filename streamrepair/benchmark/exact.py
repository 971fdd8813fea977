"""The answer in float64, by LAPACK on the whole delta, without the code that is measured; slow, and never timed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from streamrepair.benchmark.records import RANK_TOLERANCE, Check
from streamrepair.benchmark.sources import MemorySource
from streamrepair.decompose.arithmetic import Arithmetic, Vectors
from streamrepair.decompose.convert import Doubles, widen
from streamrepair.errors import NumericalError
from streamrepair.spectral.threshold import HardThreshold


@dataclass(frozen=True, slots=True)
class Exact:
    """The truncation of one delta in float64."""

    rank: int
    close: int
    """Singular values within RANK_TOLERANCE of τ: so far may another rank be off."""
    star: Doubles
    """(m, n) Δ*, upright."""
    scale: float
    """‖Δ*‖_F, or ‖Δ‖_F where nothing is kept."""

    def check(self, rank: int, star: NDArray[np.floating]) -> Check:
        """Another rank and Δ* (m, n) held against this.

        Raises:
            NumericalError: Δ* is not finite.
        """
        error = float(np.linalg.norm(star - self.star)) / self.scale
        if not np.isfinite(error):
            raise NumericalError("the delta of the result is not finite")
        agrees = abs(rank - self.rank) <= self.close
        return Check(rank_exact=self.rank, rank_agrees=agrees, delta_error=error)


def exact(source: MemorySource, rule: HardThreshold) -> Exact:
    """Decide and truncate a delta by a full float64 SVD of it."""
    u, s, vh = scipy.linalg.svd(source.delta(), full_matrices=False, overwrite_a=True, check_finite=False)
    threshold = rule.estimate(s, source.rows, source.cols)
    k = threshold.rank_kept
    close = int(np.count_nonzero(np.abs(s - threshold.tau) <= RANK_TOLERANCE * threshold.tau))
    scale = float(np.linalg.norm(s[:k]) or np.linalg.norm(s)) or 1.0
    return Exact(rank=k, close=close, star=(u[:, :k] * s[:k]) @ vh[:k], scale=scale)


def merged_delta(source: MemorySource, vh: Vectors, arithmetic: Arithmetic) -> Doubles:
    """(m, n) Δ* as a backend's merge makes it, unrounded: the float64 sum W_base + Δ*, less W_base."""
    star = np.empty((source.rows, source.cols))
    merge = arithmetic.merger(vh, "F64")
    for block, merged in merge.merged(source.panels()):
        base = np.empty(block.base.shape)
        widen(block.base, block.base_dtype, base)
        difference = merged - base
        star[block.start : block.start + block.rows] = difference.T if block.wide else difference
    return star
