"""Spikes taken down: a few values so large that float32 sums over the delta lose its median in their rounding.

With V the right singular vectors of those values, Δ' = Δ(I − Vᵀ(I − F)V) has the singular vectors of Δ and all its
other values; the spikes' are multiplied by the diagonal F. Its Gram matrix is summed anew, in float32 again: half of
what float64 would take. V need not be exact: its residuals R = GV − ΘV move no other eigenvalue by more than Σ‖rᵢ‖²/θᵢ,
which is measured with ΔᵀΔ in float64 and held to be next to nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streamrepair.decompose import lapack
from streamrepair.decompose.arithmetic import Gram, Products
from streamrepair.decompose.convert import Real, RealType
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.operator import Panel
from streamrepair.decompose.truncation import UnresolvedError
from streamrepair.decompose.windows import rayleigh_ritz

Doubles = NDArray[np.float64]
Singles = NDArray[np.float32]

_LEVEL = 1000.0
"""In units of the mean of the others: what lies above it is a spike."""
_TOO_LARGE = 12_000.0
"""Likewise, of the largest: from about here on float32 as it is costs more, if it does not fail."""
_LEANING = 100.0
"""n·‖G‖_F²/trace², from which a look for such values is worth its products."""
_WIDTHS = (8, 48)
"""Vectors of the look, and of a second one where the first holds nothing but spikes."""
_CROWDED = 1e-3
"""Smallest of the values seen, in units of the largest, above which it may be a spike too."""
_CLEAR = 4.0
"""What is left of a spike lies above τ² by this factor at least."""
_MOVED = 4e-6
"""What the others may be moved by, in units of the median eigenvalue."""
_TRIES = 2
_SEED = 0x7A3E


@dataclass(frozen=True, slots=True)
class Spikes:
    """Eigenpairs of G that stand out."""

    rows: Doubles
    """(j, n) vectors, in ascending order of their values."""
    mean: float
    """Of the other eigenvalues."""
    following: float
    """The largest of those."""


@dataclass(frozen=True, slots=True)
class Taming:
    """Values to be taken down, their vectors, and to what."""

    values: Doubles
    """(j,) eigenvalues of ΔᵀΔ, ascending."""
    rows: Singles
    """(j, n) V."""
    factors: Doubles
    """(j,) of their singular values."""
    moved: float
    """How far other eigenvalues may be off by it."""


def spikes(gram: Gram, matrix: Doubles) -> Spikes | None:
    """What stands out so far that float32 will fail; None if nothing does.

    Args:
        matrix: G, C upper triangle.
    """
    n, mean_square = gram.images.shape[1], np.square(gram.images).sum() / len(gram.images)  # ‖G‖_F² (Hutchinson)
    if not n * mean_square > _LEANING * gram.trace * gram.trace:
        return None
    rng = np.random.Generator(np.random.SFC64(_SEED))
    for width in _WIDTHS:
        if n < 4 * width:
            return None
        rows: Doubles = rng.standard_normal((width, n))
        for _ in range(2):  # the others' part falls to a thousandth with each
            rows = lapack.times_symmetric(matrix, np.ascontiguousarray(np.linalg.qr(rows.T)[0].T))
        values, vectors, _ = rayleigh_ritz(lambda frame: _by(matrix, frame), rows)
        if values[0] > _CROWDED * values[-1]:
            continue  # there may be more, which the mean would not be without
        mean = (gram.trace - float(values.sum())) / n
        count = int(np.count_nonzero(values > _LEVEL * mean))
        if not (mean > 0.0 and values[-1] > _TOO_LARGE * mean):
            return None
        if count < width:  # one that is none: none was left out for want of room
            return Spikes(vectors[-count:], mean, float(values[-count - 1]))
    return None


def _by(matrix: Doubles, rows: Doubles) -> tuple[Doubles, Doubles]:
    images = lapack.times_symmetric(matrix, rows)
    return images, images @ rows.T


def taming(products: Products, what: Spikes, cut: float) -> Taming:
    """How spikes are taken down.

    Args:
        products: images under ΔᵀΔ, in float64. cut: τ², or a little more.

    Raises:
        UnresolvedError: the vectors are too far off, or the threshold is too near.
    """
    directions = what.rows
    for _ in range(_TRIES):
        values, vectors, residuals = rayleigh_ritz(products, directions)
        rows = vectors.astype(np.float32)
        # To be rounded moves them too.
        off = np.square(residuals).sum(axis=1) / values + np.square(rows - vectors).sum(axis=1) * values
        moved = float(off.sum())
        if moved <= _MOVED * what.mean:
            break
        directions = residuals + values[:, None] * vectors  # their images: a step of subspace iteration
    if not moved <= _MOVED * what.mean:
        raise UnresolvedError(f"taking down {len(values)} spikes would move others by {moved / what.mean:.1e}")
    base = 1.5 * max(_CLEAR * cut, what.following)
    # Apart from each other: vectors of values in a cluster are hard to tell.
    targets = base * np.linspace(1.0, 2.0, len(values))
    if not (targets < values).all():
        raise UnresolvedError(f"{len(values)} spikes lie too near the threshold to be taken down")
    return Taming(values, rows, np.sqrt(targets / values), moved)


def with_spikes(vectors: Real, rows: Singles) -> Real:
    """(k, n) kept vectors of Δ', ascending, with V in place of the last ones.

    Those have V's error divided by F.
    """
    others = vectors[: len(vectors) - len(rows)]
    others -= (others @ rows.T) @ rows
    vectors[len(others) :] = rows
    return vectors


class TamedArithmetic(HostArithmetic):
    """The CPU's arithmetic on Δ' in place of Δ.

    Args:
        plain: that of Δ, whose working memory it takes over.
    """

    def __init__(self, plain: HostArithmetic, how: Taming) -> None:
        super().__init__(plain.scratch, plain.both)
        self._rows = how.rows
        self._less: Singles = (how.rows * (how.factors - 1.0)[:, None]).astype(np.float32)

    def _delta(self, block: Panel, real: RealType) -> Real:
        delta = super()._delta(block, real)
        rows: Real = self._rows.astype(real, copy=False)
        less: Real = self._less.astype(real, copy=False)
        coefficients: Real = delta @ rows.T
        if block.wide:
            lapack.add_product(less.T, coefficients.T, delta.T)
        else:
            lapack.add_product(coefficients, less, delta)
        return delta
