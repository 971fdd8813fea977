"""The top of a large symmetric matrix's spectrum, grown until it is all there, and the density of the rest.

Source: Halko, Martinsson & Tropp 2011; Musco & Musco 2015; Parlett, The Symmetric Eigenvalue Problem, sections 10.1 and
11.5.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streamrepair.decompose import certify
from streamrepair.decompose.krylov import BlockLanczos, Density, Guess, Ritz
from streamrepair.decompose.single_copy import COARSE, SingleCopy
from streamrepair.decompose.symmetric import Seen, SymmetricPair
from streamrepair.decompose.truncation import UnresolvedError, refuse_mixing
from streamrepair.spectral import marchenko_pastur
from streamrepair.spectral.noise import sigma_from_median
from streamrepair.spectral.threshold import HardThreshold, aspect_ratio, tau

Doubles = NDArray[np.float64]

CAPACITY_SHARE = 6
"""The basis holds at most n / this many vectors; what needs more is cheaper by the reduction."""
BLOCK = 16
LOOK_AT = 6
"""Steps after which the number of values to keep is estimated for the first time."""
_LOOKS = 160
"""Vectors of the basis for every step between two looks at its Ritz pairs."""
_ROUGHLY = 1.15
"""By which the first look may count too many; over 248 spectra of every kind it was 1.1, and mostly too few."""
_ROTATION = 3e-6
"""‖Δ*′ − Δ*‖/‖Δ*‖ up to which the basis is extended."""
_DENSITY_STEPS = 12
_WHITE = 0.01
"""Of the second moment, relative: so far from the Marchenko–Pastur law the median is still met to a few places."""
_SHARPENING = 3
_AT_ONCE = 64
_SEED = 0xB10C


class Search:
    """What is known of the spectrum of G so far.

    Args:
        matrix: G. seen: G on probes. single: whether G is no more precise than float32, so that products with a float32
            copy may span the basis. rule: for τ. shape: of the delta.
        bound: ‖G − ΔᵀΔ‖₂. most_kept: share of the rank above which it hands over.
    """

    def __init__(
        self,
        matrix: SymmetricPair,
        seen: Seen,
        *,
        single: bool,
        rule: HardThreshold,
        shape: tuple[int, int],
        bound: float,
        most_kept: float,
    ) -> None:
        n = matrix.size
        self._copy = SingleCopy(matrix) if single else None
        if self._copy is None:
            matrix.fill()
        self._apply = matrix.times if self._copy is None else self._copy.times
        self.matrix, self.shape, self.rule, self.bound = matrix, shape, rule, bound
        self._seen, self._most_kept = seen, most_kept
        self.place = (n - 1) // 2
        capacity = max(n // CAPACITY_SHARE, (LOOK_AT + 2) * BLOCK)
        self.lanczos = BlockLanczos(self._apply, n, block=BLOCK, capacity=capacity, seed=_SEED)
        self.ritz: Ritz

    def cut(self, median: float) -> float:
        """τ² for a median eigenvalue."""
        beta = aspect_ratio(*self.shape)
        root = tau(sigma_from_median(max(median, 0.0) ** 0.5, beta), beta, scale=self.rule.scale)
        return root * root  # infinite rather than an OverflowError

    def look(self) -> float:
        """A first estimate of τ², from the first few steps."""
        n = self.matrix.size
        while self.lanczos.size < LOOK_AT * BLOCK:
            self.lanczos.extend()
        self.ritz = self.lanczos.ritz()
        self.bound += certify.solver_bound(float(self.ritz.values[0]), n)
        cut = self.cut(Density.of(self.ritz, n).at(self.place))
        self.refuse_many(float(self.ritz.weights[self.ritz.values > cut].sum()) / BLOCK * n / _ROUGHLY)
        return cut

    def settle(self, cut: float, *, steps: int | None = None) -> bool:
        """Extend the basis until every Ritz value above `cut` is an eigenvalue, with its vector.

        Returns:
            Whether that is so; it need not be after `steps` steps.

        Raises:
            UnresolvedError: too many are, or there is no room for them.
        """
        most = np.inf if steps is None else self.lanczos.size + steps * BLOCK
        while True:
            above = int(np.count_nonzero(self.ritz.values > cut))
            self.refuse_many(above)
            # As if the threshold were a little lower: its exact value may not be known yet.
            rest = max(0.9 * cut, float(self.ritz.values[min(above, self.lanczos.size - 1)]))
            if above < self.lanczos.size and _rotation(self.ritz.values, self.ritz.residuals, above, rest) <= _ROTATION:
                return True
            if self.lanczos.full:
                raise UnresolvedError(f"the kept vectors did not converge in {self.lanczos.size} Krylov vectors")
            if self.lanczos.size >= most:
                return False
            # The Ritz pairs of a large basis cost more than a step.
            for _ in range(max(1, self.lanczos.size // _LOOKS)):
                if not self.lanczos.full:
                    self.lanczos.extend()
            self.ritz = self.lanczos.ritz()

    def as_noise(self) -> Guess | None:
        """The median if what has not converged is white noise, as its first two moments tell; None if it is not."""
        apart, beta = self._converged, aspect_ratio(*self.shape)
        left, top = self.matrix.size - apart, self.ritz.values[:apart]
        first, second = self.matrix.moments()
        first, second = (first - float(top.sum())) / left, (second - float(top @ top)) / left
        if not (first > 0.0 and abs(second / (first * first) - (1.0 + beta)) <= _WHITE * (1.0 + beta)):
            return None
        at = marchenko_pastur.median(beta)
        for _ in range(2):  # of all eigenvalues it is the median, of those that are left one a little above
            beyond = (self.place + 0.5) / left - float(marchenko_pastur.cdf(at, beta))
            at += beyond / float(marchenko_pastur.pdf(at, beta))
        return Guess(first * at, left * float(marchenko_pastur.pdf(at, beta)) / first)

    @property
    def _converged(self) -> int:
        """How many of the largest Ritz values are eigenvalues."""
        return int(np.argmax(self.ritz.residuals > 1e-4 * self.ritz.values))

    def density(self) -> Density:
        """The distribution of what has not converged, from a block of its own."""
        n, apart = self.matrix.size, self._converged
        known = self.lanczos.vectors(self.ritz.coefficients[:, :apart])
        rest = BlockLanczos(
            self._apply, n, block=BLOCK, capacity=(_DENSITY_STEPS + 1) * BLOCK, seed=_SEED + 1, without=known
        )
        for _ in range(_DENSITY_STEPS):
            rest.extend()
        return Density.of(rest.ritz(), n - apart)

    def refuse_many(self, expected: float) -> None:
        """Hand over where more values are kept than may be.

        Raises:
            UnresolvedError: they are too many.
        """
        if expected > self._most_kept * self.matrix.size:
            part = expected / self.matrix.size
            raise UnresolvedError(f"about {part:.0%} of the values would be kept: the reduction is quicker")

    def _sharpen(self, cut: float) -> None:
        """A few more steps for the largest value below, which the report tells of."""
        for _ in range(_SHARPENING):
            count = int(np.count_nonzero(self.ritz.values > cut))
            if (
                count >= len(self.ritz.values)
                or self.ritz.residuals[count] <= 0.01 * self.ritz.values[count]
                or self.lanczos.full
            ):
                return
            self.lanczos.extend()
            self.ritz = self.lanczos.ritz()

    def proven(self, low: float, high: float) -> tuple[Doubles, Doubles, float, int]:
        """All eigenvalues of G above `low`, ascending, their vectors as rows, and the proof that there are no more.

        Returns:
            Values, vectors, the largest Ritz value below, and how many values lie between `low` and `high`.

        Raises:
            UnresolvedError: there may be others.
        """
        self._sharpen(low)
        found, vectors, residuals = self._top(low)
        count = int(np.count_nonzero(found > low))
        if not (low > 0.0 and count < len(found)):
            raise UnresolvedError(f"the squared threshold is known to {self.bound:.1e} only")
        following = float(found[count])
        ceiling = low - 1e-3 * (low - following)
        rest = min(ceiling, max(following + float(residuals[count]), 0.5 * low))
        refuse_mixing(_rotation(found, residuals + 0.5 * self.bound, count, rest))
        values, vectors = found[:count][::-1], vectors[:count][::-1]
        self._prove_none_above(low, ceiling, values, vectors)
        return values, vectors, following, int(np.count_nonzero(values < high))

    def _prove_none_above(self, low: float, c: float, values: Doubles, vectors: Doubles) -> None:
        """Hold that no other eigenvalue of G lies above `low`, by a factor of G − Σ θ·v·vᵀ shifted by the lower c.

        Raises:
            UnresolvedError: there may be one.
        """
        what = (c, values, vectors, self._seen)
        # In float32 where its error, which is measured, will be well below what is allowed.
        if self._copy is not None and low - c > COARSE * c and c + self._copy.none_above(*what) <= low:
            return
        if not c + self.matrix.none_above(*what) <= low:
            raise UnresolvedError(f"not all values above {low:.3g} were found")

    def _top(self, low: float) -> tuple[Doubles, Doubles, Doubles]:
        """Eigenpairs of G above `low` and the next one, descending: values, vectors as rows, norms of the residuals.

        Where float32 products made the basis, by Rayleigh–Ritz with G itself.
        """
        ritz, wanted = self.ritz, int(np.count_nonzero(self.ritz.values > low)) + 1
        vectors = self.lanczos.vectors(ritz.coefficients[:, :wanted])
        if self._copy is None:
            return ritz.values[:wanted], vectors, ritz.residuals[:wanted]
        images = self.matrix.times(vectors)
        values, mix = np.linalg.eigh(images @ vectors.T)
        vectors = mix.T @ vectors
        norms = np.empty(len(values))
        for start in range(0, len(values), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            norms[part] = np.linalg.norm(mix[:, part].T @ images - values[part, None] * vectors[part], axis=1)
        return values[::-1], vectors[::-1], norms[::-1]


def _rotation(values: Doubles, residuals: Doubles, count: int, rest: float) -> float:
    """‖Δ*′ − Δ*‖/‖Δ*‖ to first order, if the other eigenvalues lie below `rest` (Davis & Kahan 1970).

    Args:
        values: descending. residuals: what each vector's image may be off by; an error of G of norm ‖E‖₂ that is spread
            over the matrix moves a vector by half of it. count: of values that are kept.
    """
    values, residuals = values[:count], residuals[:count]
    gaps = values - rest
    if count == 0 or gaps.min() <= 0.0:
        return np.inf if count else 0.0
    return float(np.sqrt(np.sum(np.square(residuals / gaps) * (values + rest)) / values.sum()))
