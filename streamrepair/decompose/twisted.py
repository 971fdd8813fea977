"""Eigenvectors of a symmetric tridiagonal matrix for known eigenvalues, all at once.

LAPACK's MRRR (dstemr) makes vectors one after another, and at some hundred of them costs more than the reduction before
it. A twisted factorisation gives each vector directly from its eigenvalue in O(n), and the same steps for many vectors
are NumPy operations on rows. Nothing is done about clusters: vectors of eigenvalues that agree to most digits come out
nearly parallel, which the caller sees in its check of orthonormality.

Source: Parlett & Dhillon 1997, "Fernando's solution to Wilkinson's problem: an application of double factorization".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

AT_ONCE = 256
"""Vectors per batch: the three working arrays are n × this."""

Doubles = NDArray[np.float64]


def vectors(diagonal: Doubles, off: Doubles, values: Doubles) -> Doubles:
    """(k, n) unit eigenvectors as rows, for k eigenvalues; rows that broke down are not finite.

    Args:
        diagonal: (n,). off: (n − 1,). values: (k,) eigenvalues, accurate to rounding.
    """
    found = np.empty((len(values), len(diagonal)))
    with np.errstate(all="ignore"):  # a zero pivot ends in a row that is not finite, as promised
        for start in range(0, len(values), AT_ONCE):
            found[start : start + AT_ONCE] = _batch(diagonal, off, values[start : start + AT_ONCE])
    return found


def _batch(diagonal: Doubles, off: Doubles, values: Doubles) -> Doubles:
    n, k = len(diagonal), len(values)
    down, up = np.empty((n, k)), np.empty((n, k))
    np.subtract(diagonal[:, None], values, out=down)
    np.copyto(up, down)
    twist = np.negative(down)  # γᵢ = d⁺ᵢ + d⁻ᵢ − (dᵢ − λ)
    squares = np.square(off).tolist()
    step = np.empty(k)
    for i in range(1, n):  # T − λ = L·D⁺·Lᵀ from the top
        np.divide(squares[i - 1], down[i - 1], out=step)
        down[i] -= step
    for i in range(n - 2, -1, -1):  # T − λ = U·D⁻·Uᵀ from the bottom
        np.divide(squares[i], up[i + 1], out=step)
        up[i] -= step
    twist += down
    twist += up
    at = np.argmin(np.abs(twist, out=twist), axis=0)
    # Multipliers of the two recurrences that leave the twist; zero on the other side of it.
    above = np.arange(n - 1)[:, None] < at
    np.divide(-off[:, None], down[:-1], out=down[:-1], where=above)
    np.divide(-off[:, None], up[1:], out=up[1:], where=~above)
    down[:-1][~above] = 0.0
    up[1:][above] = 0.0
    z = twist
    z.fill(0.0)
    z[at, np.arange(k)] = 1.0
    for i in range(n - 2, -1, -1):
        np.multiply(down[i], z[i + 1], out=step)
        z[i] += step
    for i in range(1, n):
        np.multiply(up[i], z[i - 1], out=step)
        z[i] += step
    z /= np.linalg.norm(z, axis=0)
    return z.T
