"""Few values kept: the top of the spectrum by block Krylov, the median by its place in the order, and a proof of both.

For large matrices of which a few percent lie above the noise a reduction to tridiagonal form does too much: it finds
all values to use one of them and a few more. Here, on the Gram matrix G,

1. block Lanczos finds the top of the spectrum and, from its start block, a first guess of the median;
2. an inertia count and shift-and-invert make the median exact (`order_statistic`) – or, if an interval will do
   (`estimate="fast"`), this is left out and the interval is stated;
3. at least k: k Ritz values lie above τ² (Cauchy's interlacing); at most k: τ²·I − (G − VΘVᵀ) has a Cholesky factor
   (Weyl). Together they prove the kept rank without assuming a gap.

It gives up early, at little cost, where many values are kept: `gram` then goes on from the same G.

Source: Halko, Martinsson & Tropp 2011; Musco & Musco 2015; Parlett, sections 3.3, 10.1, 11.5.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streamrepair.decompose import certify
from streamrepair.decompose.arithmetic import Gram, Precision, Products
from streamrepair.decompose.choose import MOST_KEPT, Estimate
from streamrepair.decompose.krylov import BlockLanczos, Density, Ritz
from streamrepair.decompose.operator import PanelSource
from streamrepair.decompose.order_statistic import Located, locate
from streamrepair.decompose.symmetric import SymmetricPair
from streamrepair.decompose.truncation import MOST_MIXING, Truncation, UnresolvedError, roots
from streamrepair.decompose.windows import rayleigh_ritz
from streamrepair.spectral.noise import sigma_from_median
from streamrepair.spectral.threshold import HardThreshold, aspect_ratio, tau

Doubles = NDArray[np.float64]

CAPACITY_SHARE = 6
"""The basis holds at most n / this many vectors; what needs more is cheaper by the reduction."""
_BLOCK = 16
_LOOK_AT = 6
"""Steps after which the number of values to keep is estimated for the first time."""
_SOON = 8
"""Steps in which the top has converged if there is a gap below it."""
_LOOKS = 160
"""Vectors of the basis for every step between two looks at its Ritz pairs."""
_ROUGHLY = 0.1
"""Share of the rank above which the first look is believed, which may be twice too high."""
_ROTATION = 3e-6
"""‖Δ*′ − Δ*‖/‖Δ*‖ up to which the basis is extended."""
_BLUNTEST = 1e-2
"""Error of G, in units of the median eigenvalue, past which nothing is tried."""
_SHARP = 2e-5
"""Error of the median eigenvalue, relative, that is promised: half of it is what τ may be off by."""
_RESIDUAL = 1e-5
"""‖(VG − ΛV)X‖/(λ_max·‖X‖); what it allows in Δ* is bounded by the rotation."""
_DEVIATIONS = 4.0
"""Standard errors on either side of a fast estimate's median."""
_DENSITY_STEPS = 12
_SHARPENING = 3
_SEED = 0xB10C


def truncate(
    source: PanelSource,
    rule: HardThreshold,
    *,
    gram: Gram,
    probes: Doubles,
    precision: Precision,
    estimate: Estimate = "exact",
    most_kept: float = MOST_KEPT,
    products: Products | None = None,
) -> Truncation:
    """Decide and factor one delta, given its Gram matrix.

    Args:
        gram: in host memory.
        products: images under ΔᵀΔ itself, in float64, should G be too blunt for the median.
        probes: (p, n) that entered no computation.
        precision: of the products that G was summed from.
        most_kept: share of the rank above which it hands over.

    Raises:
        UnresolvedError: another method is cheaper or is needed; G is as it was.
        NumericalError: LAPACK failed, or its answer did not pass the checks; likewise.
    """
    assert gram.matrix is not None
    if rule.sigma != "median":
        raise UnresolvedError("this estimator needs all values")
    matrix = SymmetricPair(gram.matrix)
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it passes no check
            bound = certify.spectral_bound(gram.images - gram.exact_images)
            search = _Search(matrix, rule, (source.rows, source.cols), bound, most_kept)
            return _decided(search, gram, probes, (precision, estimate, products))
    finally:
        matrix.restore()


def _decided(
    search: _Search, gram: Gram, probes: Doubles, how: tuple[Precision, Estimate, Products | None]
) -> Truncation:
    precision, estimate, products = how
    # The first estimate is a rough one: what is settled at first lies clear of the noise.
    rough = 1.2 * search.look()
    if not search.settle(rough, steps=_SOON):
        density = search.density()  # a better one of how many are kept, before more is spent on them
        search.refuse_many(search.matrix.size - density.position(search.cut(density.at(search.place))))
        search.settle(rough)
    density = search.density()
    guess = density.at(search.place)
    if not search.bound <= _BLUNTEST * guess:
        raise UnresolvedError(f"bound {search.bound:.1e} against a median eigenvalue of about {guess:.1e}")
    search.settle(search.cut(guess))
    fast = estimate == "fast" and density.continuous(search.place)
    median = search.estimated(density) if fast else search.exact_median(density, probes, products)
    off = median.bound + (search.bound if fast else 0.0)
    low, high = search.cut(median.value - off), search.cut(median.value + off)
    search.settle(low)
    values, vectors, following, within = search.proven(low - search.bound, high + search.bound, probes)
    if within and not fast:
        raise UnresolvedError(f"{within} values within {high - low:.1e} of the squared threshold")
    threshold = search.rule.from_median(median.value**0.5, roots(np.append(following, values)), *search.shape)
    kept = slice(len(values) - threshold.rank_kept, None)
    defect, residual = certify.check_vectors(
        vectors[kept], values[kept], probes, gram.images, orthonormal=certify.ORTHONORMALITY, belonging=_RESIDUAL
    )
    return Truncation(
        values=roots(values[kept]),
        threshold=threshold,
        vh=np.ascontiguousarray(vectors[kept]),
        frob_delta_in=gram.trace**0.5,
        backend=f"randomized-{precision}",
        certificate=certify.Certificate(median.bound + search.bound, defect, residual),
        interval=((max(0.0, low - search.bound)) ** 0.5, (high + search.bound) ** 0.5) if fast else None,
        within=within,
    )


class _Search:
    """The Krylov side: what is known of the spectrum so far."""

    def __init__(
        self, matrix: SymmetricPair, rule: HardThreshold, shape: tuple[int, int], bound: float, most_kept: float
    ) -> None:
        n = matrix.size
        self.matrix, self.shape, self.rule, self.bound, self.most_kept = matrix, shape, rule, bound, most_kept
        self.place = (n - 1) // 2
        capacity = max(n // CAPACITY_SHARE, (_LOOK_AT + 2) * _BLOCK)
        self.lanczos = BlockLanczos(matrix.times, n, block=_BLOCK, capacity=capacity, seed=_SEED)
        self.ritz: Ritz

    def cut(self, median: float) -> float:
        """τ² for a median eigenvalue."""
        beta = aspect_ratio(*self.shape)
        root = tau(sigma_from_median(max(median, 0.0) ** 0.5, beta), beta, scale=self.rule.scale)
        return root * root  # infinite rather than an OverflowError

    def look(self) -> float:
        """A first estimate of τ², from the first few steps."""
        n = self.matrix.size
        while self.lanczos.size < _LOOK_AT * _BLOCK:
            self.lanczos.extend()
        self.ritz = self.lanczos.ritz()
        self.bound += certify.solver_bound(float(self.ritz.values[0]), n)
        cut = self.cut(Density.of(self.ritz, n).at(self.place))
        self.refuse_many(float(self.ritz.weights[self.ritz.values > cut].sum()) / _BLOCK * n, _ROUGHLY)
        return cut

    def settle(self, cut: float, *, steps: int | None = None) -> bool:
        """Extend the basis until every Ritz value above `cut` is an eigenvalue, with its vector.

        Returns:
            Whether that is so; it need not be after `steps` steps.

        Raises:
            UnresolvedError: too many are, or there is no room for them.
        """
        most = np.inf if steps is None else self.lanczos.size + steps * _BLOCK
        while True:
            above = int(np.count_nonzero(self.ritz.values > cut))
            self.refuse_many(above)
            # As if the threshold were a little lower: its exact value may not be known yet.
            rest = max(0.9 * cut, float(self.ritz.values[min(above, self.lanczos.size - 1)]))
            if above < self.lanczos.size and self.rotation(above, rest) <= _ROTATION:
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

    def density(self) -> Density:
        """The distribution of what has not converged, from a block of its own."""
        n, apart = self.matrix.size, int(np.argmax(self.ritz.residuals > 1e-4 * self.ritz.values))
        known = self.lanczos.vectors(self.ritz.coefficients[:, :apart])
        rest = BlockLanczos(
            self.matrix.times, n, block=_BLOCK, capacity=(_DENSITY_STEPS + 1) * _BLOCK, seed=_SEED + 1, without=known
        )
        for _ in range(_DENSITY_STEPS):
            rest.extend()
        return Density.of(rest.ritz(), n - apart)

    def refuse_many(self, expected: float, share: float = 0.0) -> None:
        """Hand over where so many values are kept: more than may be, or than `share` of the rank if that is more.

        Raises:
            UnresolvedError: they are too many.
        """
        if expected > max(share, self.most_kept) * self.matrix.size:
            part = expected / self.matrix.size
            raise UnresolvedError(f"about {part:.0%} of the values would be kept: the reduction is quicker")

    def rotation(self, count: int, rest: float, error: float = 0.0) -> float:
        """‖Δ*′ − Δ*‖/‖Δ*‖ to first order, if the other eigenvalues lie below `rest` (Davis & Kahan 1970).

        `error` is what each vector's image may be off by, beside its residual: an error of norm ‖E‖₂ that is spread
        over a matrix moves a vector by half of it.
        """
        values, residuals = self.ritz.values[:count], self.ritz.residuals[:count] + error
        gaps = values - rest
        if count == 0 or gaps.min() <= 0.0:
            return np.inf if count else 0.0
        return float(np.sqrt(np.sum(np.square(residuals / gaps) * (values + rest)) / values.sum()))

    def estimated(self, density: Density) -> Located:
        """λ_med as the start block saw it, with half of its confidence interval as bound."""
        median = density.at(self.place)
        spread = _DEVIATIONS * density.spread(median) + 0.002 * self.matrix.size  # the quadrature's own error
        low, high = density.at(self.place - spread), density.at(self.place + spread)
        return Located(median, max(high - median, median - low))

    def exact_median(self, density: Density, probes: Doubles, products: Products | None) -> Located:
        """λ_med by counting; where G's own error is more than is promised of it, by ΔᵀΔ around that place.

        Raises:
            UnresolvedError: it is not known sharply enough.
        """
        guess = density.at(self.place)
        found = locate(
            self.matrix,
            self.place,
            guess,
            density.slope(guess),
            tolerance=1e-6 * guess,
            probes=probes,
            around=self.bound > _SHARP * guess,
        )
        if self.bound > _SHARP * found.value:
            if products is None:
                raise UnresolvedError(f"the median eigenvalue is known to {self.bound / found.value:.1e} only")
            return self._against_delta(found, products)
        return Located(found.value, found.bound + self.bound)

    def _against_delta(self, found: Located, products: Products) -> Located:
        """Rayleigh–Ritz with ΔᵀΔ in the span of consecutive eigenvectors of G around the median.

        By Weyl no eigenvalue moves by more than G's error between the two, so that none enters or leaves the middle of
        the span, and the place within it is the same. A value is right to its residual squared over the distance to
        the ends of the span.
        """
        assert found.around is not None
        values, _, residuals = rayleigh_ritz(products, found.around)
        value = float(values[found.index])
        gap = min(value - float(values[0]), float(values[-1]) - value) - self.bound
        norms = np.linalg.norm(residuals, axis=1)
        own, others = float(norms[found.index]), np.delete(norms, found.index)
        # Second order in the coupling with what lies outside, and what of it comes by way of the other vectors.
        coupled = own * others / gap if gap > 0.0 else np.full(len(others), np.inf)
        by_others = np.square(coupled) / np.abs(np.delete(values, found.index) - value)
        off = 2.0 * (own * own / gap + float(by_others.sum())) if gap > 0.0 else np.inf
        if not off <= _SHARP * value:
            raise UnresolvedError(f"the median eigenvalue is known to {off / value:.1e} only")
        return Located(value, off + found.bound)

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

    def proven(self, low: float, high: float, probes: Doubles) -> tuple[Doubles, Doubles, float, int]:
        """All eigenvalues of G above `low`, ascending, their vectors as rows, and the proof that there are no more.

        Returns:
            Values, vectors, the largest Ritz value below, and how many values lie between `low` and `high`.

        Raises:
            UnresolvedError: there may be others.
        """
        self._sharpen(low)
        ritz, count = self.ritz, int(np.count_nonzero(self.ritz.values > low))
        if not (low > 0.0 and count < len(ritz.values)):
            raise UnresolvedError(f"the squared threshold is known to {self.bound:.1e} only")
        following = float(ritz.values[count])
        ceiling = low - 1e-3 * (low - following)
        rest = min(ceiling, max(following + float(ritz.residuals[count]), 0.5 * low))
        turned = self.rotation(count, rest, error=0.5 * self.bound)
        if turned > MOST_MIXING:
            raise UnresolvedError(f"kept and dropped vectors may mix by {turned:.1e}")
        vectors = self.lanczos.vectors(ritz.coefficients[:, :count][:, ::-1])
        values = ritz.values[:count][::-1]
        error = self.matrix.none_above(ceiling, values, vectors, probes, allowed=low - ceiling)
        if error is None or not ceiling + error <= low:
            raise UnresolvedError(f"not all values above {low:.3g} were found")
        return values, vectors, following, int(np.count_nonzero(values < high))
