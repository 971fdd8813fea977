"""Block Krylov with an exact median and a proven count, against a float64 SVD."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamrepair.decompose import certify, gram, ladder, lapack, randomized
from streamrepair.decompose.choose import MOST_KEPT, Estimate
from streamrepair.decompose.gram_operator import GramOperator
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.krylov import Guess
from streamrepair.decompose.krylov_search import Search
from streamrepair.decompose.symmetric import Seen, SymmetricPair
from streamrepair.decompose.truncation import Truncation, UnresolvedError
from streamrepair.spectral.threshold import HardThreshold
from tests.decompose.sources import ArraySource, from_delta, low_rank_plus_noise, with_spectrum

RULE = HardThreshold()
Doubles = NDArray[np.float64]
N = 320


def _gapped(m: int = 500, n: int = N, rank: int = 6, dtype: str = "F32") -> ArraySource:
    return from_delta(low_rank_plus_noise(m, n, rank), dtype)


def _alone(source: ArraySource, estimate: Estimate = "exact", precision: Any = "float64") -> Truncation:
    """No other rung to fall back on."""
    probes = certify.probe_vectors(source.cols)
    formed = HostArithmetic().gram(source, probes, precision)
    return randomized.truncate(
        source,
        RULE,
        gram=formed,
        probes=probes,
        precision=precision,
        estimate=estimate,
        products=partial(HostArithmetic().products, source),
    )


def _check(source: ArraySource, truncation: Truncation) -> None:
    delta = source.delta()
    u, s, vh = np.linalg.svd(delta, full_matrices=False)
    exact = RULE.estimate(s, *delta.shape)
    assert truncation.threshold.rank_kept == exact.rank_kept
    star, found = (u[:, : exact.rank_kept] * s[: exact.rank_kept]) @ vh[: exact.rank_kept], truncation.vh
    assert np.linalg.norm(delta @ found.T @ found - star) <= 1e-4 * np.linalg.norm(star)
    if truncation.interval is None:
        assert truncation.threshold.tau == pytest.approx(exact.tau, rel=1e-6)
        assert truncation.threshold.nearest_gap == pytest.approx(exact.nearest_gap, rel=0.03)
        assert truncation.frob_delta_out == pytest.approx(np.linalg.norm(star), rel=1e-6)
    else:
        low, high = truncation.interval
        assert low <= exact.tau <= high
        assert truncation.within == np.count_nonzero((s > low) & (s < high))


@pytest.mark.parametrize("estimate", ["exact", "fast"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(320, 320), (500, 320), (320, 500), (2000, 320)])
def test_a_gapped_spectrum_is_decided_as_by_a_float64_svd(
    shape: tuple[int, int], precision: str, estimate: Estimate
) -> None:
    source = _gapped(max(shape))
    truncation = _alone(source.transposed() if shape[1] > shape[0] else source, estimate, precision)
    assert truncation.backend == f"randomized-{precision}"
    assert (truncation.interval is None) == (estimate == "exact")
    _check(source, truncation)


@pytest.mark.parametrize("gap", [1e-3, 1e-4, -1e-4, -1e-3])
def test_a_value_next_to_the_threshold_falls_on_its_side(gap: float) -> None:
    """Above or below τ by so much of it: proven, or handed over; never wrong."""
    s = np.concatenate([np.linspace(0.5, 1.5, N - 4), [0.0, 6.0, 8.0, 9.0]])
    s[-4] = RULE.estimate(np.sort(s), 500, N).tau * (1.0 + gap)
    source = from_delta(with_spectrum(np.sort(s), 500), "F64")
    try:
        truncation = _alone(source)
    except UnresolvedError:
        truncation = ladder.decompose(source, RULE, arithmetic=HostArithmetic(), backend="randomized", sharp=True)
        assert truncation.climbed[0].startswith("randomized-float64: ")
    _check(source, truncation)


def test_many_kept_values_are_handed_over_early_and_g_is_left_as_it_was() -> None:
    rng = np.random.default_rng(0)
    source = from_delta(rng.standard_normal((500, N)) * (1.0 + np.arange(N) / 4.0) ** -1.0, "F64")
    probes = certify.probe_vectors(N)
    formed = HostArithmetic().gram(source, probes, "float64")
    assert formed.matrix is not None
    before = np.triu(formed.matrix).copy()
    with pytest.raises(UnresolvedError, match="would be kept"):
        randomized.truncate(source, RULE, gram=formed, probes=probes, precision="float64")
    np.testing.assert_array_equal(np.triu(formed.matrix), before)
    truncation = ladder.decompose(source, RULE, arithmetic=HostArithmetic(), backend="randomized", sharp=True)
    assert truncation.backend == "gram-float64"
    _check(source, truncation)


def test_other_estimators_are_left_to_methods_that_know_all_values() -> None:
    tail = HardThreshold(sigma="tail")
    truncation = ladder.decompose(_gapped(), tail, arithmetic=HostArithmetic(), backend="randomized")
    assert truncation.backend.startswith("gram")
    assert truncation.climbed == ("randomized-float64: this estimator needs all values",)


@given(
    seed=st.integers(0, 10_000),
    rank=st.integers(0, 12),
    strength=st.floats(1.05, 1e3),
    beta=st.sampled_from([1.0, 0.6, 0.2]),
)
@settings(max_examples=25, deadline=None)
def test_whatever_the_signal_the_ladder_that_begins_with_krylov_is_right(
    seed: int, rank: int, strength: float, beta: float
) -> None:
    rng = np.random.default_rng(seed)
    n, m = 260, round(260 / beta)
    delta = rng.standard_normal((m, n))
    for _ in range(rank):
        delta += (
            strength * (m**0.5 + n**0.5) * np.outer(rng.standard_normal(m) / m**0.5, rng.standard_normal(n) / n**0.5)
        )
    source = from_delta(delta, "F64")
    truncation = ladder.decompose(source, RULE, arithmetic=HostArithmetic(), backend="randomized", sharp=True)
    if truncation.undecidable == 0:
        _check(source, truncation)


def _one_less(original: Callable[..., Any], *arguments: Any, **knobs: Any) -> Any:
    return original(*arguments, **knobs) - 1


def _far_less(original: Callable[..., Any], *arguments: Any, **knobs: Any) -> Any:
    return original(*arguments, **knobs) - 9


def _noisy(original: Callable[..., Any], *arguments: Any, **knobs: Any) -> Any:
    result = original(*arguments, **knobs)
    return result * (1.0 + 1e-3 * np.random.default_rng(0).standard_normal(result.shape))


def _not_finite(original: Callable[..., Any], *arguments: Any, **knobs: Any) -> Any:
    return original(*arguments, **knobs) * np.nan


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("method", "fault"), [("solve", _noisy), ("solve", _not_finite), ("times", _noisy), ("times", _not_finite)]
)
def test_faulty_products_and_solutions_are_caught(
    monkeypatch: pytest.MonkeyPatch, method: str, fault: Callable[..., Any]
) -> None:
    original = getattr(SymmetricPair, method)
    monkeypatch.setattr(SymmetricPair, method, lambda *a, **k: fault(original, *a, **k))
    truncation = ladder.decompose(_gapped(), RULE, arithmetic=HostArithmetic(), backend="randomized")
    assert truncation.climbed[0].startswith("randomized-float32: ")
    assert truncation.backend == "gram-float32"
    _check(_gapped(), truncation)


@pytest.mark.usefixtures("lossy_bases")
def test_a_missed_direction_is_caught_by_the_proof() -> None:
    """A Ritz pair that is lost leaves its value in what Cholesky is to factor."""
    with pytest.raises(UnresolvedError):
        _alone(_gapped())


@pytest.mark.usefixtures("lossy_bases")
def test_cholesky_that_always_succeeds_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it left behind is not a factor: the probes tell."""
    original = lapack.cholesky

    def careless(matrix: Doubles) -> bool:
        original(matrix)
        return True

    monkeypatch.setattr(lapack, "cholesky", careless)
    with pytest.raises(UnresolvedError):
        _alone(_gapped())


def test_gram_goes_on_from_the_same_matrix() -> None:
    """One pass over the delta serves both."""
    source = _gapped()
    passes = 0

    class Counting(HostArithmetic):
        def gram(self, *arguments: Any) -> Any:
            nonlocal passes
            passes += 1
            return super().gram(*arguments)

    rng = np.random.default_rng(0)
    heavy = from_delta(rng.standard_normal((500, N)) * (1.0 + np.arange(N) / 4.0) ** -1.0, "F64")
    for each in (source, heavy):
        passes = 0
        gram.truncate(each, RULE, arithmetic=Counting(), precision="float32", krylov=MOST_KEPT)
        assert passes == 1


@pytest.mark.parametrize("largest", [100.0, 300.0, 1000.0])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_blunt_gram_matrix_moves_no_threshold(largest: float, precision: str) -> None:
    """Three huge values: the float32 sums are off by up to a tenth of the median eigenvalue."""
    s = np.r_[np.random.default_rng(0).uniform(0.5, 1.5, 297), [largest] * 3]
    source = from_delta(with_spectrum(np.sort(s), 400), "BF16")
    exact = RULE.estimate(np.linalg.svd(source.delta(), compute_uv=False), 400, 300)
    for found in (_alone_or_none(source, precision), ladder.decompose(source, RULE, arithmetic=HostArithmetic(),
                                                                       backend="randomized")):  # fmt: skip
        if found is not None:
            assert found.threshold.tau == pytest.approx(exact.tau, rel=1e-5)
            assert found.threshold.rank_kept == exact.rank_kept


def _alone_or_none(source: ArraySource, precision: str) -> Truncation | None:
    try:
        return _alone(source, "exact", precision)
    except UnresolvedError:
        return None


def test_fast_where_the_bound_exceeds_the_threshold_is_handed_over() -> None:
    delta = np.random.default_rng(1).standard_normal((300, 300))
    delta[:, :7] *= 5000
    source = from_delta(delta, "BF16")
    truncation = ladder.decompose(source, RULE, arithmetic=HostArithmetic(), backend="randomized", estimate="fast")
    _check(source, truncation)


def test_fast_does_not_guess_inside_a_gap_of_the_spectrum() -> None:
    """The median's place at a step: between the quadrature's nodes nothing is known of where the step is."""
    s = np.r_[np.full(151, 0.4), np.full(149, 1.0)] * (1 + 1e-3 * np.random.default_rng(0).standard_normal(300))
    s[-5:] = RULE.estimate(np.sort(s), 300, 300).tau * 1.003
    source = from_delta(with_spectrum(np.sort(s), 300), "F32")
    truncation = ladder.decompose(
        source, RULE, arithmetic=HostArithmetic(), backend="randomized", estimate="fast", sharp=True
    )
    _check(source, truncation)


@pytest.mark.parametrize(
    "levels", [(0.7, 0.8, 0.9, 1.0), (0.9, 1.0), (1.0, 1.003)], ids=["four levels", "two levels", "nearly one"]
)
@pytest.mark.parametrize("blur", [0.0, 5e-3])
def test_fast_does_not_guess_between_levels(levels: tuple[float, ...], blur: float) -> None:
    """Nodes lie near each other, but on places with many values each, and the median is on one of them."""
    rng = np.random.default_rng(0)
    for m in (300, 700):
        s = np.repeat(levels, 300 // len(levels)) * (1.0 + blur * rng.standard_normal(300))
        s[:4] *= 6.0
        source = from_delta(with_spectrum(np.sort(s), m), "F64")
        found = ladder.decompose(
            source, RULE, arithmetic=HostArithmetic(), backend="randomized", estimate="fast", sharp=True
        )
        low, high = found.interval or (0.0, np.inf)
        exact = RULE.estimate(np.sort(s), m, 300)
        assert low <= exact.tau <= high
        assert abs(found.threshold.rank_kept - exact.rank_kept) <= found.within


def test_fast_does_guess_in_noise() -> None:
    for m in (300, 500, 1500):
        source = _gapped(m=m)
        assert _alone(source, "fast").interval is not None


@pytest.mark.parametrize("backend", ["auto", "gram", "randomized", "full"])
@pytest.mark.parametrize("sharp", [True, False])
@pytest.mark.parametrize("factor", [1e-100, 1e100])
def test_squares_out_of_range_end_in_another_rung(backend: Any, sharp: bool, factor: float) -> None:
    source = from_delta(factor * low_rank_plus_noise(400, 260, 3), "F64")
    _check(source, ladder.decompose(source, RULE, arithmetic=HostArithmetic(), backend=backend, sharp=sharp))


@pytest.mark.parametrize("backend", ["auto", "randomized"])
def test_a_scale_beyond_all_values_keeps_nothing(backend: Any) -> None:
    rule = HardThreshold(scale=1e160)
    truncation = ladder.decompose(_gapped(), rule, arithmetic=HostArithmetic(), backend=backend)
    assert truncation.threshold.rank_kept == 0


@pytest.mark.parametrize(("noise", "white"), [("gaussian", True), ("uniform", True), ("graded", False)])
@pytest.mark.parametrize("m", [512, 1100])
def test_white_noise_has_its_median_where_its_moments_say(noise: str, white: bool, m: int) -> None:
    """Which saves a start block of its own; other noise is known by its second moment."""
    n, rng = 512, np.random.default_rng(m)
    entries = rng.uniform(-1.0, 1.0, (m, n)) if noise == "uniform" else rng.standard_normal((m, n))
    if noise == "graded":
        entries *= np.geomspace(1.0, 2.0, n)
    spikes = rng.standard_normal((m, 6)) @ rng.standard_normal((6, n)) * np.geomspace(0.3, 3.0, 6).mean()
    matrix = (entries + spikes).T @ (entries + spikes)
    probes = certify.probe_vectors(n)
    pair = SymmetricPair(matrix.copy())
    seen = Seen(probes, probes @ matrix)
    operator = GramOperator(pair, seen, single=False)
    search = Search(operator, rule=RULE, shape=(m, n), bound=0.0, most_kept=0.2)
    assert search.settle(1.2 * search.look(), steps=8)
    guess = search.as_noise(pair.moments())
    assert (guess is not None) == white
    if guess is not None:
        values = np.linalg.eigvalsh(matrix)
        assert abs(np.searchsorted(values, guess.value) - search.place) <= 4
        near = values[search.place - 20 : search.place + 21]
        assert guess.slope == pytest.approx(40.0 / (near[-1] - near[0]), rel=0.2)


def test_a_wrong_guess_of_the_median_costs_no_more_than_time(monkeypatch: pytest.MonkeyPatch) -> None:
    source = _gapped(dtype="BF16")
    right = _alone(source)
    asked = []

    def wrong(search: Search, moments: tuple[float, float]) -> Guess:
        asked.append(search)
        return Guess(1.5 * right.threshold.s_median**2, 1.0)

    monkeypatch.setattr(Search, "as_noise", wrong)
    found = _alone(source)
    assert len(asked) == 1
    assert found.threshold.rank_kept == right.threshold.rank_kept
    assert found.threshold.s_median == pytest.approx(right.threshold.s_median, rel=1e-9)
    _check(source, found)
