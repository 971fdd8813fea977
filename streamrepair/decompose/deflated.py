"""A Gram matrix for deltas whose largest values drown the median: those values are taken out of Δ, not out of G.

Of a merged LoRA in float32 the median is the rounding of the merge, a millionth of s₁ or less, and its square is lost
in the rounding of G. But G has the directions Q of the largest values. Of Δ′ = Δ − (ΔQ)Qᵀ, formed in float64, a Gram
matrix knows the rest as well as it ever does. What ties the two parts is C = LᵀΔ′, L = ΔQ, and by Haynsworth's inertia
formula no eigenvalue below those of LᵀL is off by more than ‖Cᵀ(LᵀL − λ)⁻¹C‖, which widens the bound.

`gram.conclude` decides and checks as ever, on G′ = Δ′ᵀΔ′ + Σ cᵢ·qᵢqᵢᵀ, where the cᵢ, above all that is left, stand in
for what was taken out.

Source: Haynsworth 1968; Golub & Van Loan, Matrix Computations, section 8.1 (deflation, perturbation of subspaces).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from streamrepair.decompose import full
from streamrepair.decompose.arithmetic import Gram, Spectrum
from streamrepair.decompose.convert import Doubles
from streamrepair.decompose.operator import PanelSource
from streamrepair.decompose.truncation import Truncation, UnresolvedError, refuse_mixing, without_noise
from streamrepair.spectral.threshold import HardThreshold

MOST = 128
"""Values that are taken out at most."""
SHARE = 4
"""Of n columns, one in so many at most."""
_DROWNING = 1e5
"""Values above so many times G's error may be taken out: their directions are known well."""
_GAP = 4.0
"""Times that the last of them exceeds the next value, if they end at the widest gap."""
_SHARPER = 1e3
"""Times that the largest value has to fall by that: the error of a Gram matrix falls as much."""
_FALLEN = 1e7
"""Times that it has to fall where there is no gap."""
_APART = 10.0
"""How far above τ² all that was taken out has to lie."""
_LEAST_SQUARE = 1e-280
"""Sums of squares below this could have met underflow."""


@dataclass(frozen=True, slots=True)
class Deflated:
    """What one pass over Δ, less its parts along some directions, gives."""

    gram: Gram
    """Of Δ′, with stand-ins for what was taken out; its trace without them."""
    largest: Doubles
    """Singular values of ΔQ, descending."""
    turned: float
    """About how far Δ* is off, ‖·‖_F, since Q is not exactly invariant: ‖R⁻ᵀC‖_F."""


def most(cols: int) -> int:
    """How many values are taken out of a delta with so many columns at most."""
    return min(MOST, cols // SHARE)


def parts(factor: Doubles, coupled: Doubles) -> tuple[Doubles, float]:
    """Singular values of L = ΔQ, descending, and ‖R⁻ᵀC‖_F.

    Args:
        factor: (r, r) R of L. coupled: (r, n) C, nothing of it along Q.

    Raises:
        LinAlgError: L has not full rank.
    """
    largest: Doubles = np.linalg.svd(factor, compute_uv=False).astype(np.float64)
    return largest, float(np.linalg.norm(np.linalg.solve(factor.T, coupled)))


def moved(turned: float) -> float:
    """Bound of ‖Cᵀ(LᵀL − λ)⁻¹C‖₂ for all λ up to τ², from ‖R⁻ᵀC‖_F: what was taken out lies far above that."""
    return turned * turned / (1.0 - 1.0 / _APART)


def directions(spectrum: Spectrum, bound: float) -> Doubles:
    """(r, n) orthonormal rows Q: eigenvectors of values beside which others cannot be seen.

    As far as the widest gap, or else until the rest is much smaller; none where few vectors do not come to that.

    Args:
        spectrum: of G, on the CPU. bound: G's error.
    """
    descending = spectrum.values[::-1]
    known = min(most(len(descending)), int(np.count_nonzero(descending > _DROWNING * bound)))
    gaps = descending[:known] / np.maximum(descending[1 : known + 1], bound)
    count = int(np.argmax(gaps)) + 1 if known else 0
    if not (count and gaps[count - 1] >= _GAP and descending[0] >= _SHARPER * descending[count]):
        fallen = np.flatnonzero(descending[0] >= _FALLEN * descending[1 : known + 1])
        count = int(fallen[0]) + 1 if len(fallen) else 0
    if not count:
        return np.zeros((0, len(descending)))
    basis: Doubles = np.linalg.qr(np.asarray(spectrum.top(count), np.float64).T)[0].T
    return np.ascontiguousarray(basis)


def conclude(
    source: PanelSource, rule: HardThreshold, found: Deflated, of_rest: Callable[[], Truncation]
) -> Truncation:
    """The decision for a delta of which the largest values were taken out.

    Args:
        of_rest: decides by its Gram matrix.

    Raises:
        UnresolvedError: what is left is too near to what was taken out, or to rounding.
        NumericalError: a factorisation did not pass the checks.
    """
    count, m, n = len(found.largest), source.rows, source.cols
    least, zero = float(found.largest[-1]) ** 2, full.zero_bound(m, float(found.largest[0]))
    if not zero * zero >= _LEAST_SQUARE:
        raise UnresolvedError("squares of what is left may vanish")
    norm = float(np.hypot(np.linalg.norm(found.largest), found.gram.trace**0.5))
    if found.gram.trace <= zero * zero:  # as `row_space` proves it
        return without_noise(n, m, rule, norm=norm, backend="row-space")
    decided = of_rest()
    cut = decided.threshold.tau**2
    if not least >= _APART * cut:
        raise UnresolvedError(f"a value that was taken out, {least:.1e}, is too near the squared threshold, {cut:.1e}")
    level = decided.threshold.sigma_hat if rule.sigma == "tail" else decided.threshold.s_median
    if not level > zero:
        raise UnresolvedError(f"a noise level of {level:.1e} may be rounding")
    values = np.concatenate([decided.values[: n - count], found.largest[::-1]])
    threshold = rule.estimate(values, m, n)
    if threshold.rank_kept != (rank := decided.threshold.rank_kept):
        raise UnresolvedError(f"{rank} values and stand-ins exceed the threshold, of all values {threshold.rank_kept}")
    refuse_mixing(found.turned / norm, np.square(values[n - rank :]), found.gram.weight)
    return replace(decided, values=values, threshold=threshold, frob_delta_in=norm, backend="deflated-float64")
