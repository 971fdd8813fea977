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

from typing import NamedTuple

import numpy as np

from streamrepair.decompose import certify
from streamrepair.decompose.arithmetic import Gram, Precision, Products
from streamrepair.decompose.choose import MOST_KEPT, Estimate
from streamrepair.decompose.convert import Doubles
from streamrepair.decompose.gram_operator import GramOperator
from streamrepair.decompose.krylov import Density, Guess
from streamrepair.decompose.krylov_search import Search, Top, rotation
from streamrepair.decompose.operator import PanelSource
from streamrepair.decompose.order_statistic import Located, locate
from streamrepair.decompose.symmetric import Seen, SymmetricPair
from streamrepair.decompose.truncation import Truncation, UnresolvedError, refuse_estimator, refuse_mixing, roots
from streamrepair.decompose.windows import rayleigh_ritz
from streamrepair.spectral.threshold import HardThreshold

_SHARP = 2e-5
"""Error of the median eigenvalue, relative, that is promised: half of it is what τ may be off by."""
_RESIDUAL = 1e-5
"""‖(VG − ΛV)X‖/(λ_max·‖X‖); what it allows in Δ* is bounded by the rotation."""
_Exact = tuple[SymmetricPair, Doubles, Products | None]
"""What finds the exact median: G, probes that entered no computation, images under ΔᵀΔ itself."""


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
    refuse_estimator(rule)
    matrix = SymmetricPair(gram.matrix)
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it passes no check
            operator = GramOperator(matrix, Seen(probes, gram.images), single=precision == "float32")
            search = Search(
                operator,
                rule=rule,
                shape=(source.rows, source.cols),
                bound=certify.spectral_bound(gram.images - gram.exact_images),
                most_kept=most_kept,
            )
            search.begin()
            median, fast = _median(search, (matrix, probes, products), precision, estimate)
            low, high = search.around(median.value, median.bound + (search.bound if fast else 0.0))
            top = _proven(search, operator, low, gram.weight)
    finally:
        matrix.restore()
    if not fast and (within := int(np.count_nonzero(top.values < high))):
        raise UnresolvedError(f"{within} values within {high - low:.1e} of the squared threshold")
    facts = Facts(probes, gram.images, gram.trace, precision)
    return concluded(search, median, top, facts, interval=(low, high) if fast else None)


def _median(search: Search, exact: _Exact, precision: Precision, estimate: Estimate) -> tuple[Located, bool]:
    """λ_med, and whether it is an estimate only."""
    matrix, _, _ = exact
    density: Density | None = None
    guess = search.as_noise(matrix.moments()) if estimate == "exact" else None
    if guess is None:
        density = search.density()
        guess = density.guess(search.place)
    search.refuse_blunt(guess.value, precision)
    search.settle(search.cut(guess.value))
    if estimate == "fast" and density is not None and density.continuous(search.place):
        return search.estimated(density), True
    return _exact_median(search, guess, exact), False


def _proven(search: Search, operator: GramOperator, low: float, weight: float) -> Top:
    """All eigenpairs above `low`, and the proof that there are no more.

    Args:
        weight: about ‖W_ft‖_F.

    Raises:
        UnresolvedError: there may be others.
    """
    search.settle(low)
    search.sharpen(low)
    top = search.top(low)
    ceiling = low - 1e-3 * (low - top.following)
    rest = min(ceiling, max(top.following + top.following_residual, 0.5 * low))
    refuse_mixing(rotation(top.values, top.residuals + 0.5 * search.bound, rest), top.values, weight)
    operator.prove_none_above(low, ceiling, top.values, top.vectors)
    return top


class Facts(NamedTuple):
    """What is known without a spectrum."""

    probes: Doubles
    """(p, n) X."""
    images: Doubles
    """(p, n) ΔᵀΔ·X, which vectors are held against."""
    trace: float
    """‖Δ‖_F²."""
    precision: Precision


def concluded(
    search: Search, median: Located, top: Top, facts: Facts, *, interval: tuple[float, float] | None
) -> Truncation:
    """The decision from all eigenpairs above the lower end of what τ² may be.

    Args:
        interval: of τ², where the median is an estimate.

    Raises:
        NumericalError: vectors did not pass the checks.
    """
    values, vectors = top.values[::-1], top.vectors[::-1]
    threshold = search.rule.from_median(median.value**0.5, roots(np.append(top.following, values)), *search.shape)
    kept = slice(len(values) - threshold.rank_kept, None)
    certify.check_vectors(vectors[kept], values[kept], facts.probes, facts.images, belonging=_RESIDUAL)
    return Truncation(
        values=roots(values[kept]),
        threshold=threshold,
        vh=np.ascontiguousarray(vectors[kept]),
        frob_delta_in=facts.trace**0.5,
        backend=f"randomized-{facts.precision}",
        interval=(interval[0] ** 0.5, interval[1] ** 0.5) if interval else None,
        within=int(np.count_nonzero(values < interval[1])) if interval else 0,
    )


def _exact_median(search: Search, guess: Guess, exact: _Exact) -> Located:
    """λ_med by counting; where G's own error is more than is promised of it, by ΔᵀΔ around that place.

    Raises:
        UnresolvedError: it is not known sharply enough.
    """
    matrix, probes, products = exact
    found = locate(
        matrix,
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
