"""Back-transformation of many vectors by the reflectors of a tridiagonal reduction, in blocks.

LAPACK's ?ormtr takes 32 reflectors at a time, which is too few for the products to run at full speed where there are
many vectors, and with between 32 and 128 vectors it takes them one by one; T's vectors, most of whose entries have
underflowed, take it twice as long as others, as it looks for zeros at their ends.

Source: Schreiber & Van Loan 1989 (compact WY); the triangular factor's inverse is taken from the reflectors' inner
products (Puglisi 1992).
"""

from __future__ import annotations

from functools import partial

import numpy as np

from streamrepair.decompose import halves, lapack
from streamrepair.decompose.convert import Doubles, Real, Singles
from streamrepair.decompose.halves import Both, in_turn

_BLOCK = 64
_BELOW = np.tri(_BLOCK, k=-1, dtype=bool)
_LEAST_COLUMNS, _LEAST_VECTORS = 256, 32
"""Below these LAPACK is as quick."""
_HALVED_VECTORS = 256
"""Where there are fewer, factors of the reflectors, which each half makes for itself, would tell."""


def rotate_back(reflectors: Real, scales: Real, vectors: Real, both: Both = in_turn) -> None:
    """Each row v of `vectors` ← Q·v, Q the product of `lapack.tridiagonalise`'s reflectors, in place.

    Args:
        reflectors: (n, n). scales: (n − 1,). vectors: (k, n), C-contiguous; all of one dtype.
        both: does two halves of the vectors, where there are enough.
    """
    n = len(reflectors)
    if n < _LEAST_COLUMNS or len(vectors) < _LEAST_VECTORS:
        lapack.rotate_back(reflectors, scales, vectors)
    elif not halves.is_cut(n) or len(vectors) < _HALVED_VECTORS:
        _rotate(reflectors, scales, vectors)
    else:
        first, second = vectors[: len(vectors) // 2], vectors[len(vectors) // 2 :]
        both(partial(_rotate, reflectors, scales, first), partial(_rotate, reflectors, scales, second))


def _rotate(reflectors: Real, scales: Real, vectors: Real) -> None:
    n = len(reflectors)
    held = np.empty(_BLOCK * n, reflectors.dtype)
    for start in range((n - 2) // _BLOCK * _BLOCK, -1, -_BLOCK):
        # Q = H₀·H₁·…: the last are applied first. Reflector i is zero up to place i and one at i + 1.
        count, length = min(_BLOCK, n - 1 - start), n - 1 - start
        rows: Real = held[: count * length].reshape(count, length)
        rows[:] = reflectors[start : start + count, start + 1 :]
        rows[:, :count][_BELOW[:count, :count]] = 0.0
        np.fill_diagonal(rows, 1.0)
        part = vectors[:, start + 1 :]
        products: Real = part @ rows.T
        _by_factor(rows, scales[start : start + count], products)
        lapack.add_product(products, rows, part, alpha=-1.0)


def _by_factor(rows: Real, scales: Singles | Doubles, products: Real) -> None:
    """Each row w of `products` ← T·w, where the block's reflectors together are I − VᵀTV, in place.

    T⁻¹ is upper triangular: the rows' inner products, and 1/τ on the diagonal; a reflector with τ = 0 is none.
    """
    inverse: Real = rows @ rows.T
    none = scales == 0.0
    if none.any():
        inverse[none], inverse[:, none] = 0.0, 0.0
    np.fill_diagonal(inverse, 1.0 / np.where(none, 1.0, scales))
    lapack.solve_triangle(inverse, products)
    if none.any():
        products[:, none] = 0.0
