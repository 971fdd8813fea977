"""Checks that a factorisation is what it claims, from probe vectors that never entered it.

A backend's answer is used only when these pass. They cost O(n²) per probe where a factorisation costs O(n³):

- *Gram error*: for probes X with independent ±1 entries, E‖EX‖² per probe is ‖E‖_F² with E = G − ΔᵀΔ (Hutchinson 1990).
- *Factor error*: the same with E = G − Q·T·Qᵀ (or V·Λ·Vᵀ), which covers every eigenvalue at once: by Weyl, no ordered
  eigenvalue is off by more than ‖E‖₂.
- *Median* and *count*: Sturm sequences on T, on either side of λ_med and at τ², count the values above independently of
  the eigenvalue solver (Sylvester), whose values Q·T·Qᵀ does not hold; where there is no T, see `cholesky_count`.
- *Vectors*, rows of V: ‖VVᵀ − I‖ in full, and the residual VG − ΛV on the probes.

Source: Hutchinson 1990; Halko, Martinsson & Tropp 2011, section 4.3 (a posteriori bounds from random probes);
Parlett, The Symmetric Eigenvalue Problem, sections 3.3 and 10.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from streamrepair.decompose.arithmetic import Vectors
from streamrepair.decompose.convert import Doubles
from streamrepair.errors import NumericalError

PROBES = 8
ORTHONORMALITY = 1e-8
RESIDUAL = 1e-10
FACTOR = 1e-10
_AT_ONCE = 256
"""Vectors that are widened, or multiplied with all others, at once."""
_KEPT_COLUMNS = 1024
"""Probes of longer vectors are made anew each time."""
_COUNTING = 4.0
"""What a Sturm sequence's own rounding may move, in units of ε·λ_max."""


def probe_vectors(n: int) -> Doubles:
    """(PROBES, n) signs ±1, the same for every matrix of that n: reruns must give the same bytes. Not to be written."""
    return _kept_probes(n) if n <= _KEPT_COLUMNS else _probes(n)


@lru_cache(maxsize=16)
def _kept_probes(n: int) -> Doubles:
    """Of small matrices, which are many: making them took a twentieth of the time."""
    probes = _probes(n)
    probes.flags.writeable = False
    return probes


def _probes(n: int) -> Doubles:
    signs = np.random.Generator(np.random.SFC64(n)).integers(0, 2, (PROBES, n))
    return (2.0 * signs - 1.0).astype(np.float64)


def frobenius_estimate(difference: Doubles) -> float:
    """‖E‖_F estimated from E·X, given as (PROBES, n)."""
    return float(np.linalg.norm(difference) / np.sqrt(PROBES))


def spectral_bound(difference: Doubles) -> float:
    """‖E‖₂ of a rounding error from E·X, given as (PROBES, n).

    A symmetric matrix of independent entries has ‖E‖₂ → 2‖E‖_F/√n (Wigner's semicircle); ‖E‖_F itself bounds small n.
    A delta with a few columns far larger than the rest has its error there, and ‖E‖₂ is the norm of such a row of E:
    the largest one, as seen by the probes, which alike rows do not lift above Wigner's bound. It is then right to a
    factor of 1.5, since E is seen through images with rounding errors of their own; what it touches are the values of
    those columns, far above any τ that such a bound leaves resolved.
    """
    frobenius = frobenius_estimate(difference)
    alike = 2.0 * frobenius / np.sqrt(max(1, difference.shape[1]))
    largest_row = np.sqrt(np.square(difference).sum(axis=0).max(initial=0.0) / PROBES)
    return float(min(frobenius, max(alike, largest_row)))


def solver_bound(largest: float, n: int) -> float:
    """What a backward stable eigenvalue solver may add in float64 where the probes cannot see it: √n·ε·λ_max."""
    return float(np.sqrt(n) * np.finfo(np.float64).eps * largest)


def check_factor(difference: Doubles, largest: float, *, tolerance: float = FACTOR) -> None:
    """Refuse a factorisation whose product differs from G on the probes.

    Raises:
        NumericalError: not finite, or off by more than rounding explains.
    """
    error = frobenius_estimate(difference)
    if not error <= tolerance * largest:
        raise NumericalError(f"the eigenvalue factorisation misses its matrix by {error / largest:.1e} of its norm")


def check_vectors(
    vectors: Vectors,
    values: Doubles,
    probes: Doubles,
    images: Doubles,
    *,
    orthonormal: float = ORTHONORMALITY,
    belonging: float = RESIDUAL,
) -> Doubles:
    """Hold that rows are orthonormal and eigenvectors; returns (k,) ‖G·v − λ·v‖ as the probes see it.

    Args:
        vectors: (k, n) eigenvectors, wherever they are. values: (k,) their eigenvalues.
        probes: (PROBES, n) X. images: (PROBES, n) G·X.
        orthonormal, belonging: the largest defect and residual that pass; the defaults are for float64.

    Raises:
        NumericalError: not orthonormal, or not eigenvectors.
    """
    if len(vectors) == 0:
        return np.zeros(0)
    defect = orthonormality(vectors)
    if not defect <= orthonormal:
        raise NumericalError(f"singular vectors are not orthonormal (off by {defect:.1e})")
    difference = times(vectors, images) - values[:, None] * times(vectors, probes)
    residuals: Doubles = np.linalg.norm(difference, axis=1) / np.sqrt(PROBES)
    residual = float(np.linalg.norm(residuals / values.max()))
    if not residual <= belonging:
        raise NumericalError(f"singular vectors do not belong to their values (residual {residual:.1e})")
    return residuals


def times(vectors: Vectors, columns: Doubles) -> Doubles:
    """(k, p) inner products of vectors, wherever they are, with the rows of (p, n) `columns`, in float64."""
    if not isinstance(vectors, np.ndarray):
        return vectors.times(columns)
    products = np.empty((len(vectors), len(columns)))
    for start in range(0, len(vectors), _AT_ONCE):  # float32 ones are widened
        np.matmul(vectors[start : start + _AT_ONCE], columns.T, out=products[start : start + _AT_ONCE])
    return products


def orthonormality(vectors: Vectors) -> float:
    """Norm of the largest row of VVᵀ − I, for V's vectors given as rows; NaN if they are not finite.

    ‖VVᵀ − I‖₂, which Δ* is off by, is no less and, where rounding errors are alike, no more than twice that.
    """
    if len(vectors) == 0:
        return 0.0
    if not isinstance(vectors, np.ndarray):
        return vectors.orthonormality()
    squares = np.zeros(len(vectors), vectors.dtype)
    for start in range(0, len(vectors), _AT_ONCE):  # all products at once would be as large as the vectors themselves
        product = vectors[start : start + _AT_ONCE] @ vectors[start:].T
        count = len(product)
        product.flat[:: product.shape[1] + 1] -= product.dtype.type(1.0)
        squares[start : start + count] += np.einsum("ij,ij->i", product, product)
        # What lies right of the stripe's square is the transpose of what lies below it.
        squares[start + count :] += np.einsum("ij,ij->j", product[:, count:], product[:, count:])
    return float(np.sqrt(squares.max()))


def check_place(diagonal: Doubles, off: Doubles, values: Doubles, place: int) -> None:
    """Hold that the eigenvalue of a symmetric tridiagonal matrix with `place` others below it is the one given.

    Two Sturm counts, on either side of it, at what a backward stable solver may be off by.

    Args:
        values: (n,) eigenvalues as the solver has them, ascending.

    Raises:
        NumericalError: it is another one.
    """
    n, value, largest = len(values), float(values[place]), float(np.abs(values[[0, -1]]).max())
    off_by = solver_bound(largest, n) + _COUNTING * float(np.finfo(np.float64).eps) * largest
    off_by += float(np.finfo(np.float64).tiny)
    if not (sturm_count(diagonal, off, value - off_by) >= n - place > sturm_count(diagonal, off, value + off_by)):
        raise NumericalError(f"eigenvalue {place} of {n} is not {value:.6g}, as counts on either side of it find")


def check_count(counted: int, expected: int, close: int) -> None:
    """Refuse a kept rank that an independent count does not bear out.

    Args:
        close: values so near the threshold that rounding may put them on either side.

    Raises:
        NumericalError: the counts differ by more.
    """
    if abs(counted - expected) > close:
        raise NumericalError(f"{expected} eigenvalues exceed the squared threshold, another count finds {counted}")


def sturm_count(diagonal: Doubles, off: Doubles, shift: float) -> int:
    """How many eigenvalues of a symmetric tridiagonal matrix exceed `shift`: the negative pivots of shift·I − T."""
    tiny = float(np.finfo(np.float64).tiny) * max(1.0, float(np.abs(off).max(initial=0.0)) ** 2)
    above, pivot = 0, 1.0
    squares = np.concatenate([[0.0], np.square(off)]).tolist()
    for value, square in zip(diagonal.tolist(), squares, strict=True):
        pivot = (shift - value) - square / pivot
        if abs(pivot) < tiny:
            pivot = -tiny
        above += pivot < 0
    return above
