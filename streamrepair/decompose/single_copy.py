"""A float32 copy of a Gram matrix, for the many products of a Krylov basis, which memory bounds, and for a proof.

What is found by such products is a subspace; values and residuals in it are computed with G itself.
"""

from __future__ import annotations

import numpy as np

from streamrepair.decompose.convert import Doubles, Singles, power_of_two
from streamrepair.decompose.symmetric import Seen, SymmetricPair

COARSE = 3e-5
"""Error of a Cholesky factor in float32, in units of the shift, that is to be expected at least."""


class SingleCopy:
    """G in float32, both triangles.

    Args:
        matrix: G.
    """

    def __init__(self, matrix: SymmetricPair) -> None:
        self._matrix = matrix
        self._array: Singles = np.empty((matrix.size, matrix.size), np.float32)
        self._scale = power_of_two(max(matrix.largest_diagonal, np.finfo(np.float64).tiny))
        self._filled = False

    def times(self, vectors: Doubles) -> Doubles:
        """(k, n) G·v for each row v of `vectors`, to float32's precision."""
        if not self._filled:
            self._matrix.copy(self._array, 1.0 / self._scale)
            self._filled = True
        # The matrix on the left: the other way round BLAS takes half as long again.
        images: Doubles = (self._array @ vectors.astype(np.float32).T).T.astype(np.float64, order="C")
        images *= self._scale
        return images

    def none_above(self, c: float, values: Doubles, vectors: Doubles, seen: Seen) -> float:
        """As `SymmetricPair.none_above`, by a factor in float32 in place of the copy."""
        if self._filled:
            self._filled = False
            self._array *= np.float32(-self._scale / c)
        else:
            self._matrix.copy(self._array, -1.0 / c)
        return self._matrix.error_above(self._array, c, values, vectors, seen)
