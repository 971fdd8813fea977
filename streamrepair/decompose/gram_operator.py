"""A Gram matrix as block Krylov uses it: products that span a basis, Ritz pairs in float64, and the proof of the count.

Where G is no more precise than float32 the products are those of a float32 copy, since memory bounds them; what they
find is a subspace only.
"""

from __future__ import annotations

import numpy as np

from streamrepair.decompose.convert import Doubles
from streamrepair.decompose.krylov_search import Operator, Pairs
from streamrepair.decompose.single_copy import COARSE, SingleCopy
from streamrepair.decompose.symmetric import Seen, SymmetricPair
from streamrepair.decompose.truncation import UnresolvedError

_AT_ONCE = 64


class GramOperator(Operator):
    """G.

    Args:
        matrix: G. seen: G on probes. single: whether it is no more precise than float32.
    """

    def __init__(self, matrix: SymmetricPair, seen: Seen, *, single: bool) -> None:
        self._matrix, self._seen = matrix, seen
        self._copy = SingleCopy(matrix) if single else None
        if self._copy is None:
            matrix.fill()

    @property
    def size(self) -> int:
        """n."""
        return self._matrix.size

    def times(self, vectors: Doubles) -> Doubles:
        """(k, n) G·v for each row v of `vectors`, to G's own precision."""
        return self._matrix.times(vectors) if self._copy is None else self._copy.times(vectors)

    def refined(self, pairs: Pairs) -> Pairs:
        """Where float32 products made the basis, by Rayleigh–Ritz with G itself."""
        if self._copy is None:
            return pairs
        _, vectors, _ = pairs
        images = self._matrix.times(vectors)
        values, mix = np.linalg.eigh(images @ vectors.T)
        vectors = mix.T @ vectors
        norms = np.empty(len(values))
        for start in range(0, len(values), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            norms[part] = np.linalg.norm(mix[:, part].T @ images - values[part, None] * vectors[part], axis=1)
        return values[::-1], vectors[::-1], norms[::-1]

    def prove_none_above(self, low: float, c: float, values: Doubles, vectors: Doubles) -> None:
        """Hold that no other eigenvalue of G lies above `low`, by a factor of G − Σ θ·v·vᵀ shifted by the lower c.

        Raises:
            UnresolvedError: there may be one.
        """
        what = (c, values, vectors, self._seen)
        # In float32 where its error, which is measured, will be well below what is allowed.
        if self._copy is not None and low - c > COARSE * c and c + self._copy.none_above(*what) <= low:
            return
        if not c + self._matrix.none_above(*what) <= low:
            raise UnresolvedError(f"not all values above {low:.3g} were found")
