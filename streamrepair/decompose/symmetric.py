"""A symmetric matrix in one triangle of an array, and factors of its shifts in the other: one n × n array for both.

The diagonal is the only place that both want, so it is put in place for whichever is in use.

Source of the counts: Sylvester's law of inertia; Parlett, The Symmetric Eigenvalue Problem, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamrepair.decompose import certify, lapack
from streamrepair.decompose.convert import Doubles, Real, RealType

_TILE = 256


class Seen(NamedTuple):
    """What a matrix does to vectors that enter no computation on it."""

    probes: Doubles
    """(p, n) X."""
    images: Doubles
    """(p, n) G·X."""


class SymmetricPair:
    """G, and at times the factors of G − c·I or of c·I − (G − Σ θ·v·vᵀ).

    Args:
        gram: (n, n) float64, C upper triangle set; the lower one is overwritten.
    """

    def __init__(self, gram: Doubles) -> None:
        self._array = gram
        self._diagonal = gram.diagonal().copy()
        self._factors: _Factors | None = None
        self._mirrored = False

    @property
    def size(self) -> int:
        """n."""
        return len(self._array)

    @property
    def largest_diagonal(self) -> float:
        """Of G; no entry of a Gram matrix is larger."""
        return float(self._diagonal.max())

    def moments(self) -> tuple[float, float]:
        """The sums of G's eigenvalues and of their squares."""
        squares = sum(float(row[i:] @ row[i:]) for i, row in enumerate(self._array[:-1], 1))
        return float(self._diagonal.sum()), 2.0 * squares + float(self._diagonal @ self._diagonal)

    def fill(self) -> None:
        """Put G into both triangles, for many products: LAPACK packs a single one anew in every call."""
        self._mirror()
        self._place(self._diagonal)

    def copy(self, out: Real, factor: float) -> None:
        """Both triangles of (n, n) `out` ← factor·G."""
        for i in range(0, self.size, _TILE):
            rows = slice(i, i + _TILE)
            np.multiply(self._array[rows, i:], factor, out=out[rows, i:], casting="same_kind")
        self._mirror(factor, out)
        out.flat[:: self.size + 1] = self._diagonal * factor

    def times(self, vectors: Doubles) -> Doubles:
        """(k, n) G·v for each row v of `vectors`."""
        self._place(self._diagonal)
        if not self._mirrored:
            return lapack.times_symmetric(self._array, vectors)
        images: Doubles = vectors @ self._array
        return images

    def restore(self) -> None:
        """Leave G's triangle and diagonal as they were given."""
        self._place(self._diagonal)

    def shift(self, c: float) -> int:
        """Factor G − c·I; returns how many eigenvalues of G are above c.

        Raises:
            NumericalError: c is an eigenvalue to the last bit.
        """
        if not self._mirrored:
            self._mirror()
        self._place(self._diagonal - c)
        self._mirrored = False
        pivots, beside = lapack.factor_indefinite(self._array)
        self._factors = _Factors.of(pivots, self._array.diagonal().copy(), beside)
        return self.size - self._factors.negative()

    def solve(self, vectors: Doubles) -> Doubles:
        """(k, n) (G − c·I)⁻¹·v for each row v, by the factors of the last `shift`."""
        factors = self._factors
        assert factors is not None
        solutions = np.take(vectors, factors.order, axis=1)  # C-ordered, which an index alone would not be
        lapack.solve_unit_triangle(self._array, solutions, transpose=False)
        factors.divide(solutions)
        lapack.solve_unit_triangle(self._array, solutions, transpose=True)
        back = np.empty_like(solutions)
        back[:, factors.order] = solutions
        return back

    def shift_error(self, c: float, probes: Doubles) -> float:
        """‖E‖₂ of the factors, which are exactly those of G − c·I + E, as seen in their solutions for `probes`."""
        solutions = self.solve(probes)
        norms = np.linalg.norm(solutions, axis=1, keepdims=True)
        defect = (self.times(solutions) - c * solutions - probes) / norms
        # Each row is E on a unit vector, where certify's probes have norm √n.
        return certify.spectral_bound(defect * self.size**0.5)

    def none_above(self, c: float, values: Doubles, vectors: Doubles, seen: Seen) -> float:
        """Proof that G has no more eigenvalues above c than `values`: c·I − (G − Σ θ·v·vᵀ) has a Cholesky factor.

        Args:
            values: (k,) non-negative θ. vectors: (k, n) v as rows; they need not be eigenvectors for the proof to hold.
            seen: G on the probes.

        Returns:
            The measured error of the factor, by which c is to be raised; infinite if there is no factor.

        Source: Weyl's inequality, λ_{k+1}(A + B) ≤ λ₁(A) for B of rank k; Rump 2006 for Cholesky as a proof.
        """
        self._factors, self._mirrored = None, False
        self._mirror(-1.0 / c)
        return self.error_above(self._array, c, values, vectors, seen)

    def error_above(self, out: Real, c: float, values: Doubles, vectors: Doubles, seen: Seen) -> float:
        """`none_above` by a factor in (n, n) `out`, in its precision, which holds −G/c below the diagonal."""
        # In units of c: what float32 holds of G does not depend on G's scale.
        rows: Doubles = np.ascontiguousarray(vectors * np.sqrt(values / c)[:, None])
        images = seen.probes - seen.images / c + (seen.probes @ rows.T) @ rows
        real: RealType = np.float32 if out.dtype == np.float32 else np.float64
        out.flat[:: self.size + 1] = 1.0 - self._diagonal / c
        deflation: Real = rows.astype(real, copy=False)
        lapack.add_outer(deflation, out)
        if not lapack.cholesky(out):
            return np.inf
        columns: Real = seen.probes.astype(real)
        return c * certify.spectral_bound(lapack.times_cholesky(out, columns) - images)

    def _place(self, diagonal: Doubles) -> None:
        self._array.flat[:: self.size + 1] = diagonal

    def _mirror(self, factor: float = 1.0, out: Real | None = None) -> None:
        """Lower triangle of `out`, this one by default, ← factor × the upper one, in tiles that fit the cache."""
        a, n = self._array, self.size
        target: Real = a if out is None else out
        for i in range(0, n, _TILE):
            rows = slice(i, i + _TILE)
            corner = np.triu(a[rows, rows], 1)
            lower = np.tril_indices(len(corner), -1)
            target[rows, rows][lower] = factor * corner.T[lower]
            for j in range(i + _TILE, n, _TILE):
                columns = slice(j, j + _TILE)
                np.multiply(a[rows, columns].T, factor, out=target[columns, rows], casting="same_kind")
        self._mirrored = target is a and factor == 1.0


@dataclass(frozen=True, slots=True)
class _Factors:
    """P and D of P·U·D·Uᵀ·Pᵀ; U lies in the array."""

    order: NDArray[np.intp]
    """(n,) the permutation: row k of Pᵀ·v is row order[k] of v."""
    diagonal: Doubles
    """(n,) of D."""
    beside: Doubles
    """(n,) right of D's diagonal: entry k joins k − 1 and k where the two make a 2 × 2 block, else it is zero."""

    @staticmethod
    def of(pivots: NDArray[np.int32], diagonal: Doubles, beside: Doubles) -> _Factors:
        """From LAPACK's pivots: two equal negative ones stand for a 2 × 2 block."""
        order, k = np.arange(len(pivots)), len(pivots) - 1
        joined = np.zeros(len(pivots), bool)
        while k >= 0:
            other, at = abs(int(pivots[k])) - 1, k
            if pivots[k] < 0:
                joined[k] = True
                at = k - 1
            order[[at, other]] = order[[other, at]]
            k = at - 1
        return _Factors(order, diagonal, np.where(joined, beside, 0.0))

    def negative(self) -> int:
        """Negative eigenvalues of D."""
        d, second = self.diagonal, np.flatnonzero(self.beside)
        alone = np.ones(len(d), bool)
        alone[second] = alone[second - 1] = False
        determinant = d[second] * d[second - 1] - np.square(self.beside[second])
        # A negative determinant has one eigenvalue of either sign.
        of_blocks = np.where(determinant < 0, 1, 2 * (d[second] < 0))
        return int(np.count_nonzero(d[alone] < 0) + of_blocks.sum())

    def divide(self, rows: Doubles) -> None:
        """Each row v ← D⁻¹·v, in place."""
        d, second = self.diagonal, np.flatnonzero(self.beside)
        first, e = second - 1, self.beside[second]
        # Divided by the off-diagonal entry first, as LAPACK does: it is the largest of the block.
        a, b = d[first] / e, d[second] / e
        u, v = rows[:, first] / e, rows[:, second] / e
        rows /= np.where(self.beside != 0.0, 1.0, d)
        scale = a * b - 1.0
        rows[:, first], rows[:, second] = (b * u - v) / scale, (a * v - u) / scale
