"""What every backend returns: the decision for one matrix, and the basis its delta is projected on.

Also the rules of deciding that backends share: when a computed spectrum is sharp enough to fix τ and the count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamrepair.decompose.certify import Certificate
from streamrepair.errors import NumericalError
from streamrepair.spectral.threshold import HardThreshold, Threshold

MEDIAN_RESOLUTION = 1e-4
"""Largest bound/λ_median at which the median, and so τ, counts as resolved; the bound is met with a wide margin."""


class UnresolvedError(NumericalError):
    """The precision of this backend cannot tell the kept rank; a sharper one may."""


class NonFiniteDeltaError(NumericalError):
    """Sums over the delta are not finite: an input holds NaN or Inf, or float32 sums overflowed."""


@dataclass(frozen=True, slots=True)
class Truncation:
    """The kept part of one delta: Δ* = (Δ·Vᵀ)·V with `vh` as V."""

    values: NDArray[np.float64]
    """(n,) all singular values, ascending."""
    threshold: Threshold
    """σ̂, τ and the kept rank."""
    vh: NDArray[np.float64]
    """(rank_kept, n) right singular vectors (of the tall orientation) as rows."""
    frob_delta_in: float
    """‖Δ‖_F."""
    backend: str
    """Backend and precision that decided, e.g. "gram-float32"."""
    certificate: Certificate
    """Bounds that were checked."""
    noise_free: bool = False
    """The median singular value is zero to working precision: Δ has exactly low rank and holds no noise to estimate."""
    undecidable: int = 0
    """Singular values so near τ that rounding decides their side."""
    climbed: tuple[str, ...] = ()
    """Why cheaper backends were left, in order."""

    @property
    def frob_delta_out(self) -> float:
        """‖Δ*‖_F."""
        kept = self.values[len(self.values) - self.threshold.rank_kept :]
        return float(np.sqrt(np.sum(np.square(kept))))


def decide(values: NDArray[np.float64], bound: float, rule: HardThreshold, m: int, n: int) -> tuple[Threshold, int]:
    """τ and the count from eigenvalues λ = s² that are each right to within `bound`.

    Returns:
        The threshold, and how many eigenvalues lie closer to τ² than the bound on both.

    Raises:
        UnresolvedError: the median is not resolved.
    """
    s = np.sqrt(np.maximum(values, 0.0))
    threshold = rule.estimate(s, m, n)
    median = threshold.s_median**2
    if not bound <= MEDIAN_RESOLUTION * median:
        raise UnresolvedError(f"bound {bound:.1e} against a median eigenvalue of {median:.1e}")
    cut = threshold.tau**2
    margin = bound * (1.0 + cut / median)
    return threshold, int(np.count_nonzero(np.abs(values - cut) <= margin))
