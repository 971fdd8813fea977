"""Block Krylov on the delta itself, against a float64 SVD: an interval for τ, a count that random vectors bound."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from streamrepair.decompose import certify, choose, gram, ladder, matrix_free, speed
from streamrepair.decompose.choose import MOST_KEPT
from streamrepair.decompose.halves import LEAST_COLUMNS, in_turn
from streamrepair.decompose.held import HeldDelta
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.krylov import BlockLanczos
from streamrepair.decompose.krylov_search import Search, unseen
from streamrepair.decompose.truncation import NonFiniteDeltaError, OutgrownError, Truncation, UnresolvedError
from streamrepair.errors import NumericalError
from streamrepair.spectral.threshold import HardThreshold
from tests.decompose.sources import ArraySource, from_delta, low_rank_plus_noise, with_spectrum

Doubles = NDArray[np.float64]
RULE = HardThreshold()
N = 320


def _truncated(source: ArraySource, arithmetic: HostArithmetic | None = None) -> Truncation:
    probes = certify.probe_vectors(source.cols)
    arithmetic = arithmetic or HostArithmetic()
    return matrix_free.truncate(source, RULE, arithmetic=arithmetic, probes=probes, most_kept=MOST_KEPT)


def _check(source: ArraySource, found: Truncation) -> None:
    delta = source.delta()
    u, s, vh = np.linalg.svd(delta, full_matrices=False)
    exact = RULE.estimate(s, *delta.shape)
    assert found.interval is not None
    low, high = found.interval
    assert low <= exact.tau <= high
    assert found.within == np.count_nonzero((s > low) & (s < high))
    rank = found.threshold.rank_kept
    assert rank == np.count_nonzero(s > found.threshold.tau)
    assert abs(rank - exact.rank_kept) <= found.within
    assert found.values == pytest.approx(s[:rank][::-1], rel=3e-6)
    star = (u[:, :rank] * s[:rank]) @ vh[:rank]
    assert np.linalg.norm(delta @ found.vh.T @ found.vh - star) <= 1e-4 * np.linalg.norm(star)
    assert found.frob_delta_in == pytest.approx(np.linalg.norm(delta), rel=1e-5)
    assert found.frob_delta_out == pytest.approx(np.linalg.norm(star), rel=1e-5)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("shape", [(320, 320), (500, 320), (320, 500), (1200, 320)])
@pytest.mark.parametrize("rank", [0, 6])
def test_few_values_above_noise_are_found_and_counted(shape: tuple[int, int], dtype: str, rank: int) -> None:
    source = from_delta(low_rank_plus_noise(max(shape), N, rank), dtype)
    found = _truncated(source.transposed() if shape[1] > shape[0] else source)
    assert found.backend == "randomized-float32"
    assert found.threshold.rank_kept == rank
    _check(source, found)


@pytest.mark.parametrize("shape", [(5000, N), (N, 5000)])
@pytest.mark.parametrize("panel_blocks", [1, 4])
def test_several_blocks_and_panels_are_one_matrix(shape: tuple[int, int], panel_blocks: int) -> None:
    source = from_delta(low_rank_plus_noise(5000, N, 6), "BF16", panel_blocks=panel_blocks)
    _check(source, _truncated(source.transposed() if shape[1] > shape[0] else source))


@pytest.mark.parametrize("shape", [(600, 512), (512, 600), (3000, 400)])
@pytest.mark.parametrize("largest", [1e2, 1e4])
def test_what_the_products_are_off_by_is_measured(shape: tuple[int, int], largest: float) -> None:
    """Also where the delta is one block, whose float32 images are those of the operator bit by bit."""
    m, n = max(shape), min(shape)
    rng = np.random.default_rng(0)
    delta = rng.standard_normal((m, n))
    delta += largest * np.outer(rng.standard_normal(m), rng.standard_normal(n)) / m**0.5
    source = from_delta(delta, "F32")
    source = source.transposed() if shape[1] > shape[0] else source
    probes = certify.probe_vectors(n)
    held = HostArithmetic().hold(source, probes)
    square = source.delta().T @ source.delta()
    square = square if square.shape == (n, n) else source.delta() @ source.delta().T
    exact = probes @ square
    np.testing.assert_allclose(held.images, exact, rtol=0, atol=1e-12 * np.abs(exact).max())
    off = certify.spectral_bound(held.operator.times(probes) - held.images)
    assert off == pytest.approx(certify.spectral_bound(held.operator.times(probes) - exact), rel=1e-3)
    assert off > 1e-9 * held.trace / n


@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4, 1e5, 1e6])
def test_a_spike_drowns_no_other_value_unnoticed(ratio: float) -> None:
    m, n = 600, 512
    s = np.sort(np.r_[np.linspace(5.0, 45.0, n - 6), np.linspace(110.0, 200.0, 5), 22.0 * ratio])
    source = from_delta(with_spectrum(s, m), "F32")
    try:
        found = _truncated(source)
    except NumericalError:
        assert ratio > 1e2
        return
    _check(source, found)


@pytest.mark.parametrize("gap", [0.0, 1e-3, -1e-3, 0.01, -0.01])
def test_values_within_the_interval_are_told_of(gap: float) -> None:
    n = 1024  # room for a basis in which they converge
    s = np.concatenate([np.linspace(0.3, 1.0, n - 4), [0.0, 8.0, 9.0, 10.0]])
    s[-4] = RULE.estimate(np.sort(s), 1100, n).tau * (1.0 + gap)
    source = from_delta(with_spectrum(np.sort(s), 1100), "F32")
    found = _truncated(source)
    assert found.within == 1
    _check(source, found)


@pytest.mark.usefixtures("lossy_bases")
def test_a_missed_direction_is_seen_by_another_start_block() -> None:
    with pytest.raises(UnresolvedError, match="other values may lie"):
        _truncated(from_delta(low_rank_plus_noise(500, N, 6), "F32"))


@pytest.mark.usefixtures("lossy_bases")
def test_that_other_start_block_is_what_catches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the answer would be wrong: the test above tests something."""
    monkeypatch.setattr(Search, "ceiling", lambda _, low: (0.9 * low, 0.8 * low))
    source = from_delta(low_rank_plus_noise(500, N, 6), "F32")
    assert _truncated(source).threshold.rank_kept == 5


@pytest.mark.parametrize("steps", [6, 10, 14])
def test_a_random_start_misses_the_largest_value_no_more_often_than_is_said(steps: int) -> None:
    """Single vectors, a chance that 400 of them can tell, and a spectrum that is hard on them: one value alone above.

    A quarter of the distance would be too little, so that the test is not of something far from the truth.
    """
    n, chance = 2000, 0.2
    far = unseen(n, steps, block=1, chance=chance)
    shares = np.zeros(2)
    for seed in range(400):
        for i, below in enumerate((1.01 * far, 0.26 * far)):
            values = np.append((1.0 - below) * 0.5 * (1.0 - np.cos(np.linspace(0.0, np.pi, n - 1))), 1.0)
            lanczos = BlockLanczos(lambda rows, values=values: rows * values, n, block=1, capacity=steps + 1, seed=seed)
            for _ in range(steps):
                lanczos.extend()
            shares[i] += float(lanczos.ritz().values[0]) < 1.0 - below / 1.01
    assert shares[0] <= chance * 400
    assert shares[1] > chance * 400


def test_more_steps_and_more_vectors_see_more() -> None:
    assert unseen(4096, 24) < unseen(4096, 12) < unseen(4096, 12, block=1)
    assert unseen(4096, 12, chance=1e-12) == pytest.approx(0.0771, rel=1e-2)  # by hand from the formula
    assert unseen(10**9, 1, block=1) < 1.0


def test_either_start_block_can_bound_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The density's if as many vectors were set apart for it, else one of its own."""
    source = from_delta(low_rank_plus_noise(500, N, 6), "F32")
    seeds: list[int] = []
    original = Search._complement

    def complement(self: Search, apart: int, steps: int, *, seed: int) -> BlockLanczos:
        seeds.append(seed)
        return original(self, apart, steps, seed=seed)

    monkeypatch.setattr(Search, "_complement", complement)
    _check(source, _truncated(source))
    assert len(set(seeds)) == 1
    ceiling = Search.ceiling

    def forgetful(self: Search, low: float) -> tuple[float, float]:
        self._beside = None
        return ceiling(self, low)

    monkeypatch.setattr(Search, "ceiling", forgetful)
    _check(source, _truncated(source))
    assert len(set(seeds)) == 2


def _noisy(original: Callable[..., Any], *arguments: Any) -> Any:
    result = original(*arguments)
    return result * (1.0 + 1e-2 * np.random.default_rng(0).standard_normal(result.shape))


def _not_finite(original: Callable[..., Any], *arguments: Any) -> Any:
    return original(*arguments) * np.nan


def _half(original: Callable[..., Any], *arguments: Any) -> Any:
    return 0.5 * original(*arguments)


@pytest.mark.parametrize("fault", [_noisy, _not_finite, _half])
def test_faulty_products_are_caught(monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any]) -> None:
    original = HeldDelta.times
    monkeypatch.setattr(HeldDelta, "times", lambda *a: fault(original, *a))
    with pytest.raises(NumericalError):
        _truncated(from_delta(low_rank_plus_noise(500, N, 6), "BF16"))


def _first_lost(original: Callable[..., Any], *arguments: Any) -> Any:
    values, vectors, norms = original(*arguments)
    vectors = vectors.copy()
    vectors[0] = np.roll(vectors[0], 1)
    return values, vectors, norms


def _swollen(original: Callable[..., Any], *arguments: Any) -> Any:
    values, vectors, norms = original(*arguments)
    return 1.01 * values, vectors, norms


@pytest.mark.parametrize("fault", [_first_lost, _swollen])
def test_faulty_pairs_are_caught(monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any]) -> None:
    original = HeldDelta.refined
    monkeypatch.setattr(HeldDelta, "refined", lambda *a: fault(original, *a))
    with pytest.raises(NumericalError):
        _truncated(from_delta(low_rank_plus_noise(500, N, 6), "BF16"))


def _by_ladder(source: ArraySource, monkeypatch: pytest.MonkeyPatch) -> Truncation:
    monkeypatch.setattr(choose, "_LEAST_FAST_COLUMNS", 256)
    choose.krylov_share.cache_clear()
    choose.held_share.cache_clear()
    try:
        return ladder.decompose(source, RULE, arithmetic=HostArithmetic(), backend="randomized", estimate="fast")
    finally:
        choose.krylov_share.cache_clear()
        choose.held_share.cache_clear()


def test_many_kept_values_are_handed_over_and_krylov_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = np.random.default_rng(0).standard_normal((500, N)) * (1.0 + np.arange(N) / 4.0) ** -1.0
    with pytest.raises(OutgrownError, match="would be kept"):
        _truncated(from_delta(delta, "BF16"))
    found = _by_ladder(from_delta(delta, "BF16"), monkeypatch)
    assert found.backend == "gram-float32"
    assert [reason.split(":")[0] for reason in found.climbed] == ["randomized-float32 without a Gram matrix"]


def test_what_only_a_gram_matrix_pays_for_is_still_krylovs() -> None:
    """More is kept than pays without one."""
    source, left = from_delta(low_rank_plus_noise(700, 600, 18), "BF16"), list[str]()
    found = gram.truncate(
        source,
        RULE,
        arithmetic=HostArithmetic(),
        precision="float32",
        krylov=MOST_KEPT,
        estimate="fast",
        held=0.01,
        left=left,
    )
    assert found.backend == "randomized-float32"
    assert "would be kept" in left[0]
    _check(source, found)


def test_why_it_was_left_is_told_wherever_the_ladder_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    s = np.r_[np.random.default_rng(0).uniform(0.5, 1.5, 317), [1e5] * 3]
    found = _by_ladder(from_delta(with_spectrum(np.sort(s), 400), "BF16"), monkeypatch)
    assert found.backend != "gram-float32"
    begins = [reason.split(":")[0] for reason in found.climbed]
    assert begins.index("randomized-float32 without a Gram matrix") < begins.index("gram-float32")


def test_the_ladder_begins_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    source = from_delta(low_rank_plus_noise(500, N, 6), "BF16")
    formed: list[object] = []
    monkeypatch.setattr(HostArithmetic, "gram", lambda *a: formed.append(a))
    found = _by_ladder(source, monkeypatch)
    assert not formed
    _check(source, found)


def test_a_step_at_the_median_is_left_to_a_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the quadrature's nodes nothing is known of where it is."""
    s = np.r_[np.full(151, 0.4), np.full(169, 1.0)] * (1 + 1e-3 * np.random.default_rng(0).standard_normal(320))
    s[-5:] = 5.0
    source = from_delta(with_spectrum(np.sort(s), 320), "F32")
    with pytest.raises(UnresolvedError):
        _truncated(source)
    found = _by_ladder(source, monkeypatch)
    assert found.interval is None
    assert found.threshold.rank_kept == RULE.estimate(np.sort(s), 320, 320).rank_kept


@pytest.mark.parametrize("factor", [1e-100, 1e-25, 1e25])
def test_squares_out_of_range_are_refused(factor: float) -> None:
    source = from_delta(factor * low_rank_plus_noise(400, 260, 3), "F64")
    with pytest.raises(NumericalError):
        _truncated(source)


def test_what_is_not_finite_is_met() -> None:
    delta = low_rank_plus_noise(400, 260, 3)
    delta[17, 5] = np.nan
    with pytest.raises(NonFiniteDeltaError):
        _truncated(from_delta(delta, "F32"))


def test_a_spectrum_with_no_noise_is_left_to_others() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(NumericalError):
        _truncated(from_delta(rng.standard_normal((400, 4)) @ rng.standard_normal((4, 300)), "F32"))


@pytest.mark.parametrize("wide", [False, True])
def test_a_lent_thread_changes_no_number(monkeypatch: pytest.MonkeyPatch, *, wide: bool) -> None:
    monkeypatch.setattr("streamrepair.decompose.halves.LEAST_COLUMNS", 256)
    assert LEAST_COLUMNS > N  # or the matrix would have been cut in any case
    source = from_delta(low_rank_plus_noise(500, N, 6), "BF16")
    source = source.transposed() if wide else source
    with ThreadPoolExecutor(1) as pool:

        def both(first: Callable[[], object], second: Callable[[], object]) -> None:
            other = pool.submit(second)
            first()
            other.result()

        found = [_truncated(source, HostArithmetic(both=each)) for each in (in_turn, both)]
    np.testing.assert_array_equal(np.asarray(found[0].vh), np.asarray(found[1].vh))
    np.testing.assert_array_equal(found[0].values, found[1].values)


def test_which_shapes_go_without_a_gram_matrix() -> None:
    assert choose.held_share("auto", "fast", 4096, 4096) == MOST_KEPT
    assert choose.held_share("auto", "fast", 28672, 8192) > 0.05
    assert choose.held_share("auto", "exact", 4096, 4096) == 0.0
    assert choose.held_share("gram", "fast", 4096, 4096) == 0.0
    assert choose.held_share("auto", "fast", 128256, 4096) == 0.0  # it would be more than the Gram matrix takes
    assert speed.predicted(4096, 4096, "held", speed.CPU, 0.03).gram_s < 0.1
