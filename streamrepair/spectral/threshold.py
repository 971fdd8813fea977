"""The hard threshold of Gavish & Donoho: from singular values to τ and the number of values kept.

ω(β) here is the coefficient for *known* noise, λ_*(β) in the paper; the paper's own ω(β), for unknown noise, is this
divided by √median(β) of the Marchenko–Pastur law. σ̂ is in the fused scale of `noise`.

Neighbours: `noise` estimates σ̂. Which backend computes the values, and how it proves the count, is not here.
Source: Gavish & Donoho 2014, "The Optimal Hard Threshold for Singular Values is 4/√3", arXiv:1305.5870.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from streamrepair.errors import NumericalError, UsageError
from streamrepair.spectral.marchenko_pastur import check_beta
from streamrepair.spectral.noise import lower_median, sigma_from_median, sigma_from_tail

DEFAULT_SCALE: Final = 1.0


@dataclass(frozen=True, slots=True)
class Threshold:
    """What the rule found for one matrix; lengths are in the units of its singular values."""

    sigma_hat: float
    """Noise level, fused scale: σ_noise·√max(m, n)."""
    tau: float
    """Singular values strictly above it are kept."""
    s_median: float
    """Lower median of the singular values (0 for an empty matrix)."""
    rank_kept: int
    """Number of singular values > tau."""
    nearest_gap: float
    """Smallest |s/τ − 1| over all values, how far the kept rank is from changing; inf if τ is 0 or no values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HardThreshold:
    """The rule s > scale·ω(β)·σ̂.

    Raises:
        UsageError: scale is negative or not finite, or sigma names no estimator.
    """

    scale: float = DEFAULT_SCALE
    """Factor on the optimal τ, dimensionless, ≥ 0."""
    sigma: Literal["median", "tail"] = "median"
    """Estimator of σ̂."""

    def __post_init__(self) -> None:
        _check_scale(self.scale)
        if self.sigma not in ("median", "tail"):
            raise UsageError(f"sigma is {self.sigma!r}, expected 'median' or 'tail'")

    def estimate(self, s: NDArray[np.float64], m: int, n: int) -> Threshold:
        """σ̂, τ and the kept rank from all min(m, n) singular values of an m × n matrix, in any order.

        Raises:
            UsageError: `s` does not hold exactly min(m, n) values in one dimension.
            NumericalError: a value is negative or not finite.
        """
        values = np.asarray(s, dtype=np.float64)
        _check_spectrum(values, m, n)
        if values.size == 0:
            return Threshold(sigma_hat=0.0, tau=0.0, s_median=0.0, rank_kept=0, nearest_gap=math.inf)
        s_median = lower_median(values)
        beta = aspect_ratio(m, n)
        sigma_hat = sigma_from_median(s_median, beta) if self.sigma == "median" else sigma_from_tail(values)
        return self._applied(values, s_median, sigma_hat, beta)

    def from_median(self, s_median: float, known: NDArray[np.float64], m: int, n: int) -> Threshold:
        """The same from the lower median alone; `known` holds every value above τ and the largest one below it.

        Raises:
            UsageError: the estimator is not the median.
        """
        if self.sigma != "median":
            raise UsageError(f"sigma is {self.sigma!r}: it needs all singular values, not the median alone")
        beta = aspect_ratio(m, n)
        return self._applied(known, s_median, sigma_from_median(s_median, beta), beta)

    def _applied(self, values: NDArray[np.float64], s_median: float, sigma_hat: float, beta: float) -> Threshold:
        cut = tau(sigma_hat, beta, scale=self.scale)
        return Threshold(
            sigma_hat=sigma_hat,
            tau=cut,
            s_median=s_median,
            # > and not >=: a matrix of rank below r/2 has median 0, hence τ = 0, and >= would keep its null directions.
            rank_kept=int(np.count_nonzero(values > cut)),
            # s − τ first: next to τ it is exact in floating point, s/τ − 1 is not.
            nearest_gap=float(np.abs(values - cut).min()) / cut if cut > 0.0 else math.inf,
        )


def aspect_ratio(m: int, n: int) -> float:
    """β = min(m, n) / max(m, n) in (0, 1]: the one place where the shape and its transpose become the same thing.

    Raises:
        UsageError: m or n is not positive.
    """
    if min(m, n) <= 0:
        raise UsageError(f"matrix shape is {m} × {n}, expected both sides positive")
    return min(m, n) / max(m, n)


def omega(beta: float) -> float:
    """ω(β) = √(2(β+1) + 8β / ((β+1) + √(β²+14β+1))), from √2 at β → 0 to 4/√3 at β = 1; dimensionless.

    Raises:
        UsageError: β is outside (0, 1].
    Source: Gavish & Donoho 2014, λ_*(β), the optimal coefficient for a known noise level.
    """
    check_beta(beta)
    return math.sqrt(2.0 * (beta + 1.0) + 8.0 * beta / ((beta + 1.0) + math.sqrt(beta * beta + 14.0 * beta + 1.0)))


def tau(sigma_hat: float, beta: float, *, scale: float = DEFAULT_SCALE) -> float:
    """τ = scale·ω(β)·σ̂ with σ̂ in the fused scale, in the units of the singular values.

    Raises:
        UsageError: β is outside (0, 1], or scale is negative or not finite.
    """
    _check_scale(scale)
    return scale * omega(beta) * sigma_hat


def _check_scale(scale: float) -> None:
    if not 0.0 <= scale < math.inf:
        raise UsageError(f"scale is {scale!r}, expected a finite number >= 0")


def _check_spectrum(values: NDArray[np.float64], m: int, n: int) -> None:
    # A truncated spectrum has another median: silently accepting one would move τ.
    if values.shape != (min(m, n),):
        raise UsageError(
            f"singular values have shape {values.shape}, expected ({min(m, n)},) for a {m} × {n} matrix: pass them all"
        )
    if values.size and not (values.min() >= 0.0 and values.max() < math.inf):
        raise NumericalError(
            f"singular values of a {m} × {n} matrix lie in [{values.min()}, {values.max()}], expected finite and >= 0: "
            "the factorisation failed, use another backend"
        )
