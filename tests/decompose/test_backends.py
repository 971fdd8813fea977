from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamrepair.decompose import full, gram, ladder
from streamrepair.decompose.arithmetic import Arithmetic, Precision, on_host
from streamrepair.decompose.convert import widen
from streamrepair.decompose.device import DeviceArithmetic
from streamrepair.decompose.device.rates import Rates
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.truncation import TAU_RESOLUTION, Truncation, UnresolvedError
from streamrepair.spectral.threshold import HardThreshold, Threshold
from tests.decompose.sources import ArraySource, fine_tuned, from_delta, low_rank_plus_noise, stored, with_spectrum

Doubles = NDArray[np.float64]

RULE = HardThreshold()
ARITHMETICS: dict[str, Arithmetic] = {
    "host": HostArithmetic(),
    "device": DeviceArithmetic("cpu", measured=Rates(1.0, 1.0)),
}
ROUTES = ["gram-float32", "gram-float64", "full", "auto"]
RESOLUTION = 1e-5
"""Nearer to τ than this, in units of τ, the kept rank is not promised."""


def _decomposed(source: ArraySource, arithmetic: Arithmetic, route: str, rule: HardThreshold = RULE) -> Truncation:
    if route == "full":
        return full.truncate(source, rule, arithmetic=arithmetic)
    if route == "auto":
        return ladder.decompose(source, rule, arithmetic=arithmetic, backend="auto")
    precision: Precision = "float32" if route == "gram-float32" else "float64"
    return gram.truncate(source, rule, arithmetic=arithmetic, precision=precision)


def _merged(source: ArraySource, truncation: Truncation, arithmetic: Arithmetic, out_dtype: str = "F64") -> Doubles:
    """W_base + Δ* of the whole source, tall."""
    merge = arithmetic.merger(truncation.vh, out_dtype)
    out = np.empty((source.rows, source.cols))
    for block, raw in merge.merged(source.panels()):
        wide = np.empty(raw.shape)
        widen(raw, out_dtype, wide)
        out[block.start : block.start + block.rows] = wide.T if source.wide else wide
    return out


def _oracle(delta: Doubles, rule: HardThreshold = RULE) -> tuple[Doubles, Threshold, Callable[[int], Doubles]]:
    """Singular values, τ and Δ* of a given rank, by NumPy's float64 SVD."""
    u, s, vh = np.linalg.svd(delta, full_matrices=False)
    return s, rule.estimate(s, *delta.shape), lambda k: np.asarray((u[:, :k] * s[:k]) @ vh[:k])


def _check(source: ArraySource, truncation: Truncation, rule: HardThreshold = RULE) -> None:
    """The promise: rank and Δ* of a float64 SVD, except where rounding decides and that is recorded."""
    delta = source.delta()
    s, threshold, star = _oracle(delta, rule)
    k = truncation.threshold.rank_kept
    if k != threshold.rank_kept:
        assert truncation.undecidable >= abs(k - threshold.rank_kept)
        assert threshold.nearest_gap < RESOLUTION
    assert truncation.threshold.tau == pytest.approx(threshold.tau, rel=TAU_RESOLUTION / 2)  # float32 may use it all
    assert truncation.vh.shape == (k, source.cols)
    np.testing.assert_allclose(truncation.frob_delta_in, np.linalg.norm(delta), rtol=1e-5)
    np.testing.assert_allclose(truncation.values[source.cols - k :], s[:k][::-1], rtol=1e-4)
    if k and not truncation.undecidable:
        mine = delta @ on_host(truncation.vh).T @ on_host(truncation.vh)
        assert np.linalg.norm(mine - star(k)) <= 1e-4 * np.linalg.norm(star(k))
        np.testing.assert_allclose(truncation.frob_delta_out, np.linalg.norm(star(k)), rtol=1e-5)


def _planted(gap: float, m: int, n: int, s_max: float = 3.0) -> Doubles:
    """Values at τ(1 ± gap), nine above, the rest a bulk below; s_max in units of τ."""
    s = np.linspace(0.5, 1.5, n)
    tau = RULE.estimate(s, m, n).tau
    s[-9:] = tau * np.geomspace(1.3, s_max, 9)
    s[-11:-9] = tau * (1.0 - gap), tau * (1.0 + gap)
    return with_spectrum(s, m, seed=int(-np.log10(gap)))


def _heavy(m: int, n: int, power: float) -> Doubles:
    return with_spectrum(np.arange(1, n + 1) ** -power, m)


def _clustered_at_the_median(m: int, n: int) -> Doubles:
    s = np.linspace(0.4, 1.6, n)
    s[n // 4 : 3 * n // 4] = 1.0
    s[-4:] = [4.0, 5.0, 5.0, 9.0]
    return with_spectrum(s, m)


MATRICES: dict[str, Callable[[], ArraySource]] = {
    "gapped": lambda: from_delta(low_rank_plus_noise(220, 100, 6), "F32"),
    "gapped bf16 pair": lambda: fine_tuned(low_rank_plus_noise(220, 100, 6), "BF16"),
    "gapped f16 pair": lambda: fine_tuned(low_rank_plus_noise(100, 220, 6), "F16"),
    "gapped f32 pair": lambda: fine_tuned(low_rank_plus_noise(220, 100, 6), "F32"),
    "pure noise": lambda: from_delta(np.random.default_rng(0).standard_normal((150, 150)), "F32"),
    "tiny delta of a f64 pair": lambda: ArraySource(
        base := np.random.default_rng(1).standard_normal((200, 60)), base + 1e-9 * _heavy(200, 60, 0.7), "F64"
    ),
    "heavy tail, slow": lambda: from_delta(_heavy(260, 120, 0.5), "F32"),
    "heavy tail, fast": lambda: from_delta(_heavy(260, 120, 1.2), "F32"),
    "heavy tail, square": lambda: from_delta(_heavy(150, 150, 0.7), "F32"),
    "planted 1e-3": lambda: from_delta(_planted(1e-3, 300, 100)),
    "planted 1e-4": lambda: from_delta(_planted(1e-4, 300, 100)),
    "planted 1e-5": lambda: from_delta(_planted(1e-5, 300, 100)),
    "planted 1e-6": lambda: from_delta(_planted(1e-6, 300, 100)),
    "planted 1e-3, s_max 1e4": lambda: from_delta(_planted(1e-3, 300, 100, 1e4)),
    "planted 1e-5, s_max 1e4": lambda: from_delta(_planted(1.1e-5, 300, 100, 1e4)),
    "clusters": lambda: from_delta(_clustered_at_the_median(240, 100)),
    "graded columns": lambda: from_delta(np.random.default_rng(2).standard_normal((300, 90)) * np.geomspace(1, 50, 90)),
    "one huge column": lambda: from_delta(low_rank_plus_noise(300, 90, 3) * np.append(np.ones(89), 300.0), "F32"),
    "student": lambda: from_delta(np.random.default_rng(3).standard_t(2, (400, 80)), "F32"),
    "tall": lambda: from_delta(low_rank_plus_noise(20_000, 16, 2), "BF16"),
    "wide": lambda: from_delta(low_rank_plus_noise(16, 5_000, 2), "BF16"),
    "1e-30": lambda: from_delta(1e-30 * low_rank_plus_noise(220, 80, 5), "F32"),
    "1e30": lambda: from_delta(1e30 * low_rank_plus_noise(220, 80, 5), "F32"),
    "bf16-rounded low rank": lambda: fine_tuned(with_spectrum(np.append(np.ones(4), np.zeros(86)), 200), "BF16"),
    "2 × 2": lambda: from_delta([[3.0, 1.0], [1.0, 2.0]], "F32"),
    "one row": lambda: from_delta(np.arange(1.0, 40.0)[None, :], "F32"),
    "one column": lambda: from_delta(np.arange(1.0, 40.0)[:, None], "F32"),
    "one number": lambda: from_delta([[0.5]], "BF16"),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("matrix", MATRICES)
def test_rank_and_delta_are_those_of_a_float64_svd(matrix: str, arithmetic: str, route: str) -> None:
    """A single route may say that it cannot tell; the ladder may not."""
    source = MATRICES[matrix]()
    try:
        truncation = _decomposed(source, ARITHMETICS[arithmetic], route)
    except ArithmeticError:
        assert route == "gram-float32"  # everything here is within reach of float64 squares
        return
    assert not truncation.noise_free
    _check(source, truncation)


@pytest.mark.parametrize("gap", [1e-6, 1e-5, 1e-4])
def test_float32_alone_does_not_decide_what_it_cannot(gap: float) -> None:
    """Values at τ(1 ± 1e-6) straddle it within float32's bound, at 1e-5 their vectors still mix."""
    source = from_delta(_planted(gap, 1500, 200))
    if gap <= 1e-5:
        with pytest.raises(UnresolvedError):
            _decomposed(source, ARITHMETICS["device"], "gram-float32")
    else:
        _check(source, _decomposed(source, ARITHMETICS["device"], "gram-float32"))


@pytest.mark.parametrize("gap", [1e-6, 1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("shape", [(1500, 200), (200, 200)])
def test_float32_with_exact_windows_decides_next_to_the_threshold(gap: float, shape: tuple[int, int]) -> None:
    """On the CPU what lies near τ is computed again in float64."""
    source = from_delta(_planted(gap, *shape))
    truncation = _decomposed(source, ARITHMETICS["host"], "gram-float32")
    assert truncation.undecidable == 0
    _check(source, truncation)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("gap", [3e-5, -3e-5])
def test_a_blunt_float64_gram_matrix_does_not_decide_within_its_bound(arithmetic: str, gap: float) -> None:
    """With s₁ at 10⁵ medians its bound is wider than what is promised: without s₁ it is not."""
    s = np.concatenate([np.linspace(0.5, 1.5, 298), [0.0, 1.5e5]])
    s[-2] = RULE.estimate(np.sort(s), 300, 300).tau * (1.0 + gap)
    source = from_delta(with_spectrum(np.sort(s), 300))
    truncation = ladder.decompose(source, RULE, arithmetic=ARITHMETICS[arithmetic], backend="auto", sharp=True)
    assert truncation.undecidable == 0
    if arithmetic == "host":  # eigh may be sharper
        assert truncation.backend == "deflated-float64"
    _check(source, truncation)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("gap", [1e-10, 5e-10, 1.5e-9, 1e-8, 1e-6])
@pytest.mark.parametrize("largest", [1.5, 15.0, 45.0])
def test_a_cluster_on_both_sides_of_the_threshold(arithmetic: str, gap: float, largest: float) -> None:
    """MRRR hands out vectors of its other side, orthonormal, with residuals that are small against λ_max."""
    m, n, k = 420, 300, 20
    below = np.concatenate([np.linspace(0.3, 1.0, 150), np.linspace(1.01, 1.4, n - 151 - 2 * k)])
    tau = RULE.estimate(np.concatenate([below, np.full(2 * k + 1, 9.0)]), m, n).tau
    s = np.concatenate([below, np.full(k, tau * (1.0 - gap)), np.full(k, tau * (1.0 + gap)), [tau * largest]])
    source = from_delta(with_spectrum(s, m))
    truncation = ladder.decompose(source, RULE, arithmetic=ARITHMETICS[arithmetic], backend="auto", sharp=True)
    delta = source.delta()
    vh = np.linalg.svd(delta, full_matrices=False)[2][: k + 1]
    found, expected = np.asarray(truncation.vh, np.float64), (delta @ vh.T) @ vh
    assert truncation.undecidable or truncation.threshold.rank_kept == k + 1
    if not truncation.undecidable:
        assert np.linalg.norm((delta @ found.T) @ found - expected) <= 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("route", ["gram-float64", "full", "auto"])
def test_values_on_the_threshold_itself_are_recorded_as_undecidable(arithmetic: str, route: str) -> None:
    m, n = 300, 100
    s = np.linspace(0.5, 1.5, n)
    tau = RULE.estimate(s, m, n).tau
    s[-6:] = [tau, tau, 4.0 * tau, 5.0 * tau, 6.0 * tau, 7.0 * tau]
    source = from_delta(with_spectrum(s, m))
    truncation = _decomposed(source, ARITHMETICS[arithmetic], route)
    assert truncation.undecidable == 2
    assert truncation.threshold.nearest_gap < 1e-12
    assert 4 <= truncation.threshold.rank_kept <= 6
    _check(source, truncation)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("backend", ["auto", "gram", "full"])
@pytest.mark.parametrize(
    "case", ["zero", "rank one", "low rank", "low rank in float32", "sparse rows", "sparse columns"]
)
def test_deltas_without_noise_are_said_to_be_so(arithmetic: str, backend: ladder.Backend, case: str) -> None:
    delta = with_spectrum(np.append([3.0, 2.0, 1.0], np.zeros(57)), 130)
    if case == "zero":
        delta[...] = 0.0
    elif case == "rank one":
        delta = np.outer(np.arange(130.0), np.ones(60))
    elif case == "low rank in float32":  # integers: exact in any format
        rng = np.random.default_rng(4)
        delta = (rng.integers(-9, 9, (130, 5)) @ rng.integers(-9, 9, (5, 60))).astype(np.float64)
    elif case == "sparse rows":
        delta[20:] = 0.0
    elif case == "sparse columns":
        delta[:, 20:] = 0.0
    source = from_delta(delta, "F32" if "float32" in case else "F64")
    truncation = ladder.decompose(source, RULE, arithmetic=ARITHMETICS[arithmetic], backend=backend)
    assert truncation.noise_free
    assert truncation.frob_delta_in == pytest.approx(float(np.linalg.norm(delta)), rel=1e-12)
    assert (truncation.frob_delta_in == 0.0) == (case == "zero")


@pytest.mark.parametrize("level", [1e-6, 1e-8, 1e-10, 1e-12])
def test_noise_far_below_the_signal_is_left_to_sharper_routes(level: float) -> None:
    """From 1e-6 on squares lose it, at 1e-12 what rounding leaves of the signal once that is taken out; no SVD of R."""
    rng = np.random.default_rng(5)
    s = np.append(rng.uniform(0.5, 1.5, 50) * level, [1.0, 2.0])
    source = from_delta(with_spectrum(s, 90))
    truncation = ladder.decompose(source, RULE, arithmetic=HostArithmetic(), backend="auto")
    assert not truncation.noise_free
    assert truncation.threshold.rank_kept == 2
    assert truncation.backend == ("full" if level == 1e-12 else "deflated-float64")
    _, threshold, _ = _oracle(source.delta())
    assert truncation.threshold.tau == pytest.approx(threshold.tau, rel=1e-3)


@pytest.mark.parametrize("rule", [HardThreshold(scale=0.7), HardThreshold(scale=1.5), HardThreshold(sigma="tail")])
@pytest.mark.parametrize("matrix", ["gapped", "heavy tail, slow", "heavy tail, fast", "heavy tail, square", "tall"])
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_other_rules_are_met_as_well(rule: HardThreshold, matrix: str, arithmetic: str) -> None:
    source = MATRICES[matrix]()
    _check(source, _decomposed(source, ARITHMETICS[arithmetic], "auto", rule), rule)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", [(9_000, 24), (24, 9_000)])
def test_the_size_of_panels_does_not_change_a_bit(arithmetic: str, route: str, shape: tuple[int, int]) -> None:
    source = fine_tuned(low_rank_plus_noise(*shape, 3), "BF16")
    reference = _decomposed(source, ARITHMETICS[arithmetic], route)
    out = _merged(source, reference, ARITHMETICS[arithmetic], "BF16")
    for panel_blocks in (2, 3, 100):
        other_source = replace(source, panel_blocks=panel_blocks)
        other = _decomposed(other_source, ARITHMETICS[arithmetic], route)
        np.testing.assert_array_equal(other.values, reference.values)
        np.testing.assert_array_equal(other.vh, reference.vh)
        assert other.threshold == reference.threshold
        np.testing.assert_array_equal(_merged(other_source, other, ARITHMETICS[arithmetic], "BF16"), out)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_a_wide_matrix_is_the_tall_one_transposed(arithmetic: str, route: str, dtype: str) -> None:
    tall = fine_tuned(low_rank_plus_noise(3_000, 40, 4), dtype)
    wide = tall.transposed()
    assert wide.wide
    assert not tall.wide
    one, other = (_decomposed(source, ARITHMETICS[arithmetic], route) for source in (tall, wide))
    assert one.threshold.rank_kept == other.threshold.rank_kept == 4
    np.testing.assert_allclose(one.values, other.values, rtol=1e-4 if route == "gram-float32" else 1e-5)
    mine, theirs = _merged(tall, one, ARITHMETICS[arithmetic]), _merged(wide, other, ARITHMETICS[arithmetic])
    assert np.linalg.norm(mine - theirs) <= 1e-5 * one.frob_delta_out


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("out_dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("wide", [False, True])
def test_merging_rounds_once_and_reports_what_it_lost(arithmetic: str, out_dtype: str, wide: bool) -> None:
    source = fine_tuned(low_rank_plus_noise(2_500, 60, 5), "BF16")
    source = source.transposed() if wide else source
    truncation = _decomposed(source, ARITHMETICS[arithmetic], "gram-float64")
    delta = source.delta()
    base = _base(source)
    exact = base + delta @ on_host(truncation.vh).T @ on_host(truncation.vh)
    out = _merged(source, truncation, ARITHMETICS[arithmetic], out_dtype)
    expected = np.empty(exact.shape)
    widen(stored(exact, out_dtype), out_dtype, expected)
    size = float(np.abs(exact).max())
    unit = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 1e-6, "F64": 1e-13}[out_dtype]
    assert np.abs(out - exact).max() <= 1.01 * unit * size
    if out_dtype in ("BF16", "F16"):
        assert np.mean(out != expected) < 1e-3
        merge = ARITHMETICS[arithmetic].merger(truncation.vh, out_dtype)
        assert list(merge.merged(source.panels()))
        assert merge.lost() == pytest.approx(float(np.sum((exact - expected) ** 2)), rel=1e-3)


def _base(source: ArraySource) -> Doubles:
    base = np.empty(source.base.shape)
    widen(source.base, source.dtype, base)
    return base.T if source.wide else base


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_keeping_nothing_gives_the_base_back(arithmetic: str) -> None:
    source = fine_tuned(np.random.default_rng(6).standard_normal((600, 50)), "BF16")
    truncation = replace(_decomposed(source, ARITHMETICS[arithmetic], "auto"), vh=np.zeros((0, 50), np.float32))
    np.testing.assert_array_equal(_merged(source, truncation, ARITHMETICS[arithmetic], "BF16"), _base(source))


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_keeping_everything_gives_the_fine_tuned_weights_back(arithmetic: str) -> None:
    source = fine_tuned(low_rank_plus_noise(600, 50, 5), "BF16")
    rule = HardThreshold(scale=0.0)
    truncation = _decomposed(source, ARITHMETICS[arithmetic], "auto", rule)
    assert truncation.threshold.rank_kept == 50
    out = _merged(source, truncation, ARITHMETICS[arithmetic], "BF16")
    assert np.mean(out != _base(source) + source.delta()) < 1e-2


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_two_runs_on_the_same_working_memory_agree(arithmetic: str) -> None:
    """Larger and smaller matrices in between leave no trace in reused arrays."""
    sources = [MATRICES[name]() for name in ("gapped", "tall", "2 × 2", "gapped bf16 pair")]
    first = [_decomposed(source, ARITHMETICS[arithmetic], "auto").values for source in sources]
    again = [_decomposed(source, ARITHMETICS[arithmetic], "auto").values for source in reversed(sources)]
    for one, other in zip(first, reversed(again), strict=True):
        np.testing.assert_array_equal(one, other)


@st.composite
def _sources(draw: st.DrawFn) -> ArraySource:
    n = draw(st.integers(1, 60))
    m = draw(st.integers(n, 240))
    seed = draw(st.integers(0, 2**20))
    rng = np.random.default_rng(seed)
    kind = draw(st.sampled_from(["noise", "power", "geometric", "steps"]))
    if kind == "noise":
        s = np.linalg.svd(rng.standard_normal((m, n)), compute_uv=False)
        s[: draw(st.integers(0, n))] *= draw(st.floats(1.0, 100.0))
    elif kind == "power":
        s = np.arange(1, n + 1) ** -draw(st.floats(0.0, 2.5))
    elif kind == "geometric":
        s = np.geomspace(1.0, 10.0 ** -draw(st.floats(0.0, 8.0)), n)
    else:
        s = rng.choice([1.0, 1.0, 2.0, 3.0, 30.0], n)
    delta = with_spectrum(s, m, seed) * 10.0 ** draw(st.integers(-12, 12))
    return from_delta(delta.T if draw(st.booleans()) else delta, draw(st.sampled_from(["BF16", "F32", "F64"])))


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@given(source=_sources())
@settings(max_examples=150, deadline=None)
def test_the_ladder_agrees_with_a_float64_svd_on_random_spectra(arithmetic: str, source: ArraySource) -> None:
    truncation = _decomposed(source, ARITHMETICS[arithmetic], "auto")
    if not truncation.noise_free:
        _check(source, truncation)


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize(("power", "shape"), list(itertools.product([0.4, 0.8], [(900, 300), (1800, 300), (400, 400)])))
def test_larger_heavy_tails(arithmetic: str, power: float, shape: tuple[int, int]) -> None:
    """Large enough for many vectors at once and for several blocks."""
    source = from_delta(_heavy(*shape, power), "F32")
    truncation = _decomposed(source, ARITHMETICS[arithmetic], "auto")
    assert truncation.backend.startswith("gram")
    _check(source, truncation)


def test_matrices_too_small_for_probes_are_not_tried_in_float32() -> None:
    """Two entries can share their rounding with the images that they are held against."""
    source = from_delta([[1104.0, 1216.0], [-1.25, -1.25]], "BF16")
    truncation = ladder.decompose(source, RULE, arithmetic=HostArithmetic(), backend="auto")
    exact = RULE.estimate(np.linalg.svd(source.delta(), compute_uv=False), 2, 2)
    assert truncation.threshold.tau == pytest.approx(exact.tau, rel=1e-5)
