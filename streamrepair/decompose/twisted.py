"""Eigenvectors of a symmetric tridiagonal matrix for known eigenvalues, each from a twisted factorisation of its own.

LAPACK's MRRR (dstemr) does that too, and takes ten times as long, mostly to make vectors of clustered eigenvalues
orthogonal. Here nothing is done about those: vectors of eigenvalues that agree to most digits come out nearly
parallel, which the caller sees in its check of orthonormality.

Source: Parlett & Dhillon 1997, "Fernando's solution to Wilkinson's problem: an application of double factorization".
"""

from __future__ import annotations

import numpy as np

from streamrepair.decompose import lapack
from streamrepair.decompose.convert import Doubles

AT_ONCE = 64
"""Vectors that are made before they are put to use; a batch and what is computed of it stay in the cache."""
_MARGIN = 1e-8
"""Of T's norm, by which a shift lies below its spectrum, so that rounding finds it positive definite."""


def vectors(diagonal: Doubles, off: Doubles, values: Doubles) -> Doubles:
    """(k, n) unit eigenvectors as rows, for k eigenvalues; rows that broke down are not finite.

    Args:
        diagonal: (n,). off: (n − 1,). values: (k,) eigenvalues, accurate to rounding.
    """
    found, beside = np.empty((len(values), len(diagonal))), np.abs(off)
    around = np.append(beside, 0.0) + np.append(0.0, beside)
    norm = float((np.abs(diagonal) + around).max())
    shift = float((diagonal - around).min()) - _MARGIN * norm  # Gershgorin
    pivots, lower = diagonal - shift, np.append(off, 0.0)
    if lapack.factor_tridiagonal(pivots, lower):
        lapack.twisted_vectors(pivots, lower, values - shift, found)
    else:
        found.fill(np.nan)
    return found
