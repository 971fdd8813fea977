"""Block Lanczos on a symmetric operator: its outer eigenpairs, and from its start block the density of the others.

Vectors are rows. Reorthogonalisation is full and done twice ("twice is enough"), so that the projected matrix is what
it claims to be and no value appears twice. The start block is Gaussian, hence Haar after orthonormalisation: the
weights that Ritz values have in it are unbiased estimates of the share of the spectrum near them.

Source: Golub & Underwood 1977; Musco & Musco 2015 (randomized block Krylov); Ubaru, Chen & Saad 2017 (stochastic
Lanczos quadrature); Giraud, Langou, Rozložník & van den Eshof 2005 (twice is enough).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from streamrepair.decompose.convert import Doubles
from streamrepair.errors import NumericalError

_VANISHED = 1e-5
"""Share of the images that is new, below which rounding (1e-16 of them) would show in the next step's vectors."""
_WIDEST_STEP = 0.28
"""Of the neighbouring nodes' roots, relative: noise of square matrices, the widest, has 0.2 at its median."""
_LEAST_RESIDUAL = 0.35
"""Of the distance to the next node: continuous spectra have 0.41 or more, blurred steps 0.29 or less."""


@dataclass(frozen=True, slots=True)
class Ritz:
    """Approximate eigenpairs of the operator, descending."""

    values: Doubles
    """(d,)"""
    residuals: Doubles
    """(d,) ‖A·y − θ·y‖ of each."""
    weights: Doubles
    """(d, b) squared shares of the start block's vectors: each column sums to 1."""
    coefficients: Doubles
    """(d, d) Ritz vectors in the basis, as columns."""


class BlockLanczos:
    """A growing Krylov basis.

    Args:
        apply: (k, n) rows → (k, n) their images. n: side. block: vectors per step. capacity: most vectors of the basis.
        seed: of the start block. without: (j, n) orthonormal rows that the operator is restricted to the complement of.
    """

    def __init__(
        self,
        apply: Callable[[Doubles], Doubles],
        n: int,
        *,
        block: int,
        capacity: int,
        seed: int,
        without: Doubles | None = None,
    ) -> None:
        self._block = block
        self._apply = apply if without is None else lambda rows: _projected(apply(rows), without)
        self._basis = np.empty((capacity, n))
        self._projected = np.zeros((capacity, capacity))
        start = np.random.Generator(np.random.SFC64(seed)).standard_normal((block, n))
        self._basis[:block] = _orthonormal(start if without is None else _projected(start, without))[0]
        self.size = 0
        """Vectors whose images are known."""
        self._last = np.zeros((block, block))

    @property
    def full(self) -> bool:
        """Whether there is no room for another step."""
        return self.size + 2 * self._block > len(self._basis)

    def extend(self) -> None:
        """One step: the images of the newest block, made orthogonal to all before.

        Raises:
            NumericalError: the operator's images are not finite.
        """
        at, b = self.size, self._block
        images = self._apply(self._basis[at : at + b])
        if not np.isfinite(images).all():
            raise NumericalError("products with the matrix are not finite")
        known = self._basis[: at + b]
        total = np.zeros((len(known), b))
        for _ in range(2):
            overlap = known @ images.T
            images -= overlap.T @ known
            total += overlap
        self._projected[: at + b, at : at + b] = total
        self._projected[at : at + b, : at + b] = total.T
        fresh, self._last = _orthonormal(images)
        sizes = np.abs(self._last.diagonal())
        if not sizes.min() > _VANISHED * max(np.abs(total).max(), sizes.max()):
            # What is left of an image that vanished is rounding and need not be orthogonal to the basis.
            fresh -= (fresh @ known.T) @ known
            fresh = _orthonormal(fresh)[0]
        self._basis[at + b : at + 2 * b] = fresh
        self.size = at + b

    def ritz(self) -> Ritz:
        """All Ritz pairs of the present basis, descending."""
        d, b = self.size, self._block
        values, vectors = np.linalg.eigh(self._projected[:d, :d])
        order = np.arange(d)[::-1]
        vectors = vectors[:, order]
        residuals = np.linalg.norm(self._last @ vectors[d - b :], axis=0)
        return Ritz(values[order], residuals, np.square(vectors[:b]).T, vectors)

    def vectors(self, coefficients: Doubles) -> Doubles:
        """(k, n) vectors as rows, from (d, k) coefficients in the basis."""
        found: Doubles = coefficients.T @ self._basis[: self.size]
        return found


def _projected(rows: Doubles, basis: Doubles) -> Doubles:
    """Rows less their parts in the span of an orthonormal basis, twice."""
    for _ in range(2):
        rows = rows - (rows @ basis.T) @ basis
    return rows


def _orthonormal(rows: Doubles) -> tuple[Doubles, Doubles]:
    """Q (rows) and R with rowsᵀ = Qᵀ·R."""
    q, r = np.linalg.qr(rows.T)
    return np.ascontiguousarray(q.T), r


class Guess(NamedTuple):
    """Where to look for the median eigenvalue."""

    value: float
    slope: float
    """Eigenvalues per unit there, roughly."""


@dataclass(frozen=True, slots=True)
class Density:
    """A spectrum's cumulative distribution as a random start block saw it, per vector of that block.

    Everything is interpolated in √λ: the densest spectra, of square noise, have a pole at λ = 0 and none in √λ.
    """

    roots: Doubles
    """(d,) √ of the Ritz values, ascending."""
    below: Doubles
    """(d, b) estimated number of eigenvalues below each."""
    total: int
    """Eigenvalues in all."""
    residuals: Doubles
    """(d,) of the Ritz values: the median of each cluster."""

    @staticmethod
    def of(ritz: Ritz, total: int) -> Density:
        """From the Ritz pairs of a start block in a space of `total` dimensions."""
        values, weights = ritz.values[::-1], ritz.weights[::-1]
        block = weights.shape[1]
        # A large random block sees nearly the same quadrature with each of its vectors: its nodes come in clusters of
        # that many, and half of a cluster's weight lies on either side of it.
        starts = np.arange(0, len(values), block)
        masses = np.add.reduceat(weights, starts)
        roots = np.add.reduceat(np.sqrt(np.maximum(values, 0.0)), starts) / np.diff(np.append(starts, len(values)))
        share = (np.cumsum(masses, axis=0) - 0.5 * masses) / masses.sum(axis=0)
        residuals = [float(np.median(ritz.residuals[::-1][start : start + block])) for start in starts]
        below = np.vstack([np.zeros(block), share * total])
        return Density(np.append(0.0, roots), below, total, np.append(np.inf, residuals))

    def at(self, position: float) -> float:
        """The value with so many eigenvalues below it."""
        root = float(np.interp(position, self.below.mean(axis=1), self.roots))
        return root * root

    def guess(self, position: float) -> Guess:
        """The same, and how dense the spectrum is there."""
        value = self.at(position)
        return Guess(value, self.slope(value))

    def position(self, value: float) -> float:
        """How many eigenvalues lie below a value."""
        return float(np.interp(value**0.5, self.roots, self.below.mean(axis=1)))

    def continuous(self, position: float) -> bool:
        """Whether the quadrature's nodes on either side of a place are near each other, so that it can be interpolated.

        Between the nodes that a gap in the spectrum leaves apart nothing is known of where it lies; and a node that has
        nearly converged stands for many values at one place and none beside it.
        """
        after = int(np.clip(np.searchsorted(self.below.mean(axis=1), position), 1, len(self.roots) - 1))
        beside = self.roots[after - 1 : after + 1]
        near = beside[1] - beside[0] <= _WIDEST_STEP * beside[1]
        least = float(self.residuals[after - 1 : after + 1].min())
        return bool(near and least >= _LEAST_RESIDUAL * (beside[1] ** 2 - beside[0] ** 2))

    def spread(self, value: float) -> float:
        """Standard error of the number of eigenvalues below `value`."""
        each = np.array([np.interp(value**0.5, self.roots, column) for column in self.below.T])
        return float(each.std(ddof=1) / np.sqrt(each.size))

    def slope(self, value: float) -> float:
        """Estimated eigenvalues per unit around `value`, over a tenth of it to either side."""
        low, high = np.interp(np.sqrt([0.9 * value, 1.1 * value]), self.roots, self.below.mean(axis=1))
        return float(high - low) / (0.2 * value) if value > 0.0 else 0.0
