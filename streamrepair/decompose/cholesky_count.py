"""How many eigenvalues of a symmetric matrix exceed a shift, proven by a Cholesky factor and by a residual.

A second opinion on an eigenvalue solver for places that have no LDLᵀ or Sturm count, as torch on a GPU. Both halves
start from the solver's vectors and values, and neither believes them:

- *at most*: for any V and Λ ≥ 0 with t rows, λ_{t+1}(G) ≤ λ₁(G − VᵀΛV), since VᵀΛV has t positive eigenvalues at most
  (Weyl). If s·I − (G − VᵀΛV) has a Cholesky factor, no more than t eigenvalues of G exceed s. Wrong vectors cannot make
  it succeed; they only make it fail. The factorisation's own rounding c is taken off s (Rump 2006).
- *at least*: orthonormal V with the residual R = VG − ΛV have as many distinct eigenvalues of G within ‖R‖₂ of Λ (Kahan
  1967; Cao, Xie & Li 1996 for V that is nearly orthonormal). R and VVᵀ − I are formed in full, not seen through probes;
  RRᵀ too, since ‖R‖_F alone would be √k times too much for k vectors whose errors are alike.

No gap in the spectrum is assumed. Values as near to the shift as the rounding of these proofs are left open.

Source: Rump 2006, "Verification of positive definiteness"; Parlett, The Symmetric Eigenvalue Problem, sections 10.1 and
11.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from streamrepair.decompose import certify
from streamrepair.decompose.arithmetic import Count, Vectors
from streamrepair.decompose.convert import Doubles
from streamrepair.errors import NumericalError

_UNIT = float(np.finfo(np.float64).eps) / 2
_SAFETY = 2.0
"""On Rump's constant, which is for a factorisation without blocks."""
_FORMED = 2.0
"""Most that the deflated matrix may be off by, in units of √n·ε·λ_max; measured: up to 0.45."""
_RESIDUAL = 8.0
"""Most that a backward stable solver's vectors may be off by, likewise; measured: up to 2. What was found counts."""


class Symmetric(Protocol):
    """An (n, n) matrix G in float64, in whichever memory, with what the proofs do to it."""

    def residual(self, vectors: Vectors, values: Doubles) -> tuple[float, float]:
        """√‖RRᵀ‖_F ≥ ‖R‖₂ of R = VG − ΛV, and ‖VVᵀ − I‖_F, for (k, n) vectors as rows; NaN if they are not finite."""
        ...

    def deflated(self, shift: float, vectors: Vectors, values: Doubles, probes: Doubles) -> tuple[bool, Doubles]:
        """Whether A = shift·I − G + VᵀΛV has a Cholesky factor, and by what A as formed differs from it.

        The difference is (p, n): A·X less shift·X − G·X + Vᵀ(Λ(V·X)) for the (p, n) probes X.
        """
        ...


@dataclass(frozen=True, slots=True)
class Deflation:
    """Which values are taken out before the rest is proven to lie below the shift."""

    count: int
    """The largest so many: all above the shift, and those below it that rounding does not tell from it."""
    formed: float
    """What forming the deflated matrix may be off by."""
    factor: float
    """What its factorisation may be off by, c."""


def deflation(values: Doubles, shift: float, bound: float) -> Deflation:
    """How many of `values` to take out.

    Args:
        values: (n,) ascending. bound: how far any value may be off already.
    """
    n = len(values)
    formed = _FORMED * certify.solver_bound(float(values[-1]), n)
    gamma = (n + 1) * _UNIT / (1.0 - (n + 1) * _UNIT)
    factor = _SAFETY * gamma / (1.0 - gamma) * n * max(shift, 0.0)  # the trace of what is factored is below n·shift
    # Once to be proven, once for the proof to succeed.
    margin = bound + 2.0 * (formed + factor)
    return Deflation(int(np.count_nonzero(values > shift - margin)), formed, factor)


def prove(matrix: Symmetric, values: Doubles, vectors: Vectors, shift: float, bound: float) -> Count:
    """The number of eigenvalues above `shift` of any matrix whose ordered eigenvalues are within `bound` of G's.

    Args:
        values: (n,) what the solver says of G's eigenvalues, ascending.
        vectors: (deflation(…).count, n) its vectors of the largest ones as rows, in the same order.

    Raises:
        NumericalError: a proof failed: values or vectors are not G's.
    """
    taken = deflation(values, shift, bound)
    assert len(vectors) == taken.count
    largest = values[len(values) - taken.count :]
    off = _residual(matrix, vectors, largest, float(values[-1])) if taken.count else 0.0
    if taken.count < len(values):  # all of them are never too many
        _prove_at_most(matrix, vectors, largest, shift - bound - taken.factor - taken.formed, taken)
    return Count(int(np.count_nonzero(largest > shift + bound + off)), taken.count)


def _residual(matrix: Symmetric, vectors: Vectors, values: Doubles, largest: float) -> float:
    """How far as many eigenvalues of G as there are `values` may be from them."""
    residual, defect = matrix.residual(vectors, values)
    if not defect < 0.5:
        raise NumericalError(f"singular vectors are not orthonormal (off by {defect:.1e} in all)")
    off = residual / math.sqrt(1.0 - defect)  # the smallest singular value of V is √(1 − defect) at least
    if not off <= _RESIDUAL * certify.solver_bound(largest, vectors.shape[1]):
        raise NumericalError(f"{len(values)} eigenvalues are not borne out by their vectors (off by {off:.1e})")
    return off


def _prove_at_most(matrix: Symmetric, vectors: Vectors, values: Doubles, shift: float, taken: Deflation) -> None:
    positive, difference = matrix.deflated(shift, vectors, values, certify.probe_vectors(vectors.shape[1]))
    error = certify.spectral_bound(difference)
    if not error <= taken.formed:
        raise NumericalError(f"the deflated matrix was formed wrongly (off by {error:.1e})")
    if not positive:
        raise NumericalError(f"more than {taken.count} eigenvalues may exceed the squared threshold")
