"""The top of a large symmetric matrix's spectrum, grown until it is all there, and the density of the rest.

Source: Halko, Martinsson & Tropp 2011; Musco & Musco 2015; Parlett, The Symmetric Eigenvalue Problem, sections 10.1 and
11.5.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from streamrepair.decompose import certify
from streamrepair.decompose.arithmetic import Precision
from streamrepair.decompose.convert import Doubles
from streamrepair.decompose.krylov import BlockLanczos, Density, Guess, Ritz
from streamrepair.decompose.order_statistic import Located
from streamrepair.decompose.truncation import LEAST_FLOAT32_VALUE, OutgrownError, UnresolvedError
from streamrepair.spectral import marchenko_pastur
from streamrepair.spectral.noise import sigma_from_median
from streamrepair.spectral.threshold import HardThreshold, aspect_ratio, tau

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
_PROOF_STEPS = 24
_PROOF_STRIDE = 4
_UNSEEN = 1e-12 / 5
"""Probability of a start block that does not see the largest value: of each look, of which there are five at most."""
_WHITE = 0.01
"""Of the second moment, relative: so far from the Marchenko–Pastur law the median is still met to a few places."""
_SHARPENING = 3
_SEED = 0xB10C
_SOON = 8
"""Steps in which the top has converged if there is a gap below it."""
_BLUNTEST = 1e-2
"""Error of the operator, in units of the median eigenvalue, past which nothing is tried."""
_DEVIATIONS = 4.0
"""Standard errors on either side of a fast estimate's median."""
_DISCRETE = 0.002
"""Of all places, that the quadrature itself may be off by."""

Pairs = tuple[Doubles, Doubles, Doubles]
"""(k,) values, descending, (k, n) vectors as rows, (k,) norms of their residuals."""


class Operator(Protocol):
    """A symmetric operator whose largest eigenvalues are sought."""

    @property
    def size(self) -> int:
        """n."""
        ...

    def times(self, vectors: Doubles) -> Doubles:
        """(k, n) images of the rows of `vectors`, precise enough to span a basis."""
        ...

    def refined(self, pairs: Pairs) -> Pairs:
        """Ritz pairs that `times` led to, by products in the precision that values are wanted in."""
        ...


class Beside(NamedTuple):
    """What a random start block saw of the complement of the largest Ritz vectors."""

    apart: int
    """How many these are."""
    largest: float
    """Its largest Ritz value."""


class Top(NamedTuple):
    """Ritz pairs above a cut, descending, and what comes next."""

    values: Doubles
    vectors: Doubles
    residuals: Doubles
    following: float
    """The next Ritz value."""
    following_residual: float


class Search:
    """What is known of the spectrum of ΔᵀΔ so far.

    Args:
        operator: ΔᵀΔ, or what stands for it. rule: for τ. shape: of the delta.
        bound: norm of what the operator is off by. most_kept: share of the rank above which it hands over.
    """

    def __init__(
        self, operator: Operator, *, rule: HardThreshold, shape: tuple[int, int], bound: float, most_kept: float
    ) -> None:
        n = operator.size
        self._operator, self._most_kept = operator, most_kept
        self.size, self.shape, self.rule, self.bound = n, shape, rule, bound
        self.place = (n - 1) // 2
        capacity = max(n // CAPACITY_SHARE, (LOOK_AT + 2) * BLOCK)
        self.lanczos = BlockLanczos(operator.times, n, block=BLOCK, capacity=capacity, seed=_SEED)
        self.ritz: Ritz
        self._beside: Beside | None = None

    def cut(self, median: float) -> float:
        """τ² for a median eigenvalue."""
        beta = aspect_ratio(*self.shape)
        root = tau(sigma_from_median(max(median, 0.0) ** 0.5, beta), beta, scale=self.rule.scale)
        return root * root  # infinite rather than an OverflowError

    def begin(self) -> None:
        """Find what clearly belongs to the top.

        Raises:
            OutgrownError: too many values would be kept, or there is no room for them.
        """
        # The first estimate is a rough one: what is settled at first lies clear of the noise.
        rough = 1.2 * self.look()
        if not self.settle(rough, steps=_SOON):
            # Of how many are kept, before more is spent on them. The median comes from a later one: by then more has
            # converged and is set apart, which makes it another estimate.
            better = self.density()
            self.refuse_many(self.size - better.position(self.cut(better.at(self.place))))
            self.settle(rough)

    def refuse_blunt(self, median: float, precision: Precision) -> None:
        """Hold that the operator is sharp enough for a median eigenvalue of about this.

        Raises:
            UnresolvedError: it is not.
        """
        if precision == "float32" and median < LEAST_FLOAT32_VALUE:
            raise UnresolvedError(f"a median eigenvalue of about {median:.1e}")
        if not self.bound <= _BLUNTEST * median:
            raise UnresolvedError(f"bound {self.bound:.1e} against a median eigenvalue of about {median:.1e}")

    def estimated(self, density: Density) -> Located:
        """λ_med as a start block saw it, with half of its confidence interval as bound."""
        median = density.at(self.place)
        spread = _DEVIATIONS * density.spread(median) + _DISCRETE * self.size
        low, high = density.at(self.place - spread), density.at(self.place + spread)
        return Located(median, max(high - median, median - low))

    def around(self, median: float, off: float) -> tuple[float, float]:
        """Between which values of the operator τ² lies, if the median eigenvalue is known to `off`.

        Raises:
            UnresolvedError: that could be anything.
        """
        low, high = self.cut(median - off) - self.bound, self.cut(median + off) + self.bound
        if not (low > 0.0 and np.isfinite(high)):
            raise UnresolvedError(f"the squared threshold lies between {low:.1e} and {high:.1e}")
        return low, high

    def look(self) -> float:
        """A first estimate of τ², from the first few steps."""
        n = self.size
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
            OutgrownError: too many are, or there is no room for them.
        """
        most = np.inf if steps is None else self.lanczos.size + steps * BLOCK
        while True:
            above = int(np.count_nonzero(self.ritz.values > cut))
            self.refuse_many(above)
            # As if the threshold were a little lower: its exact value may not be known yet.
            rest = max(0.9 * cut, float(self.ritz.values[min(above, self.lanczos.size - 1)]))
            turned = rotation(self.ritz.values[:above], self.ritz.residuals[:above], rest)
            if above < self.lanczos.size and turned <= _ROTATION:
                return True
            if self.lanczos.full:
                raise OutgrownError(f"the kept vectors did not converge in {self.lanczos.size} Krylov vectors")
            if self.lanczos.size >= most:
                return False
            # The Ritz pairs of a large basis cost more than a step.
            for _ in range(max(1, self.lanczos.size // _LOOKS)):
                if not self.lanczos.full:
                    self.lanczos.extend()
            self.ritz = self.lanczos.ritz()

    def as_noise(self, moments: tuple[float, float]) -> Guess | None:
        """The median if what has not converged is white noise, as its first two moments tell; None if it is not.

        Args:
            moments: the sums of all eigenvalues and of their squares.
        """
        apart, beta = self._converged, aspect_ratio(*self.shape)
        left, top = self.size - apart, self.ritz.values[:apart]
        first, second = moments
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
        apart = self._converged
        rest = self._complement(apart, _DENSITY_STEPS, seed=_SEED + 1)
        for _ in range(_DENSITY_STEPS):
            rest.extend()
        ritz = rest.ritz()
        self._beside = Beside(apart, float(ritz.values[0]))
        return Density.of(ritz, self.size - apart)

    def _complement(self, apart: int, steps: int, *, seed: int) -> BlockLanczos:
        """Room for so many steps from a random block on the complement of the largest Ritz vectors."""
        known = self.lanczos.vectors(self.ritz.coefficients[:, :apart])
        capacity = (steps + 1) * BLOCK
        return BlockLanczos(self._operator.times, self.size, block=BLOCK, capacity=capacity, seed=seed, without=known)

    def ceiling(self, low: float) -> tuple[float, float]:
        """A bound of all eigenvalues but those found above `low`, and the largest that was seen of these others.

        The largest eigenvalue on the complement of any k vectors is no less than λ_{k+1} (Courant & Fischer), and a
        random start block sees it (`unseen`): the bound holds but for a probability of 1e-12. The density's block will
        do where as many were set apart for it; else a block of its own, which entered nothing that led to `low`.

        Raises:
            UnresolvedError: it is above `low`, so that a value may have been missed.
        """
        count = int(np.count_nonzero(self.ritz.values > low))
        ceiling = np.inf
        if self._beside is not None and self._beside.apart == count:
            largest = self._beside.largest
            if (ceiling := self._raised(largest, _DENSITY_STEPS)) <= low:
                return ceiling, largest
        rest = self._complement(count, _PROOF_STEPS, seed=_SEED + 2)
        for step in range(1, _PROOF_STEPS + 1):
            rest.extend()
            if step < _DENSITY_STEPS or step % _PROOF_STRIDE:
                continue
            largest = float(rest.ritz().values[0])
            if (ceiling := self._raised(largest, step)) <= low:
                return ceiling, largest
        raise UnresolvedError(f"other values may lie up to {ceiling / low:.3f} times the squared threshold")

    def _raised(self, largest: float, steps: int) -> float:
        """What the largest eigenvalue is at most, by the largest Ritz value after so many steps."""
        return largest / (1.0 - unseen(self.size, steps)) + self.bound

    def refuse_many(self, expected: float) -> None:
        """Hand over where more values are kept than may be.

        Raises:
            OutgrownError: they are too many.
        """
        if expected > self._most_kept * self.size:
            part = expected / self.size
            raise OutgrownError(f"about {part:.0%} of the values would be kept: the reduction is quicker")

    def sharpen(self, cut: float) -> None:
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

    def top(self, low: float) -> Top:
        """All Ritz pairs above `low`, refined.

        Raises:
            UnresolvedError: there is none below to tell them from.
        """
        ritz, wanted = self.ritz, int(np.count_nonzero(self.ritz.values > low)) + 1
        vectors = self.lanczos.vectors(ritz.coefficients[:, :wanted])
        values, vectors, norms = self._operator.refined((ritz.values[:wanted], vectors, ritz.residuals[:wanted]))
        count = int(np.count_nonzero(values > low))
        if count == len(values):
            raise UnresolvedError(f"no value below {low:.3g} was found")
        return Top(values[:count], vectors[:count], norms[:count], float(values[count]), float(norms[count]))


def unseen(n: int, steps: int, *, block: int = BLOCK, chance: float = _UNSEEN) -> float:
    """How far below the largest eigenvalue of a positive operator its largest Ritz value may be, as a share of it.

    From one random vector it is further than ε with a probability of at most 1.648·√n·exp(−√ε·(2·steps − 1))
    (Kuczyński & Woźniakowski 1992); from a block of them only where that happens to each.
    """
    root = float(np.log(1.648 * np.sqrt(n) / chance ** (1.0 / block))) / (2 * steps - 1)
    return min(1.0 - 1e-9, root * root)


def rotation(values: Doubles, residuals: Doubles, rest: float) -> float:
    """‖Δ*′ − Δ*‖/‖Δ*‖ to first order, if the eigenvalues that are not kept lie below `rest` (Davis & Kahan 1970).

    Args:
        values: (k,) of those that are kept, descending.
        residuals: (k,) what each vector's image may be off by; an error of norm ‖E‖₂ that is spread over the operator
            moves a vector by half of it.
    """
    if len(values) == 0:
        return 0.0
    gaps = values - rest
    if not gaps.min() > 0.0:
        return np.inf
    return float(np.sqrt(np.sum(np.square(residuals / gaps) * (values + rest)) / values.sum()))
