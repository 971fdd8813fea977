from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from streamrepair.decompose import certify, ladder
from streamrepair.decompose.arithmetic import Merger, on_host
from streamrepair.decompose.device import DeviceArithmetic
from streamrepair.decompose.device.rates import Rates
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.truncation import Truncation
from streamrepair.spectral.threshold import HardThreshold
from tests.decompose.memory_faults import BRIEFLY, MESSAGE, Exhausted, above, at
from tests.decompose.sources import ArraySource, fine_tuned, low_rank_plus_noise

Raw = NDArray[np.uint16]

RULE = HardThreshold()
FAST, SLOW = Rates(1e12, 1e12), Rates(1e12, 1e10)


def _device(rates: Rates = FAST) -> DeviceArithmetic:
    return DeviceArithmetic("cpu", measured=rates)


def _decomposed(source: ArraySource, arithmetic: DeviceArithmetic) -> Truncation:
    return ladder.decompose(source, RULE, arithmetic=arithmetic, backend="auto")


def _merged(source: ArraySource, merger: Merger) -> Raw:
    """The whole result as stored; every row exactly once."""
    out = np.zeros(source.ft.shape, np.uint16)
    seen = np.zeros(source.rows, np.int64)
    for block, raw in merger.merged(source.panels()):
        rows = slice(block.start, block.start + block.rows)
        out[(slice(None), rows) if block.wide else rows] = raw
        seen[rows] += 1
    assert np.all(seen == 1)
    return out


def _sources() -> dict[str, ArraySource]:
    tall = fine_tuned(low_rank_plus_noise(5_000, 60, 4), "BF16", panel_blocks=2)
    return {"tall": tall, "wide": tall.transposed()}


SOURCES = _sources()


@pytest.mark.parametrize("way", SOURCES)
@pytest.mark.parametrize("rates", [FAST, SLOW], ids=["float64", "float32"])
def test_memory_that_runs_out_at_any_operation_costs_time_and_no_correctness(way: str, rates: Rates) -> None:
    source = SOURCES[way]
    arithmetic = _device(rates)
    with at(-1) as counting:
        sound = _decomposed(source, arithmetic)
        out = _merged(source, arithmetic.merger(sound.vh, "BF16"))
    failures, expected_lost = 0, _lost_on_the_host(source, sound)
    for number in range(0, counting.operations, 5):
        arithmetic = _device(rates)
        with at(number) as memory:
            found = _decomposed(source, arithmetic)
            merger = arithmetic.merger(found.vh, "BF16")
            mine = _merged(source, merger)
            lost = merger.lost()
        failures += memory.failures
        assert found.threshold.rank_kept == sound.threshold.rank_kept
        assert found.threshold.tau == pytest.approx(sound.threshold.tau, rel=1e-9 if rates is FAST else 1e-6)
        assert np.mean(mine != out) < 1e-3  # a last bit here and there: another precision or another shape of product
        assert lost == pytest.approx(expected_lost, rel=1e-3)
    assert failures > 10


def _lost_on_the_host(source: ArraySource, truncation: Truncation) -> float:
    merger = HostArithmetic().merger(on_host(truncation.vh), "BF16")
    _merged(source, merger)
    return merger.lost()


@pytest.mark.parametrize("way", SOURCES)
def test_a_block_that_does_not_fit_crosses_in_pieces_and_no_number_changes(way: str) -> None:
    source = SOURCES[way]
    probes = certify.probe_vectors(source.cols)
    whole = _device().gram(source, probes, "float64")
    with above(2048 * source.cols * 2 // 8, torch.uint8) as memory:  # an eighth of a block as stored
        pieces = _device().gram(source, probes, "float64")
    assert memory.failures
    assert pieces.trace == whole.trace
    np.testing.assert_array_equal(pieces.images, whole.images)
    np.testing.assert_array_equal(pieces.exact_images, whole.exact_images)


def test_no_memory_for_the_gram_matrix_leaves_it_to_the_cpu() -> None:
    source = SOURCES["tall"]
    with above(20_000) as memory:
        found = _decomposed(source, _device())
    assert memory.failures
    assert found.backend == "gram-float64"
    assert found.climbed == (f"gram-float64: {BRIEFLY}",)
    assert isinstance(found.vh, np.ndarray)


@pytest.mark.parametrize("way", SOURCES)
def test_a_merge_goes_on_with_smaller_blocks(way: str) -> None:
    """2048 rows of 60 in float32 are 492 kB; 256 of them fit."""
    source = SOURCES[way]
    truncation = _decomposed(source, _device())
    expected = _merged(source, _device().merger(truncation.vh, "BF16"))
    merger = _device().merger(truncation.vh, "BF16")
    with above(100_000) as memory:
        out = _merged(source, merger)
    assert memory.failures >= 3
    assert merger.climbed == ()
    assert np.mean(out != expected) < 1e-3


@pytest.mark.parametrize("way", SOURCES)
@pytest.mark.parametrize("spent", [0, 3, 40])
def test_a_merge_goes_on_with_the_cpu_from_the_block_that_failed(way: str, spent: int) -> None:
    """After some operations nothing larger than a vector can be had any more."""
    source = SOURCES[way]
    truncation = _decomposed(source, _device())
    expected = _merged(source, _device().merger(truncation.vh, "BF16"))
    merger = _device().merger(truncation.vh, "BF16")
    with Exhausted(lambda number, allocated: number >= spent and allocated > 1_000):
        out = _merged(source, merger)
    assert merger.climbed == (f"merge: {BRIEFLY}",)
    assert np.mean(out != expected) < 1e-3
    assert merger.lost() == pytest.approx(_lost_on_the_host(source, truncation), rel=1e-3)


def test_other_failures_of_a_device_leave_the_merge_to_the_cpu_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source = SOURCES["tall"]
    truncation = _decomposed(source, _device())

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.linalg, "vector_norm", broken)
    merger = _device().merger(truncation.vh, "BF16")
    _merged(source, merger)
    assert merger.climbed == ("merge: CUDA error: an illegal memory access was encountered",)


def test_a_device_that_gives_no_stream_leaves_the_merge_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    source = SOURCES["tall"]
    arithmetic = _device()
    truncation = _decomposed(source, arithmetic)
    expected = _merged(source, arithmetic.merger(truncation.vh, "BF16"))

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cpu, "Stream", broken)
    merger = arithmetic.merger(truncation.vh, "BF16")
    assert np.mean(_merged(source, merger) != expected) < 1e-3
    assert merger.climbed == ("merge: CUDA error: an illegal memory access was encountered",)


@pytest.mark.parametrize(
    "words",
    [
        MESSAGE,
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasSgemm( handle, …)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`",
        'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":1165, please report',
    ],
)
def test_memory_that_a_library_could_not_get_counts_as_such(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    """It is said in an error that is not torch's OutOfMemoryError: smaller blocks are tried, not the CPU."""
    source = SOURCES["tall"]
    truncation = _decomposed(source, _device())
    original, calls = torch.linalg.vector_norm, 0

    def once(values: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError(words)
        return original(values, dtype=dtype)

    monkeypatch.setattr(torch.linalg, "vector_norm", once)
    merger = _device().merger(truncation.vh, "BF16")
    _merged(source, merger)
    assert merger.climbed == ()


def test_a_triangular_factor_without_memory_is_torchs_error() -> None:
    with above(10_000), pytest.raises(torch.OutOfMemoryError):
        _device().triangular_factor(SOURCES["tall"])
