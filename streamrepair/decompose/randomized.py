"""Few values kept: the top of the spectrum by block Krylov, the median by its place in the order, and a proof of both.

For large matrices of which a few percent lie above the noise a reduction to tridiagonal form does too much: it finds
all values to use one of them and a few more. Here, on the Gram matrix G,

1. block Lanczos finds the top of the spectrum; a first guess of the median comes from the moments of the rest if they
   are white noise's, else from a start block of its own (`krylov_search`);
2. an inertia count and shift-and-invert make the median exact (`order_statistic`) – or, if an interval will do
   (`estimate="fast"`), this is left out and the interval is stated;
3. at least k: k Ritz values lie above τ² (Cauchy's interlacing); at most k: c·I − (G − VᵀΘV), c just below τ²,
   has a Cholesky factor (Weyl). Together they prove the kept rank without assuming a gap.

It gives up early, at little cost, where many values are kept: `gram` then goes on from the same G.

Source: Parlett, The Symmetric Eigenvalue Problem, sections 3.3, 10.1, 11.5.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streamrepair.decompose import certify
from streamrepair.decompose.arithmetic import Gram, Precision, Products
from streamrepair.decompose.choose import MOST_KEPT, Estimate
from streamrepair.decompose.krylov import Density, Guess
from streamrepair.decompose.krylov_search import Search
from streamrepair.decompose.operator import PanelSource
from streamrepair.decompose.order_statistic import Located, locate
from streamrepair.decompose.symmetric import Seen, SymmetricPair
from streamrepair.decompose.truncation import LEAST_FLOAT32_VALUE, Truncation, UnresolvedError, roots
from streamrepair.decompose.windows import rayleigh_ritz
from streamrepair.spectral.threshold import HardThreshold

Doubles = NDArray[np.float64]

_SOON = 8
"""Steps in which the top has converged if there is a gap below it."""
_BLUNTEST = 1e-2
"""Error of G, in units of the median eigenvalue, past which nothing is tried."""
_SHARP = 2e-5
"""Error of the median eigenvalue, relative, that is promised: half of it is what τ may be off by."""
_RESIDUAL = 1e-5
"""‖(VG − ΛV)X‖/(λ_max·‖X‖); what it allows in Δ* is bounded by the rotation."""
_DEVIATIONS = 4.0
"""Standard errors on either side of a fast estimate's median."""


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
            search = Search(
                matrix,
                Seen(probes, gram.images),
                single=precision == "float32",
                rule=rule,
                shape=(source.rows, source.cols),
                bound=bound,
                most_kept=most_kept,
            )
            return _decided(search, gram, probes, (precision, estimate, products))
    finally:
        matrix.restore()


def _decided(
    search: Search, gram: Gram, probes: Doubles, how: tuple[Precision, Estimate, Products | None]
) -> Truncation:
    precision, estimate, products = how
    # The first estimate is a rough one: what is settled at first lies clear of the noise.
    rough = 1.2 * search.look()
    if not search.settle(rough, steps=_SOON):
        better = search.density()  # of how many are kept, before more is spent on them
        search.refuse_many(search.matrix.size - better.position(search.cut(better.at(search.place))))
        search.settle(rough)
    density: Density | None = None
    guess = search.as_noise() if estimate == "exact" else None
    if guess is None:
        density = search.density()
        guess = density.guess(search.place)
    if precision == "float32" and guess.value < LEAST_FLOAT32_VALUE:
        raise UnresolvedError(f"a median eigenvalue of about {guess.value:.1e}")
    if not search.bound <= _BLUNTEST * guess.value:
        raise UnresolvedError(f"bound {search.bound:.1e} against a median eigenvalue of about {guess.value:.1e}")
    search.settle(search.cut(guess.value))
    if fast := estimate == "fast" and density is not None and density.continuous(search.place):
        median = _estimated(search, density)
    else:
        median = _exact_median(search, guess, probes, products)
    off = median.bound + (search.bound if fast else 0.0)
    low, high = search.cut(median.value - off), search.cut(median.value + off)
    search.settle(low)
    values, vectors, following, within = search.proven(low - search.bound, high + search.bound)
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


def _estimated(search: Search, density: Density) -> Located:
    """λ_med as the start block saw it, with half of its confidence interval as bound."""
    median = density.at(search.place)
    spread = _DEVIATIONS * density.spread(median) + 0.002 * search.matrix.size  # the quadrature's own error
    low, high = density.at(search.place - spread), density.at(search.place + spread)
    return Located(median, max(high - median, median - low))


def _exact_median(search: Search, guess: Guess, probes: Doubles, products: Products | None) -> Located:
    """λ_med by counting; where G's own error is more than is promised of it, by ΔᵀΔ around that place.

    Raises:
        UnresolvedError: it is not known sharply enough.
    """
    found = locate(
        search.matrix,
        search.place,
        guess.value,
        guess.slope,
        tolerance=1e-6 * guess.value,
        probes=probes,
        around=search.bound > _SHARP * guess.value,
    )
    if search.bound > _SHARP * found.value:
        if products is None:
            raise UnresolvedError(f"the median eigenvalue is known to {search.bound / found.value:.1e} only")
        return _against_delta(search, found, products)
    return Located(found.value, found.bound + search.bound)


def _against_delta(search: Search, found: Located, products: Products) -> Located:
    """Rayleigh–Ritz with ΔᵀΔ in the span of consecutive eigenvectors of G around the median.

    By Weyl no eigenvalue moves by more than G's error between the two, so that none enters or leaves the middle of
    the span, and the place within it is the same. A value is right to its residual squared over the distance to
    the ends of the span.
    """
    assert found.around is not None
    values, _, residuals = rayleigh_ritz(products, found.around)
    value = float(values[found.index])
    gap = min(value - float(values[0]), float(values[-1]) - value) - search.bound
    norms = np.linalg.norm(residuals, axis=1)
    own, others = float(norms[found.index]), np.delete(norms, found.index)
    # Second order in the coupling with what lies outside, and what of it comes by way of the other vectors.
    coupled = own * others / gap if gap > 0.0 else np.full(len(others), np.inf)
    by_others = np.square(coupled) / np.abs(np.delete(values, found.index) - value)
    off = 2.0 * (own * own / gap + float(by_others.sum())) if gap > 0.0 else np.inf
    if not off <= _SHARP * value:
        raise UnresolvedError(f"the median eigenvalue is known to {off / value:.1e} only")
    return Located(value, off + found.bound)
