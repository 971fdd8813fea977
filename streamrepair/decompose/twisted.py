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

Doubles = NDArray[np.float64]


def at_once(n: int) -> int:
    """Vectors per batch, which takes working arrays of n × five times this."""
    return 256 if n <= 2048 else 128


def vectors(diagonal: Doubles, off: Doubles, values: Doubles) -> Doubles:
    """(k, n) unit eigenvectors as rows, for k eigenvalues; rows that broke down are not finite.

    Args:
        diagonal: (n,). off: (n − 1,). values: (k,) eigenvalues, accurate to rounding.
    """
    found, step = np.empty((len(values), len(diagonal))), at_once(len(diagonal))
    with np.errstate(all="ignore"):  # a zero pivot ends in a row that is not finite, as promised
        for start in range(0, len(values), step):
            found[start : start + step] = _batch(diagonal, off, values[start : start + step])
    return found


def _batch(diagonal: Doubles, off: Doubles, values: Doubles) -> Doubles:
    """Both ends of a recurrence advance in one operation: `[j, 0]` is row j, `[j, 1]` the j-th from the bottom."""
    n, k = len(diagonal), len(values)
    shifted, step = np.empty((n, 2, k)), np.empty((2, k))
    np.subtract(_from_both_ends(diagonal), values, out=shifted)
    pivots = shifted.copy()
    # T − λ = L·D⁺·Lᵀ from the top and U·D⁻·Uᵀ from the bottom.
    for square, last, row in zip(_from_both_ends(np.square(off)), pivots[:-1], pivots[1:], strict=True):
        np.divide(square, last, out=step)
        np.subtract(row, step, out=row)
    twist = pivots[:, 0] + pivots[::-1, 1]
    twist -= shifted[:, 0]  # γᵢ = d⁺ᵢ + d⁻ᵢ − (dᵢ − λ)
    at = np.argmin(np.abs(twist, out=twist), axis=0)
    # From the twist outwards a row is the last one's times −off/d⁺ on the way up and −off/d⁻ on the way down, and one
    # until the twist is reached. Now [j, 0] is row n − 1 − j, on the way up.
    begin = np.stack([n - 1 - at, at])
    multipliers = pivots[-2::-1] if n > 1 else pivots[:0]
    np.divide(-_from_both_ends(off)[::-1], multipliers, out=multipliers)
    np.copyto(multipliers, 1.0, where=np.arange(n - 1)[:, None, None] < begin)
    z = shifted
    z[0] = 1.0
    for multiplier, last, row in zip(multipliers, z[:-1], z[1:], strict=True):
        np.multiply(multiplier, last, out=row)
    found = twist
    np.copyto(found, z[:, 1])
    np.copyto(found, z[::-1, 0], where=np.arange(n)[:, None] <= at)
    found /= np.linalg.norm(found, axis=0)
    return found.T


def _from_both_ends(values: Doubles) -> Doubles:
    """(len, 2, 1): forwards and backwards."""
    return np.stack([values, values[::-1]], axis=1)[:, :, None]
