"""What every backend returns: the decision for one matrix, and the basis its delta is projected on.

Also the rules of deciding that backends share: when a computed spectrum is sharp enough to fix τ and the count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamrepair.decompose import certify
from streamrepair.decompose.arithmetic import Vectors
from streamrepair.decompose.convert import Doubles
from streamrepair.errors import NumericalError
from streamrepair.spectral.threshold import HardThreshold, Threshold

TAU_RESOLUTION = 1e-4
"""Widest interval for τ, in units of τ, that counts as resolved; the bound behind it is met with a wide margin."""

LEAST_FLOAT32_VALUE = 1e-28
"""Squares below this could have met float32's underflow."""
MOST_MIXING = 3e-5
"""‖Δ*′ − Δ*‖/‖Δ*‖ to expect at most; 1e-4 is the promise, and what is expected may be met by three times."""
_MOST_TURNED = 7.5e-7
"""Likewise of ‖Δ*′ − Δ*‖/‖W_ft‖, so that less than one value in a thousand is rounded to its other neighbour in
bfloat16: 400 to 1,300 times what this came to were, of normally distributed weights."""
_LEAST_MIXING = 1e-10
"""What is allowed whatever W_ft is: that is float64's own, and no route is sharper."""
_AT_ONCE = 64
"""Kept values whose mixing is summed in one operation."""
_ALIKE = 4
"""Neighbours on either side that share an error's size."""
PROMISED_GAP = 1e-5
"""Values further than this from τ, in units of τ, fall on the side where a float64 SVD has them."""


class UnresolvedError(NumericalError):
    """The precision of this backend cannot tell the kept rank; a sharper one may."""


class BluntError(UnresolvedError):
    """The error of the eigenvalues is too large beside the median."""


class OutgrownError(UnresolvedError):
    """A Krylov basis would have to be larger than pays: too many values are kept, or they are too near to others."""


class NonFiniteDeltaError(NumericalError):
    """Sums over the delta are not finite: an input holds NaN or Inf, or float32 sums overflowed."""


@dataclass(frozen=True, slots=True)
class Truncation:
    """The kept part of one delta: Δ* = (Δ·Vᵀ)·V with `vh` as V."""

    values: Doubles
    """Singular values, ascending: all n, or those above τ where a backend needs no others."""
    threshold: Threshold
    """σ̂, τ and the kept rank."""
    vh: Vectors
    """(rank_kept, n) right singular vectors (of the tall orientation) as rows, in the memory they were made in.

    float32 where the output is no wider.
    """
    frob_delta_in: float
    """‖Δ‖_F."""
    backend: str
    """Backend and precision that decided, e.g. "gram-float32"."""
    noise_free: bool = False
    """The median singular value is zero to working precision: Δ has exactly low rank and holds no noise to estimate."""
    undecidable: int = 0
    """Singular values so near τ that rounding decides their side."""
    interval: tuple[float, float] | None = None
    """Of τ, where the noise level was estimated and not computed."""
    within: int = 0
    """Singular values in that interval: the kept rank may be off by as many."""
    climbed: tuple[str, ...] = ()
    """Why cheaper backends were left, in order."""

    @property
    def frob_delta_out(self) -> float:
        """‖Δ*‖_F."""
        kept = self.values[len(self.values) - self.threshold.rank_kept :]
        largest = float(kept[-1]) if len(kept) else 0.0
        return largest * float(np.linalg.norm(kept / largest)) if largest > 0.0 else 0.0


def check_sums(trace: float, images: Doubles) -> None:
    """Refuse sums over a delta that there is nothing to find out from.

    Args:
        trace: ‖Δ‖_F². images: ΔᵀΔ on probes.

    Raises:
        NonFiniteDeltaError: they are not finite.
        UnresolvedError: all of them vanished.
    """
    if not (np.isfinite(trace) and np.isfinite(images).all()):
        raise NonFiniteDeltaError(f"the sum of squares of the delta is {trace}")
    if trace == 0.0:
        raise UnresolvedError("every square vanished")


def decide(values: Doubles, bound: float, rule: HardThreshold, m: int, n: int) -> tuple[Threshold, int]:
    """τ and the count from eigenvalues λ = s² that are each right to within `bound`.

    Returns:
        The threshold, and how many eigenvalues lie closer to τ² than the bound on both.

    Raises:
        BluntError: τ is not resolved, or values lie within a bound that is wider than is promised.
    """
    # Every estimator of σ rises with each value, so that shifting all of them encloses τ.
    low, threshold, high = (rule.estimate(roots(values + shift), m, n) for shift in (-bound, 0.0, bound))
    if not high.tau - low.tau <= TAU_RESOLUTION * threshold.tau:
        raise BluntError(f"bound {bound:.1e} against a median eigenvalue of {threshold.s_median**2:.1e}")
    cut = threshold.tau * threshold.tau  # infinite rather than an OverflowError
    margin = bound + max(high.tau**2 - cut, cut - low.tau**2)
    close = int(np.count_nonzero(~(np.abs(values - cut) > margin)))
    if close and margin > 2.0 * PROMISED_GAP * cut:
        raise BluntError(f"{close} values within {margin / cut:.1e} of the squared threshold")
    return threshold, close


def mixing(
    values: Doubles,
    rank: int,
    errors: float | Doubles,
    exact: slice = slice(0, 0),
) -> float:
    """‖Δ*′ − Δ*‖/‖Δ*‖ to expect from an error E in G that turns kept vectors into dropped ones.

    To first order E moves Δ·P by Σ E_ij·√(λᵢ + λⱼ)/(λᵢ − λⱼ) over kept i and dropped j (Davis & Kahan 1970). Spread
    evenly over j, E·vᵢ makes |E_ij| about ‖E·vᵢ‖/√n; spread evenly over i too, ‖E·vᵢ‖ is about ‖E‖₂/2.

    Args:
        values: (n,) eigenvalues, ascending. rank: how many of the largest are kept.
        errors: (rank,) norms ‖E·vᵢ‖, in the order of `values`, or what they all are about.
        exact: places whose vectors do not mix among each other, since the error was removed there.
    """
    n = len(values)
    kept, dropped = values[n - rank :], values[: n - rank]
    if len(kept) == 0 or len(dropped) == 0:
        return 0.0
    inside = np.zeros(n, bool)
    inside[exact] = True
    kept_inside, dropped_inside = inside[n - rank :], inside[: n - rank]
    squares, moved = np.broadcast_to(np.square(errors), rank), 0.0
    with np.errstate(divide="ignore"):
        for start in range(0, rank, _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            each = (kept[part, None] + np.abs(dropped)) / np.square(kept[part, None] - dropped)
            each[np.ix_(kept_inside[part], dropped_inside)] = 0.0
            moved += float(squares[part] @ each.sum(axis=1))
    return float(np.sqrt(moved / (n * kept.sum())))


def refuse_estimator(rule: HardThreshold) -> None:
    """Hold that τ rests on the median alone: no other of the values below it is known exactly.

    Raises:
        UnresolvedError: it rests on others too.
    """
    if rule.sigma != "median":
        raise UnresolvedError("this estimator needs all values")


def most_mixing(kept: Doubles, weight: float) -> float:
    """How far kept and dropped vectors may turn Δ*, relative.

    Args:
        kept: eigenvalues that are kept. weight: about ‖W_ft‖_F.
    """
    norm = float(kept.sum()) ** 0.5
    return max(_LEAST_MIXING, min(MOST_MIXING, _MOST_TURNED * weight / norm)) if norm > 0.0 else MOST_MIXING


def refuse_mixing(turned: float, kept: Doubles, weight: float) -> None:
    """Hold that kept and dropped vectors turned Δ* by no more than is allowed; NaN is more.

    Args:
        kept, weight: as of `most_mixing`.

    Raises:
        UnresolvedError: they may have.
    """
    if not turned <= most_mixing(kept, weight):
        raise UnresolvedError(f"kept and dropped vectors may mix by {turned:.1e}")


def errors_along(vectors: Vectors, seen: Doubles) -> Doubles:
    """(k,) ‖E·v‖ of unit vectors as rows, neighbours having about the same, from E·X given as (PROBES, n)."""
    if len(vectors) == 0:
        return np.zeros(0)
    squares = np.square(certify.times(vectors, seen)).mean(axis=1)
    # Eight probes see the square of one to a factor of two: no nearest neighbour of τ² is to rest on so few.
    even = np.convolve(np.pad(squares, _ALIKE, "edge"), np.full(2 * _ALIKE + 1, 1.0 / (2 * _ALIKE + 1)), "valid")
    errors: Doubles = np.sqrt(np.maximum(squares, even))
    return errors


def roots(values: Doubles) -> Doubles:
    """Singular values from eigenvalues; those that rounding made negative are zero."""
    return np.sqrt(np.maximum(values, 0.0))


def without_noise(n: int, m: int, rule: HardThreshold, *, norm: float, backend: str) -> Truncation:
    """The answer for a delta whose median singular value was shown to be zero: there is no noise to estimate.

    Args:
        n, m: its shorter and its longer side. norm: ‖Δ‖_F.
    """
    return Truncation(
        values=np.zeros(n),
        threshold=rule.estimate(np.zeros(n), m, n),
        vh=np.zeros((0, n)),
        frob_delta_in=norm,
        backend=backend,
        noise_free=True,
    )
