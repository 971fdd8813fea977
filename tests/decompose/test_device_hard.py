"""Hard matrices and faulty solvers on the GPU's route, as torch's CPU runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamrepair.decompose import gram, ladder
from streamrepair.decompose.arithmetic import on_host
from streamrepair.decompose.batched import truncate_batch
from streamrepair.decompose.device import DeviceArithmetic
from streamrepair.decompose.device.rates import Rates
from streamrepair.decompose.truncation import Truncation
from streamrepair.errors import NumericalError
from tests.decompose.sources import ArraySource, fine_tuned, from_delta, low_rank_plus_noise, with_spectrum
from tests.decompose.test_backends import RULE, _check, _heavy, _merged, _oracle, _planted

DEVICES = {
    "fast float64": DeviceArithmetic("cpu", measured=Rates(1e12, 1e12)),
    "slow float64": DeviceArithmetic("cpu", measured=Rates(1e12, 1e10)),
}


def _decomposed(source: ArraySource, device: str) -> Truncation:
    return ladder.decompose(source, RULE, arithmetic=DEVICES[device], backend="auto")


def _sparse(share: float) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(8)
    return np.where(rng.random((400, 120)) < share, rng.standard_normal((400, 120)), 0.0)


MATRICES: dict[str, Callable[[], ArraySource]] = {
    **{
        f"planted {gap}, s_max {s_max:g}": lambda gap=gap, s_max=s_max: from_delta(_planted(gap, 400, 150, s_max))
        for gap in (1e-6, 1e-5, 1e-4, 1e-3)
        for s_max in (3.0, 30.0, 1e4)
    },
    "planted 1e-4, float32": lambda: from_delta(_planted(1e-4, 900, 150), "F32"),
    "sparse 10%": lambda: from_delta(_sparse(0.1), "BF16"),
    "sparse 50%": lambda: from_delta(_sparse(0.5), "BF16"),
    "1e-30": lambda: from_delta(1e-30 * low_rank_plus_noise(300, 80, 5), "F32"),
    "1e30": lambda: from_delta(1e30 * low_rank_plus_noise(300, 80, 5), "F32"),
    "1e-30, heavy": lambda: from_delta(1e-30 * _heavy(300, 80, 0.6), "F32"),
    "wide": lambda: from_delta(low_rank_plus_noise(6_000, 40, 3).T, "BF16"),
    "tall": lambda: from_delta(low_rank_plus_noise(30_000, 24, 3), "BF16"),
    "one row": lambda: from_delta(np.arange(1.0, 60.0)[None, :], "F32"),
    "one column": lambda: from_delta(np.arange(1.0, 60.0)[:, None], "F32"),
    "two rows": lambda: from_delta(np.random.default_rng(3).standard_normal((2, 60)), "F32"),
    "square, heavy": lambda: from_delta(_heavy(200, 200, 0.5), "F32"),
    "bf16-rounded low rank": lambda: fine_tuned(with_spectrum(np.append(np.ones(4), np.zeros(86)), 200), "BF16"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("matrix", MATRICES)
def test_hard_matrices_keep_what_a_float64_svd_keeps(matrix: str, device: str) -> None:
    source = MATRICES[matrix]()
    truncation = _decomposed(source, device)
    assert truncation.backend in ("gram-float32", "gram-float64")
    assert all(reason.startswith("gram-float32") for reason in truncation.climbed)  # float64 on the device sufficed
    if "planted" in matrix:
        assert truncation.undecidable == 0
    _check(source, truncation)


@pytest.mark.parametrize("device", DEVICES)
def test_equal_values_on_the_threshold_are_undecidable_not_wrong(device: str) -> None:
    m, n = 400, 120
    s = np.linspace(0.5, 1.5, n)
    tau = RULE.estimate(s, m, n).tau
    s[-5:] = [tau, tau, 4.0 * tau, 5.0 * tau, 6.0 * tau]
    truncation = _decomposed(from_delta(with_spectrum(s, m)), device)
    assert truncation.backend == "gram-float64"
    assert truncation.undecidable == 2
    assert 3 <= truncation.threshold.rank_kept <= 5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ["rank one", "low rank", "sparse rows", "zero", "merged adapter"])
def test_a_zero_median_is_no_noise(case: str, device: str) -> None:
    rng = np.random.default_rng(2)
    delta = with_spectrum(np.append([3.0, 2.0, 1.0], np.zeros(77)), 200)
    if case == "rank one":
        delta = np.outer(np.arange(200.0), np.ones(80))
    elif case == "sparse rows":
        delta[30:] = 0.0
    elif case == "zero":
        delta[...] = 0.0
    elif case == "merged adapter":  # small integers: B·A is exact
        delta = (rng.integers(-9, 9, (200, 8)) @ rng.integers(-9, 9, (8, 80))).astype(np.float64)
    truncation = _decomposed(from_delta(delta), device)
    assert truncation.noise_free
    assert truncation.frob_delta_in == pytest.approx(float(np.linalg.norm(delta)), rel=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@given(
    shape=st.tuples(st.integers(2, 50), st.integers(1, 6)),
    power=st.floats(0.0, 1.8),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
    wide=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_power_laws_at_any_scale(device: str, shape: tuple[int, int], power: float, scale: float, wide: bool) -> None:
    n, ratio = shape
    delta = scale * with_spectrum(np.arange(1.0, n + 1) ** -power, n * ratio, seed=n)
    source = from_delta(delta.T if wide else delta, "F32")
    truncation = _decomposed(source, device)
    if not truncation.noise_free:
        _check(source, truncation)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wide", [False, True])
def test_the_merged_result_is_the_float64_one_but_for_rounding(device: str, wide: bool) -> None:
    source = fine_tuned(low_rank_plus_noise(2_500, 60, 5), "BF16")
    source = source.transposed() if wide else source
    truncation = _decomposed(source, device)
    _, threshold, star = _oracle(source.delta())
    ours = _merged(source, truncation, DEVICES[device], "F32")
    base = _merged(source, replace(truncation, vh=np.zeros((0, 60))), DEVICES[device], "F64")
    expected = star(threshold.rank_kept)
    assert np.linalg.norm(ours - base - expected) <= 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("way", ["alone", "in a batch"])
def test_a_product_that_is_not_quite_symmetric_is_no_obstacle(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Nobody promises that a product ΔᵀΔ is symmetric to the last bit: here the upper triangle is some bits off."""
    source = from_delta(low_rank_plus_noise(900, 150, 5), "BF16")
    noise = torch.randn((150, 150), generator=torch.Generator().manual_seed(1)).triu(1)

    def off(product: torch.Tensor) -> torch.Tensor:
        if product.dtype == torch.float32 and product.shape[-2:] == (150, 150):
            product += 6e-8 * product.diagonal(dim1=-2, dim2=-1).mean() * noise
        return product

    mm, matmul = torch.mm, torch.Tensor.__matmul__
    monkeypatch.setattr(torch, "mm", lambda one, other, out: off(mm(one, other, out=out)))
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda one, other: off(matmul(one, other)))
    if way == "alone":
        found = gram.truncate(source, RULE, arithmetic=DEVICES["slow float64"], precision="float32")
    else:
        found = truncate_batch([source, source], RULE, DEVICES["slow float64"], precision="float32")[1]
    _check(source, found)


Answer = tuple[torch.Tensor, torch.Tensor]


def _swapped(values: torch.Tensor, vectors: torch.Tensor) -> Answer:
    return values, vectors.flip(1)


def _neighbours_swapped(values: torch.Tensor, vectors: torch.Tensor) -> Answer:
    """A kept vector and the first dropped one change places."""
    order = list(range(len(values)))
    order[-6], order[-5] = order[-5], order[-6]
    return values, vectors[:, order]


def _repeated(values: torch.Tensor, vectors: torch.Tensor) -> Answer:
    vectors[:, -1] = vectors[:, -2]
    return values, vectors


def _leaning(values: torch.Tensor, vectors: torch.Tensor) -> Answer:
    vectors[:, -1] += 1e-7 * vectors[:, -2]
    return values, vectors


def _nan_vector(values: torch.Tensor, vectors: torch.Tensor) -> Answer:
    vectors[3, -2] = float("nan")
    return values, vectors


def _nan_value(values: torch.Tensor, vectors: torch.Tensor) -> Answer:
    values[7] = float("nan")
    return values, vectors


def _infinite(values: torch.Tensor, vectors: torch.Tensor) -> Answer:
    values[-1] = float("inf")
    return values, vectors


def _zeros(values: torch.Tensor, vectors: torch.Tensor) -> Answer:
    return torch.zeros_like(values), torch.zeros_like(vectors)


def _identity(values: torch.Tensor, vectors: torch.Tensor) -> Answer:
    """What a batched solver of old cuSOLVER returned: unit vectors and the diagonal."""
    return values, torch.eye(len(values), dtype=values.dtype)


def _scaled_values(values: torch.Tensor, vectors: torch.Tensor) -> Answer:
    return values * (1.0 + 1e-7), vectors


def _one_raised(values: torch.Tensor, vectors: torch.Tensor) -> Answer:
    values[-6] = 0.99 * values[-5]
    return values, vectors


def _one_lowered(values: torch.Tensor, vectors: torch.Tensor) -> Answer:
    values[-5] = 1.01 * values[-6]
    return values, vectors


def _negative(values: torch.Tensor, vectors: torch.Tensor) -> Answer:
    return -values, vectors


FAULTS = [
    *(_swapped, _neighbours_swapped, _repeated, _leaning, _nan_vector, _nan_value, _infinite, _zeros, _identity),
    *(_scaled_values, _one_raised, _one_lowered, _negative),
]


@pytest.fixture
def source() -> ArraySource:
    """Five values above τ, in a gap; tall enough for float32 to be tried."""
    return from_delta(low_rank_plus_noise(300, 90, 5), "F32")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_eigh_is_caught_by_the_certificate(
    monkeypatch: pytest.MonkeyPatch, source: ArraySource, fault: Callable[..., Answer], precision: Any
) -> None:
    original = torch.linalg.eigh
    device = DEVICES["fast float64"]
    assert gram.truncate(source, RULE, arithmetic=device, precision=precision).threshold.rank_kept == 5
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: fault(*original(matrix)))
    with pytest.raises(NumericalError):
        gram.truncate(source, RULE, arithmetic=device, precision=precision)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_and_another_rung_gives_the_right_answer(
    monkeypatch: pytest.MonkeyPatch, source: ArraySource, fault: Callable[..., Answer]
) -> None:
    original = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: fault(*original(matrix)))
    truncation = _decomposed(source, "slow float64")
    assert [reason.partition(":")[0] for reason in truncation.climbed] == ["gram-float32", "gram-float64"]
    assert isinstance(on_host(truncation.vh), np.ndarray)
    _check(source, truncation)


def _says_no(original: Callable[..., Any], matrix: torch.Tensor) -> Any:
    factor, info = original(matrix)
    return factor, torch.ones_like(info)


def _nan_factor(original: Callable[..., Any], matrix: torch.Tensor) -> Any:
    factor, info = original(matrix)
    return factor * float("nan"), info


def _raises(original: Callable[..., Any], matrix: torch.Tensor) -> Any:
    raise RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED\nmore")


@pytest.mark.parametrize("fault", [_says_no, _nan_factor, _raises])
def test_without_the_proof_of_a_count_the_device_is_left(
    monkeypatch: pytest.MonkeyPatch, source: ArraySource, fault: Callable[..., Any]
) -> None:
    original = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: fault(original, matrix))
    truncation = _decomposed(source, "fast float64")
    assert [reason.partition(":")[0] for reason in truncation.climbed] == ["gram-float64"]
    assert "\n" not in truncation.climbed[0]
    _check(source, truncation)
