"""A few values thousands of times the rest: float32 with those taken down, against a float64 SVD."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamrepair.decompose import ladder, tame
from streamrepair.decompose.certify import probe_vectors
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.scratch import Scratch
from streamrepair.decompose.truncation import Truncation, UnresolvedError
from streamrepair.engine import memory
from streamrepair.engine.memory import MatrixShape
from streamrepair.spectral.threshold import HardThreshold
from tests.decompose.sources import ArraySource, from_delta, with_spectrum

RULE = HardThreshold()
Doubles = NDArray[np.float64]


def _spiky(m: int, n: int, largest: float, count: int, seed: int = 0) -> ArraySource:
    """Noise, and so many values up to `largest` times its median."""
    s = np.sort(np.linalg.svd(np.random.default_rng(seed).standard_normal((m, n)), compute_uv=False))
    s[n - count :] = np.median(s) * np.geomspace(largest, largest / 3, count)[::-1]
    delta = with_spectrum(s, m, seed)
    return from_delta(delta / np.abs(delta).max(), "BF16")


def _check(source: ArraySource, found: Truncation) -> None:
    delta = source.delta()
    u, s, vh = np.linalg.svd(delta, full_matrices=False)
    exact = RULE.estimate(s, *delta.shape)
    kept = exact.rank_kept
    star, v = (u[:, :kept] * s[:kept]) @ vh[:kept], np.asarray(found.vh, np.float64)
    assert found.threshold.rank_kept == kept
    assert found.threshold.tau == pytest.approx(exact.tau, rel=5e-6)
    assert found.threshold.nearest_gap == pytest.approx(exact.nearest_gap, abs=1e-5)
    assert np.linalg.norm(delta @ v.T @ v - star) <= 1e-5 * np.linalg.norm(star)
    np.testing.assert_allclose(found.values[-kept:], np.sort(s)[-kept:], rtol=1e-5)
    assert found.frob_delta_in == pytest.approx(np.linalg.norm(delta), rel=1e-6)
    assert np.linalg.norm(v @ v.T - np.eye(kept)) < 1e-4


@pytest.fixture
def tamings(monkeypatch: pytest.MonkeyPatch) -> list[tame.Taming]:
    """What was taken down, matrix by matrix."""
    seen: list[tame.Taming] = []
    original = tame.taming

    def watched(*arguments: object) -> tame.Taming:
        seen.append(original(*arguments))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(tame, "taming", watched)
    return seen


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(400, 400), (900, 300), (5000, 257)])
@pytest.mark.parametrize(("largest", "count"), [(300.0, 1), (400.0, 2), (3000.0, 2), (10_000.0, 3)])
def test_spikes_are_taken_down_and_put_back(
    shape: tuple[int, int], largest: float, count: int, turned: bool, tamings: list[tame.Taming]
) -> None:
    source = _spiky(*shape, largest, count)
    source = source.transposed() if turned else source
    found = ladder.decompose(source, RULE, arithmetic=HostArithmetic(), backend="auto")
    assert (found.backend, found.climbed) == ("gram-float32", ())
    assert [len(taming.values) for taming in tamings] == [count]
    _check(source, found)


@given(
    seed=st.integers(0, 1000), largest=st.floats(50.0, 2e4), count=st.integers(1, 12), beta=st.sampled_from([1.0, 0.4])
)
@settings(max_examples=25, deadline=None)
def test_whatever_the_spikes_the_ladder_is_right(seed: int, largest: float, count: int, beta: float) -> None:
    source = _spiky(round(270 / beta), 270, largest, count, seed)
    _check(source, ladder.decompose(source, RULE, arithmetic=HostArithmetic(), backend="auto"))


def test_more_spikes_than_the_first_look_holds(tamings: list[tame.Taming]) -> None:
    source = _spiky(900, 900, 3e3, 9)
    found = ladder.decompose(source, RULE, arithmetic=HostArithmetic(), backend="auto")
    assert [len(taming.values) for taming in tamings] == [9]
    _check(source, found)


def test_what_does_not_stand_out_is_left_alone() -> None:
    for source in (_spiky(300, 300, 30.0, 5), _spiky(300, 300, 60.0, 20), from_delta(np.eye(300), "BF16")):
        gram = HostArithmetic().gram(source, probe_vectors(300), "float32")
        assert gram.matrix is not None
        assert tame.spikes(gram, gram.matrix) is None


def test_vectors_that_are_far_off_are_refused_and_others_made_better(tamings: list[tame.Taming]) -> None:
    source, arithmetic = _spiky(400, 300, 1000.0, 2), HostArithmetic()
    gram = arithmetic.gram(source, probe_vectors(300), "float32")
    assert gram.matrix is not None
    spikes = tame.spikes(gram, gram.matrix)
    assert spikes is not None
    noise = np.random.default_rng(0).standard_normal(spikes.rows.shape) / 300**0.5

    def turned(by: float) -> tame.Taming:
        return tame.taming(
            lambda rows: arithmetic.products(source, rows),
            tame.Spikes(spikes.rows + by * noise, spikes.mean, spikes.following),
            12.0 * spikes.mean,
        )

    exact = np.linalg.svd(source.delta(), compute_uv=False)[:2][::-1] ** 2
    for by in (0.0, 1e-6, 1e-3):
        np.testing.assert_allclose(turned(by).values, exact, rtol=1e-9)
    with pytest.raises(UnresolvedError, match="would move others"):
        turned(10.0)


def test_a_spike_that_would_fall_below_the_threshold_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = tame.taming

    def too_far(*arguments: object) -> tame.Taming:
        found = original(*arguments)  # type: ignore[arg-type]
        return tame.Taming(found.values, found.rows, found.factors * 1e-3, found.moved)

    monkeypatch.setattr(tame, "taming", too_far)
    source = _spiky(400, 300, 1000.0, 2)
    found = ladder.decompose(source, RULE, arithmetic=HostArithmetic(), backend="auto")
    assert found.climbed == ("gram-float32: a spike that was taken down lies below the threshold",)
    _check(source, found)


@pytest.mark.parametrize(("rows", "n"), [(601, 601), (1811, 601), (1511, 1511)])
def test_no_more_memory_than_without(rows: int, n: int) -> None:
    source, scratch = _spiky(rows, n, 1000.0, 3), Scratch()
    host = HostArithmetic(scratch)
    tracemalloc.start()
    try:
        for _ in range(2):
            scratch.begin("alike")
            found = ladder.decompose(source, RULE, arithmetic=host, backend="gram")
            assert found.backend == "gram-float32"
            for _ in host.merger(found.vh, "BF16").merged(source.panels()):
                pass
            del found
            scratch.settle()
        live = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert live <= memory.gram_bytes(MatrixShape(rows, n, 2, 2, 2))
