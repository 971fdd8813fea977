"""Exact eigenvalues of ΔᵀΔ in a few windows, from a tridiagonal form T that has all of them to within e only.

X, (w, n), are orthonormal approximations of T's vectors at the windows' places, off by an angle φ. By Rayleigh–Ritz in
their span, in float64, ΔᵀΔ is in the basis of X and its complement

    [ Θ  Rᵀ ]     Θ the Ritz values, R the residuals ΔᵀΔ·y − θ·y of the Ritz vectors,
    [ R  H  ]     H unknown.

1. *As many eigenvalues of H lie below v as values of T outside the windows do, and none of H's comes near v, if none of
   T's comes within e + tan²φ·λ_max of it.* Let H′ be to QTQᵀ what H is to ΔᵀΔ, and e ≥ ‖H − H′‖. With C and S the parts
   that the complement of X has in the span of T's other vectors and in that of the windows', H′ − v is
   Cᵀ(T_out − v)C + Sᵀ(T_in − v)S. The first has the inertia of T_out − v (Sylvester), the second a norm of sin²φ·λ_max.
2. *As many eigenvalues of ΔᵀΔ lie below v as θ and values of T outside do, and those near v are θ to within ‖R‖²/gap*,
   gap what 1 leaves between v and H's eigenvalues. For the inertia of ΔᵀΔ − v is that of H − v and that of its Schur
   complement Θ − v − Rᵀ(H − v)⁻¹R together (Haynsworth).

Source: Parlett, The Symmetric Eigenvalue Problem, sections 10.1, 11.5 and 11.7; Haynsworth 1968; Mathias 1998
(quadratic residual bounds); Davis & Kahan 1970.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from streamrepair.decompose.arithmetic import Products
from streamrepair.decompose.convert import Doubles, Real
from streamrepair.decompose.truncation import UnresolvedError
from streamrepair.errors import NumericalError

SKEW = 1e-5
"""Relative change of T's eigenvalues by reflectors that are orthogonal to float32 only (Ostrowski)."""
_ROUNDING = 1e-12
"""Of inner products in float64, in units of the largest value; up to 5e-15 was met."""
_PARALLEL = 0.1
"""‖XXᵀ − I‖_F up to which approximate vectors span as many dimensions as they are."""


class Slack(NamedTuple):
    """How far products may be from those with ΔᵀΔ: spectral norms of the difference."""

    values: float
    """Of the inner products, which give the Ritz values."""
    residuals: float
    """Of the images."""
    held: bool = False
    """Whether the inner products were made apart from the images, and are taken to be off by what they differ from
    those by."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Ritz pairs of ΔᵀΔ in the windows, and what T says of the rest."""

    values: Doubles
    """(w,) Ritz values, ascending."""
    vectors: Doubles
    """(w, n) as rows."""
    residuals: Doubles
    """(w, w) inner products of the residuals ΔᵀΔ·y − θ·y."""
    slack: Slack
    apart: float
    """How far Ritz values may be off, relative, because their inner products are."""
    outside: Doubles
    """Values of T at the other places, ascending."""
    blunt: float
    """How far H's eigenvalues may be from `outside`: e + tan²φ·λ_max."""

    def place(self, place: int) -> tuple[float, float]:
        """The eigenvalue with `place` below it, and how far it may be off.

        Raises:
            UnresolvedError: it may not be among the Ritz values.
        """
        value = float(np.sort(np.concatenate([self.values, self.outside]))[place])
        self.clear(value)
        if value not in self.values:
            raise UnresolvedError("the median is not in the window that was made for it")
        return value, self.error(value)

    def clear(self, value: float, unsure: float = 0.0) -> None:
        """Hold that all that lies near `value`, which may itself be off by `unsure`, is in the windows.

        Raises:
            UnresolvedError: it is not.
        """
        if self.outside.size == 0:
            return
        if not value > 0.0:
            raise UnresolvedError("the squared threshold vanishes")
        nearest, margin = self._distance(value), float(self._margin(value, unsure))  # infinite if τ² is
        if not nearest > margin:
            raise UnresolvedError(
                f"values outside the window come within {nearest / value:.1e}, {margin / value:.1e} is known"
            )

    def _margin(self, value: float, unsure: float) -> float:
        """How far `value` has to be from T's values outside the windows."""
        return self.blunt + SKEW * value + unsure

    def error(self, value: float, unsure: float = 0.0) -> float:
        """How far a Ritz value near `value` may be from an eigenvalue: ‖R‖₂² over the distance to the values outside.

        R are the residuals of the Ritz vectors that are nearer than those; what comes by way of the other windows is
        smaller by another such quotient.
        """
        nearest = self._distance(value)
        here = np.abs(self.values - value) <= nearest
        products = self.slack.values + self.apart * value
        if not here.any():
            return products
        size = float(np.linalg.eigvalsh(self.residuals[np.ix_(here, here)])[-1]) ** 0.5 + self.slack.residuals
        gap = nearest - self._margin(value, unsure)
        off = min(size, size * size / gap) if gap > 0.0 else size
        return float(products + off)

    def _distance(self, value: float) -> float:
        """From the nearest value of T outside."""
        return float(np.abs(self.outside - value).min(initial=np.inf))

    def mixing(self, cut: float) -> float:
        """‖Δ*′ − Δ*‖/‖Δ*‖ to expect of what Ritz vectors on either side of τ² have of each other.

        As `truncation.mixing` has it. Both errors are taken as spread: that of the products over n places, that of the
        span, and of inner products in it, over those of the windows.
        """
        n, w = self.vectors.shape[1], len(self.values)
        each = self.slack.values / (2.0 * n**0.5) + (self.error(cut) - self.slack.values) / w**0.5
        kept, dropped = self.values[self.values > cut], self.values[self.values <= cut]
        if len(kept) == 0:
            return 0.0
        i, j = kept[:, None], dropped[None, :]
        return float(each * np.sqrt(np.sum((i + np.abs(j)) / np.square(i - j)) / kept.sum()))


def ritz(products: Products, slack: Slack, rows: Real, outside: Doubles, blunt: float) -> Windows:
    """Rayleigh–Ritz in float64, in the span of some rows.

    Args:
        rows: (w, n), approximate eigenvectors. outside, blunt: as of `Windows`.

    Raises:
        NumericalError: something is not finite.
        UnresolvedError: the rows are not independent.
    """
    values, vectors, residuals = _in_frame(products, _frame(rows), np.inf if slack.held else slack.residuals)
    apart = _apart(values, residuals @ vectors.T) if slack.held else 0.0
    return Windows(values, vectors, residuals @ residuals.T, slack, apart, outside, blunt)


def _frame(rows: Real) -> Doubles:
    """(w, n) orthonormal rows that span the same.

    Raises:
        NumericalError, UnresolvedError: as `ritz` does.
    """
    vectors = rows.astype(np.float64)
    if not np.isfinite(vectors).all():  # LAPACK's QR need not return
        raise NumericalError("vectors of the tridiagonal form are not finite")
    overlap = vectors @ vectors.T
    if not np.linalg.norm(overlap - np.eye(len(overlap))) <= _PARALLEL:
        raise UnresolvedError("vectors of the tridiagonal form are nearly parallel: its values are clustered")
    return _orthonormal(vectors)


def _apart(values: Doubles, difference: Doubles) -> float:
    """Largest relative change of eigenvalues Θ by E: ‖Θ^(−½)·E·Θ^(−½)‖₂ (Ostrowski).

    Args:
        difference: E, in the basis of the Ritz vectors: there the images' inner products less Θ.
    """
    if not values[0] > 0.0:
        return np.inf
    scales = 1.0 / np.sqrt(values)
    scaled = scales[:, None] * difference * scales
    return float(np.linalg.norm(scaled, 2)) if np.isfinite(scaled).all() else np.inf


def rayleigh_ritz(products: Products, rows: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """Ritz values, ascending, of a matrix in the span of (w, n) independent rows; (w, n) Ritz vectors and residuals.

    Raises:
        NumericalError: products are not finite, or the inner products are not those of the images: a value's error is
            then no longer the square of its residual.
    """
    return _in_frame(products, _orthonormal(rows), 0.0)


def _orthonormal(rows: Doubles) -> Doubles:
    return np.ascontiguousarray(np.linalg.qr(rows.T)[0].T)


def _in_frame(products: Products, frame: Doubles, slack: float) -> tuple[Doubles, Doubles, Doubles]:
    """`rayleigh_ritz` in the span of orthonormal rows; a pass over the matrix with no more than those and their images.

    Each is let go as soon as it was needed last.

    Args:
        slack: how far images may be from those of the matrix that the inner products are of.
    """
    images, inner = products(frame)
    if not np.isfinite(inner).all():
        raise NumericalError("products with the delta are not finite")
    values, mix = np.linalg.eigh(inner)
    vectors = mix.T @ frame
    del frame
    residuals: Doubles = mix.T @ images
    del images
    residuals -= values[:, None] * vectors
    within = float(np.linalg.norm(residuals @ vectors.T, axis=1).max())  # of Ritz vectors nothing
    if not within <= 2.0 * slack + _ROUNDING * float(np.abs(values).max()):
        raise NumericalError(f"inner products of vectors differ from those with their images by {within:.1e}")
    return values, vectors, residuals
