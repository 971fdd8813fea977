from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from streamrepair.decompose import certify, householder, lapack, single, twisted
from streamrepair.decompose.arithmetic import Precision, Products
from streamrepair.decompose.convert import Doubles, Real
from streamrepair.decompose.halves import Both
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.operator import PanelSource
from streamrepair.decompose.tridiagonal import SingleTridiagonal
from streamrepair.decompose.truncation import MOST_MIXING, Truncation, UnresolvedError, mixing, roots
from streamrepair.decompose.windows import Slack, Windows
from streamrepair.errors import NumericalError
from streamrepair.spectral.threshold import HardThreshold
from tests.decompose.sources import ArraySource, fine_tuned, from_delta, low_rank_plus_noise, with_spectrum


class _Counting(HostArithmetic):
    """Counts the passes over the delta and the vectors that went through them."""

    def __init__(self) -> None:
        super().__init__()
        self.full: list[int] = []
        self.inner: list[Precision] = []

    def products(self, source: PanelSource, vectors: Doubles) -> tuple[Doubles, Doubles]:
        self.full.append(len(vectors))
        return super().products(source, vectors)

    def inner_products(self, source: PanelSource, vectors: Doubles, precision: Precision) -> Doubles:
        self.inner.append(precision)
        return super().inner_products(source, vectors, precision)


def _truncated(source: ArraySource, arithmetic: HostArithmetic | None = None) -> Truncation:
    arithmetic = arithmetic or HostArithmetic()
    probes = certify.probe_vectors(source.cols)
    gram = arithmetic.gram(source, probes, "float32")
    return single.truncate(source, HardThreshold(), arithmetic=arithmetic, gram=gram, probes=probes)


def _heavy(m: int, n: int) -> Doubles:
    """A spectrum that runs through τ."""
    return with_spectrum(np.random.default_rng(8).pareto(2.5, n) + 0.3, m)


def _off_by(source: ArraySource, vh: Any) -> float:
    """‖Δ·VᵀV − Δ*‖/‖Δ*‖, of as many values as there are vectors."""
    u, s, exact = np.linalg.svd(source.delta(), full_matrices=False)
    rank, rows = len(vh), vh.astype(np.float64)
    star = (u[:, :rank] * s[:rank]) @ exact[:rank]
    return float(np.linalg.norm(source.delta() @ rows.T @ rows - star) / np.linalg.norm(star))


@pytest.mark.parametrize("shape", [(300, 300), (301, 293), (1400, 300)], ids=str)
@pytest.mark.parametrize("spectrum", ["gapped", "heavy"])
@pytest.mark.parametrize("stored", ["tall", "wide"])
def test_median_rank_and_kept_part_are_those_of_float64(shape: tuple[int, int], spectrum: str, stored: str) -> None:
    delta = low_rank_plus_noise(*shape, rank=9) if spectrum == "gapped" else _heavy(*shape)
    source = fine_tuned(delta, "BF16")
    source = source.transposed() if stored == "wide" else source
    found = _truncated(source)
    s = np.linalg.svd(source.delta(), compute_uv=False)
    exact = HardThreshold().estimate(s[::-1], source.rows, source.cols)
    assert len(found.vh) == found.threshold.rank_kept == exact.rank_kept > 0
    assert abs(found.threshold.s_median / exact.s_median - 1.0) < 1e-6
    assert _off_by(source, found.vh) <= 1e-4


def test_a_gap_at_the_threshold_needs_no_vectors_there() -> None:
    """Only those around the median and of the largest values go through the delta; more where values meet at τ."""
    n, rule = 400, HardThreshold()
    s = np.sort(np.random.default_rng(2).uniform(0.5, 1.5, n))
    s[-6:] = np.geomspace(40.0, 60.0, 6)
    gapped, met = _Counting(), _Counting()
    _truncated(from_delta(with_spectrum(s, n), "F32"), gapped)
    s[-8:-6] = rule.estimate(s, n, n).tau * np.array([0.9995, 1.0005])
    _truncated(from_delta(with_spectrum(s, n), "F32"), met)
    assert gapped.full == [24 + 16]
    assert met.full[0] > 24 + 16


@pytest.mark.parametrize("spectrum", ["heavy", "power", "hot columns"])
def test_what_float32_vectors_are_off_by_is_foretold(spectrum: str) -> None:
    """From what the error does to each of them; were it spread evenly, several times as much would be expected."""
    m, n = 700, 500
    rng = np.random.default_rng(5)
    if spectrum == "hot columns":
        source = from_delta(rng.standard_normal((m, n)) * np.exp(rng.normal(0.0, 1.0, n)), "F32")
    else:
        source = from_delta(
            _heavy(m, n) if spectrum == "heavy" else with_spectrum(np.arange(1, n + 1) ** -0.6, m), "F32"
        )
    probes = certify.probe_vectors(n)
    gram = HostArithmetic().gram(source, probes, "float32")
    assert gram.matrix is not None
    form = SingleTridiagonal(gram.matrix)
    error, seen = single._factor_error(form, gram, probes)
    first = HardThreshold().estimate(roots(form.values), m, n)
    basis = single._Basis.chosen(form, first, error, seen, gram.weight)
    rank = first.rank_kept
    foretold = mixing(form.values, rank, basis.errors(rank))
    actual = _off_by(source, basis.rows[-rank:])
    assert 0.7 * actual < foretold < 4.0 * actual
    assert foretold < 0.5 * mixing(form.values, rank, 0.5 * error)
    more = basis.errors(rank + 3)
    assert (len(more), *more[:3]) == (rank + 3, *[0.5 * error] * 3)
    assert len(basis.errors(rank - 3)) == rank - 3
    assert basis.errors(0).shape == (0,)


def test_a_power_law_is_decided_though_an_error_spread_evenly_would_mix_it() -> None:
    source = from_delta(with_spectrum(np.arange(1, 501) ** -0.9, 700), "F32")
    found = _truncated(source)
    s = np.linalg.svd(source.delta(), compute_uv=False)
    assert len(found.vh) == found.threshold.rank_kept == HardThreshold().estimate(s[::-1], 700, 500).rank_kept
    assert _off_by(source, found.vh) < MOST_MIXING


@pytest.mark.parametrize("rows", [300, 1500])
def test_a_delta_is_multiplied_once_in_float32(rows: int) -> None:
    """Its Gram matrix, too blunt for the values, serves for the residuals, and to hold the products against."""
    arithmetic = _Counting()
    found = _truncated(fine_tuned(low_rank_plus_noise(rows, 300, rank=30), "BF16"), arithmetic)
    assert found.threshold.rank_kept > 0
    assert (arithmetic.full, arithmetic.inner) == ([], ["float32"])


@pytest.mark.parametrize("fault", ["a part is missing", "off by 1e-4", "nan"])
def test_wrong_products_in_float32_are_caught_and_float64_decides(fault: str) -> None:
    class Faulty(_Counting):
        def inner_products(self, source: PanelSource, vectors: Doubles, precision: Precision) -> Doubles:
            inner = super().inner_products(source, vectors, precision)
            if precision == "float32" and fault == "nan":
                inner[3, 3] = np.nan
            elif precision == "float32":
                inner *= 0.99 if "missing" in fault else 1.0 + 1e-4
            return inner

    source = fine_tuned(low_rank_plus_noise(900, 300, rank=30), "BF16")
    right, arithmetic = _truncated(source), Faulty()
    if fault == "nan":
        with pytest.raises(NumericalError, match="not finite"):
            _truncated(source, arithmetic)
        return
    found = _truncated(source, arithmetic)
    assert arithmetic.inner == ["float32", "float64"]
    assert found.threshold.rank_kept == right.threshold.rank_kept
    assert found.threshold.s_median == pytest.approx(right.threshold.s_median, rel=1e-6)


@pytest.mark.parametrize("off", [1e-3, 1e-4, 3e-5, -3e-5, -1e-4, -1e-3])
def test_a_value_planted_beside_the_threshold_falls_on_its_side(off: float) -> None:
    """Or the float32 route says that it cannot tell."""
    n, rule = 320, HardThreshold()
    s = np.sort(np.random.default_rng(2).uniform(0.5, 1.5, n))
    s[-6:] = np.geomspace(40.0, 60.0, 6)
    for _ in range(3):  # the median does not depend on it
        s[-7] = (1.0 + off) * rule.estimate(np.sort(s), 2 * n, n).tau
    source = from_delta(with_spectrum(s, 2 * n), "F32")
    try:
        found = _truncated(source)
    except UnresolvedError:
        assert abs(off) < 1e-4
        return
    assert found.threshold.rank_kept == (7 if off > 0 else 6)


@pytest.mark.parametrize("which", [12, -1])
def test_vectors_that_are_turned_back_to_anothers_are_caught(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A true vector of Δ has no residual, whichever value it belongs to: another median, or one value less kept."""
    source, right = fine_tuned(low_rank_plus_noise(300, 300, rank=40), "BF16"), householder.rotate_back
    another = np.linalg.svd(source.delta())[2][-60]

    def wrong(reflectors: Real, scales: Real, vectors: Real, both: Both) -> None:
        right(reflectors, scales, vectors, both)
        vectors[which] = another

    _truncated(source)
    monkeypatch.setattr(householder, "rotate_back", wrong)
    with pytest.raises(NumericalError, match="turned back"):
        _truncated(source)


@pytest.mark.parametrize("kind", ["flat", "heavy", "positive"])
def test_what_windows_leave_is_no_further_from_t_than_is_said(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where float32 errors are anything but spread evenly, too."""
    n, rng, original = 320, np.random.default_rng(0), single.ritz
    delta = {
        "flat": with_spectrum(rng.uniform(0.9, 1.1, n), n),
        "heavy": _heavy(2 * n, n),
        "positive": np.abs(rng.standard_normal((n, n))),
    }[kind]
    source, seen = from_delta(delta, "F32"), list[tuple[Doubles, float]]()

    def met(products: Products, slack: Slack, rows: Doubles, outside: Doubles, blunt: float) -> Windows:
        seen.append((rows.astype(np.float64), blunt))
        return original(products, slack, rows, outside, blunt)

    monkeypatch.setattr(single, "ritz", met)
    _truncated(source)
    rows, blunt = seen[0]
    gram = HostArithmetic().gram(source, certify.probe_vectors(n), "float32")
    assert gram.matrix is not None
    error = source.delta().T @ source.delta() - SingleTridiagonal(gram.matrix).product(np.eye(n))
    others = np.linalg.qr(rows.T, mode="complete")[0][:, len(rows) :]
    assert np.linalg.norm(others.T @ error @ others, 2) <= blunt


@pytest.mark.parametrize("fault", ["turned", "repeated", "nan", "another's"])
def test_wrong_vectors_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = twisted.vectors

    def wrong(diagonal: Doubles, off: Doubles, values: Doubles) -> Doubles:
        found = right(diagonal, off, values)
        if fault == "turned":
            found = np.roll(found, 1, axis=1)
        elif fault == "repeated":
            found[-1] = found[-2]
        elif fault == "another's":  # a true vector, of a value far outside the windows
            found[len(found) // 4] = right(diagonal, off, lapack.tridiagonal_values(diagonal, off)[40:41])[0]
        else:
            found[len(found) // 2, 7] = np.nan
        return found

    monkeypatch.setattr(twisted, "vectors", wrong)
    with pytest.raises((NumericalError, UnresolvedError)):
        _truncated(fine_tuned(low_rank_plus_noise(300, 300, rank=40), "BF16"))


@pytest.mark.parametrize("factor", [1.0 + 1e-3, 1.0 - 1e-3])
def test_wrong_values_are_caught(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = lapack.tridiagonal_values

    def wrong(diagonal: Doubles, off: Doubles) -> Doubles:
        values = right(diagonal, off)
        values[len(values) // 2 :] *= factor
        return values

    monkeypatch.setattr(lapack, "tridiagonal_values", wrong)
    with pytest.raises((NumericalError, UnresolvedError)):
        _truncated(fine_tuned(low_rank_plus_noise(300, 300, rank=9), "BF16"))


def test_more_values_kept_than_foretold_are_none_without_vectors() -> None:
    """A large scale multiplies what float32 has the median off by; a value between the two thresholds has no vector."""
    n, rule = 300, HardThreshold(scale=30.0)
    seen: set[str] = set()
    for seed in range(80):  # which of them shows it is a matter of rounding
        if {"decided", "values"} <= seen:
            break
        s = np.sort(np.random.default_rng(seed).uniform(0.5, 1.5, n))
        s[-16:] = np.geomspace(1.2, 1.3, 16) * rule.estimate(s, n, n).tau
        for _ in range(3):  # the median does not depend on it
            s[-17] = (1.0 + 2e-5) * rule.estimate(np.sort(s), n, n).tau
        source, arithmetic = from_delta(with_spectrum(s, n, seed), "F32"), HostArithmetic()
        probes = certify.probe_vectors(n)
        gram = arithmetic.gram(source, probes, "float32")
        try:
            found = single.truncate(source, rule, arithmetic=arithmetic, gram=gram, probes=probes)
            assert found.threshold.rank_kept == 17
            seen.add("decided")
        except UnresolvedError as error:
            seen.add(str(error).partition(" ")[0])
    assert {"decided", "values"} <= seen


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_value_that_may_lie_on_either_side_of_the_threshold_is_not_decided(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One outside the windows that is as near as T is off; one inside that is nearer than the median is known."""
    n, rule = 400, HardThreshold()
    s = np.sort(np.random.default_rng(2).uniform(0.5, 1.5, n))
    s[-6:] = np.geomspace(40.0, 60.0, 6)
    s[-8:-6] = rule.estimate(s, n, n).tau * np.array([0.9995, 1.0005])
    source, cut = from_delta(with_spectrum(s, n), "F32"), rule.estimate(s, n, n).tau ** 2
    assert _truncated(source).threshold.rank_kept == 7
    original = single.ritz

    def moved(*arguments: object) -> Windows:
        windows = original(*arguments)  # type: ignore[arg-type]
        outside, values = windows.outside.copy(), windows.values.copy()
        if where == "outside":
            outside[-1] = cut + 0.9 * windows.blunt
        else:
            values[int(np.argmin(np.abs(values - cut)))] = cut * (1.0 + 1e-13)
        return replace(windows, outside=outside, values=values)

    monkeypatch.setattr(single, "ritz", moved)
    with pytest.raises(UnresolvedError, match="outside the window" if where == "outside" else "squared threshold"):
        _truncated(source)
