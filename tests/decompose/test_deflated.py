"""Deltas whose largest values drown the median of their Gram matrix, against a float64 SVD; and what is refused."""

from __future__ import annotations

import gc
import tracemalloc
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamrepair.decompose import certify, deflated, full, gram, ladder, truncation
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.operator import PanelSource
from streamrepair.decompose.truncation import Truncation, UnresolvedError
from streamrepair.errors import NumericalError
from streamrepair.spectral.threshold import HardThreshold
from tests.decompose.sources import ArraySource, Doubles, from_delta, merged_adapter, stored, with_spectrum

RULE = HardThreshold()


def _drowned(m: int, largest: Doubles, rest: Doubles, seed: int = 0) -> ArraySource:
    return from_delta(with_spectrum(np.concatenate([largest, rest]), m, seed))


def _noise(n: int, seed: int = 3) -> Doubles:
    """A spectrum of n values around 1, some above τ."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.uniform(4.0, 30.0, n // 10), rng.uniform(0.2, 1.5, n - n // 10)])


def _decide(source: ArraySource, rule: HardThreshold = RULE) -> Truncation:
    return ladder.decompose(source, rule, arithmetic=HostArithmetic(), backend="gram", sharp=True, full_fits=False)


def _held_against_svd(found: Truncation, source: ArraySource, rule: HardThreshold = RULE) -> None:
    delta = source.delta()
    _, s, vh = np.linalg.svd(delta, full_matrices=False)
    true = rule.estimate(np.ascontiguousarray(s[::-1]), source.rows, source.cols)
    assert found.threshold.rank_kept == true.rank_kept
    assert found.threshold.tau == pytest.approx(true.tau, rel=2e-6)
    assert found.frob_delta_in == pytest.approx(float(np.linalg.norm(s)), rel=1e-12)
    k = true.rank_kept
    np.testing.assert_allclose(found.values[len(s) - k :][::-1], s[:k], rtol=1e-6)
    kept, expected = np.asarray(found.vh, np.float64), (delta @ vh[:k].T) @ vh[:k]
    assert np.linalg.norm((delta @ kept.T) @ kept - expected) <= 1e-12 * np.linalg.norm(expected)


@pytest.mark.parametrize(("m", "n"), [(300, 300), (1500, 200), (200, 1500)])
@pytest.mark.parametrize("rank", [1, 8, 25])
def test_an_adapter_merged_in_float32_needs_no_svd(m: int, n: int, rank: int) -> None:
    source = merged_adapter(m, n, rank)
    found = _decide(source)
    assert found.backend == "deflated-float64"
    assert [reason.partition(":")[0] for reason in found.climbed] == ["gram-float64", "rows"]
    _held_against_svd(found, source)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 20), depth=st.floats(6.0, 9.0), spread=st.floats(0.0, 2.0), m=st.sampled_from([160, 163, 900])
)
def test_whatever_stands_out_by_however_much(count: int, depth: float, spread: float, m: int) -> None:
    """The rest has values above τ of its own; what was taken out is spread over up to two decades."""
    largest = 10.0**depth * np.geomspace(1.0, 10.0**-spread, count)
    source = _drowned(m, largest, _noise(160 - count))
    found = _decide(source)
    assert found.backend == "deflated-float64"
    _held_against_svd(found, source)


@pytest.mark.parametrize("sigma", ["median", "tail"])
def test_every_estimator(sigma: str) -> None:
    rule = HardThreshold(sigma=sigma)  # type: ignore[arg-type]
    source = _drowned(400, np.array([1e7, 3e6]), _noise(198))
    found = _decide(source, rule)
    assert found.backend == "deflated-float64"
    _held_against_svd(found, source, rule)


@pytest.mark.parametrize("off", [-1e-4, 1e-4])
def test_a_value_beside_the_threshold_falls_on_its_side(off: float) -> None:
    rest = _noise(198)
    everything = np.sort(np.concatenate([[1e7, 1e7], rest]))
    rest[0] = RULE.estimate(everything, 400, 200).tau * (1.0 + off)
    found = _decide(_drowned(400, np.array([1e7, 1e7]), rest))
    assert found.backend == "deflated-float64"
    assert found.threshold.rank_kept == 2 + np.count_nonzero(rest[1:] > rest[0]) + (off > 0)
    assert found.threshold.nearest_gap == pytest.approx(abs(off), rel=1e-2)


def test_low_rank_to_the_last_bit_has_no_noise() -> None:
    """As `row-space` would say after it, by the same proof."""
    rng = np.random.default_rng(0)
    delta = rng.integers(-9, 9, (300, 5)).astype(float) @ rng.integers(-9, 9, (5, 120)).astype(float)
    found = _decide(from_delta(delta))
    assert (found.noise_free, found.backend) == (True, "row-space")
    assert [reason.partition(":")[0] for reason in found.climbed] == ["gram-float64", "rows"]


@pytest.mark.parametrize("depth", [11.0, 12.0, 13.0, 14.0])
def test_noise_at_the_edge_of_float64_is_what_the_reference_says(depth: float) -> None:
    """Where rounding may be all that is left the reference decides."""
    source = _drowned(300, np.full(4, 10.0**depth), _noise(146))
    found = ladder.decompose(source, RULE, arithmetic=HostArithmetic(), backend="gram", sharp=True)
    reference = full.truncate(source, RULE, arithmetic=HostArithmetic())
    assert found.noise_free == reference.noise_free
    assert found.noise_free or found.threshold.rank_kept == reference.threshold.rank_kept


@pytest.mark.parametrize("power", [2.5, 3.0])
def test_a_steep_spectrum_without_a_gap(power: float) -> None:
    """Enough is taken out for the rest to be seen: what was taken out needs to be far from τ only."""
    source = from_delta(with_spectrum(np.arange(1.0, 601.0)[::-1] ** -power, 700))
    found = _decide(source)
    assert found.backend == "deflated-float64"
    _held_against_svd(found, source)


def test_a_spectrum_that_falls_slowly_goes_to_the_reference() -> None:
    """Twelve decades evenly filled: too many values would have to be taken out."""
    source = from_delta(with_spectrum(np.geomspace(1.0, 1e12, 300), 300))
    found = ladder.decompose(source, RULE, arithmetic=HostArithmetic(), backend="gram", sharp=True)
    assert found.backend == "full"
    assert "deflated: no 75 values or fewer stand out" in found.climbed


def test_squares_that_may_vanish_are_left_to_others() -> None:
    source = from_delta(1e-146 * with_spectrum(np.sort(np.concatenate([[1e7], _noise(99)])), 200))
    found = ladder.decompose(source, RULE, arithmetic=HostArithmetic(), backend="gram", sharp=True)
    assert found.backend == "full"
    assert "deflated: squares of what is left may vanish" in found.climbed


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("every", [1, 16])
def test_a_weight_that_fine_tuning_has_made_zero_is_no_reason_to_climb(
    dtype: str, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ‖W_ft‖ is sampled there is nothing to hold the mixing of vectors against."""
    monkeypatch.setattr(truncation, "_MOST_TURNED", 7.5e-7)  # as it is outside of these tests
    rng = np.random.default_rng(0)
    base = 0.02 * rng.standard_normal((300, 200)) + np.outer(rng.standard_normal(300), rng.standard_normal(200))
    ft = base + 1e-3 * rng.standard_normal((300, 200))
    ft[::every] = 0.0
    source = ArraySource(stored(base, dtype), stored(ft, dtype), dtype)
    assert _decide(source).backend.startswith("gram")


def test_nothing_is_left_for_the_garbage_collector() -> None:
    """An error that is held in its own frame would keep the Gram matrix of every matrix until one is looked for."""
    source = merged_adapter(500, 400, 4)
    _decide(source)  # loads what is loaded late
    gc.disable()
    tracemalloc.start()
    try:
        _decide(source)
        assert tracemalloc.get_traced_memory()[0] < 200_000  # G has 1.28 MB
    finally:
        tracemalloc.stop()
        gc.enable()


def test_the_same_bytes_in_any_panels() -> None:
    source = merged_adapter(2600, 300, 4)
    one, other = (_decide(replace(source, panel_blocks=blocks)) for blocks in (1, 3))
    assert np.asarray(one.vh).tobytes() == np.asarray(other.vh).tobytes()
    assert one.values.tobytes() == other.values.tobytes()


class TestFaults:
    """What a wrong pass over Δ would give is not taken."""

    source = merged_adapter(400, 200, 6)
    basis = np.linalg.svd(source.delta())[2][:6]

    @staticmethod
    def _of_rest(found: deflated.Deflated) -> Truncation:
        return gram.conclude(found.gram, found.gram.factorise(), RULE, 400, "float64")

    def _concluded(self, found: deflated.Deflated) -> Truncation:
        return deflated.conclude(self.source, RULE, found, partial(self._of_rest, found))

    def _deflated(self, basis: Doubles) -> deflated.Deflated:
        return HostArithmetic().deflated(self.source, certify.probe_vectors(200), np.ascontiguousarray(basis))

    def test_none(self) -> None:
        _held_against_svd(self._concluded(self._deflated(self.basis)), self.source)

    @pytest.mark.parametrize("turned", [1e-3, 1e-9])
    def test_directions_that_are_not_quite_those(self, turned: float) -> None:
        """What they leave of the largest values is tied to what they hold."""
        rng = np.random.default_rng(1)
        other = np.linalg.qr(self.basis.T + turned * rng.standard_normal((200, 6)))[0].T
        with pytest.raises(UnresolvedError):
            self._concluded(self._deflated(other))

    def test_what_a_turn_may_move_counts_as_undecidable(self) -> None:
        """A value at τ(1 − 2e-8), and a direction that leans so far towards it that it comes out above τ."""
        rest = _noise(198)
        everything = np.sort(np.concatenate([[1e6, 1e5], rest]))
        rest[0] = RULE.estimate(everything, 400, 200).tau * (1.0 - 2e-8)
        delta = with_spectrum(np.concatenate([[1e6, 1e5], rest]), 400)
        vh = np.linalg.svd(delta)[2]
        place = 2 + int(np.count_nonzero(rest > rest[0]))
        lean = 5e-7**0.5 * float(np.median(everything)) / 1e5
        basis = np.array([vh[0], np.cos(lean) * vh[1] + np.sin(lean) * vh[place]])
        source = from_delta(delta)
        found = HostArithmetic().deflated(source, certify.probe_vectors(200), basis)

        decided = deflated.conclude(source, RULE, found, partial(self._of_rest, found))
        assert abs(decided.threshold.rank_kept - place) <= decided.undecidable
        assert decided.undecidable == 1

    def test_directions_that_hold_values_below_the_threshold(self) -> None:
        below = np.linalg.svd(self.source.delta())[2][[0, 1, 2, 3, 4, 5, 190]]
        with pytest.raises(UnresolvedError, match="too near the squared threshold"):
            self._concluded(self._deflated(below))

    @pytest.mark.parametrize(("times", "passes"), [(2.8, False), (3.5, True)])
    def test_what_is_taken_out_lies_far_above_the_threshold(self, times: float, passes: bool) -> None:
        """At √10·τ; nearer to it, what C moves is more than is reckoned."""
        rest = _noise(199)
        tau = RULE.estimate(np.sort(np.append(rest, 1e6)), 400, 200).tau
        rest = np.minimum(np.sort(rest), 2.0 * tau)  # τ rests on the median alone
        rest[-1] = times * tau
        source = from_delta(with_spectrum(np.append(rest, 1e6), 400))
        basis = np.linalg.svd(source.delta())[2][:2]
        found = HostArithmetic().deflated(source, certify.probe_vectors(200), np.ascontiguousarray(basis))

        if passes:
            assert deflated.conclude(source, RULE, found, partial(self._of_rest, found)).backend == "deflated-float64"
        else:
            with pytest.raises(UnresolvedError, match="too near the squared threshold"):
                deflated.conclude(source, RULE, found, partial(self._of_rest, found))

    def test_a_level_that_the_reference_would_call_rounding(self) -> None:
        """Which is 8·ε·m·s₁, with so many rows."""
        found = self._deflated(self.basis)
        level = self._concluded(found).threshold.s_median
        found = self._deflated(self.basis)  # the first one's matrix is overwritten
        rows = int(1.5 * level / full.zero_bound(1, float(found.largest[0])))
        tall = cast("PanelSource", SimpleNamespace(rows=rows, cols=200))
        with pytest.raises(UnresolvedError, match="may be rounding"):
            deflated.conclude(tall, RULE, found, partial(self._of_rest, found))

    def test_stand_ins_below_the_threshold(self) -> None:
        """In small matrices at a large scale."""
        rule = HardThreshold(scale=6.0)
        source = _drowned(60, np.array([1e9]), np.linspace(0.9, 1.1, 39))
        found = ladder.decompose(source, rule, arithmetic=HostArithmetic(), backend="gram", sharp=True)
        assert found.backend == "full"
        assert any("stand-ins exceed the threshold" in reason for reason in found.climbed)

    def test_a_gram_matrix_that_is_not_that_of_the_rest(self) -> None:
        found = self._deflated(self.basis)
        assert found.gram.matrix is not None
        found.gram.matrix[7, 9] += 0.1 * found.gram.trace
        with pytest.raises(NumericalError):
            self._concluded(found)
