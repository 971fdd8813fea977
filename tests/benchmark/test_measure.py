"""What is measured is true: ranks, errors and rates; and a wrong backend is seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import scipy.linalg
import torch

from streamrepair.benchmark import measure as measuring
from streamrepair.benchmark import reference
from streamrepair.benchmark.cases import Case
from streamrepair.benchmark.conditions import Conditions
from streamrepair.benchmark.exact import exact, merged_delta
from streamrepair.benchmark.measure import measure, thin_svd_flops
from streamrepair.benchmark.records import Benchmark, Run
from streamrepair.benchmark.spectra import pair
from streamrepair.decompose import ladder
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.truncation import Truncation
from streamrepair.errors import NumericalError
from streamrepair.spectral.threshold import HardThreshold

CONDITIONS = Conditions(backends=("gram", "full"), dtype="BF16", device="cpu", threads=2, repeats=2, check=True)
CASES = (Case((96, 64), "gapped"), Case((128, 300), "heavy", count=7))


def _silent(_: str) -> None: ...


@pytest.fixture(scope="module")
def result() -> Benchmark:
    return measure(CASES, CONDITIONS, tell=_silent)


def test_ranks_are_those_of_a_float64_svd(result: Benchmark) -> None:
    for case, record in zip(CASES, result.cases, strict=True):
        delta = pair(case.shape, case.spectrum, "BF16").delta()
        rank = HardThreshold().estimate(scipy.linalg.svdvals(delta), *delta.shape).rank_kept
        assert [run.name for run in record.runs] == ["gram", "full"]
        for run in record.runs:
            assert run.check is not None
            assert run.rank_kept == run.check.rank_exact == rank
            assert run.check.passed
            assert run.check.delta_error < 1e-5
    assert result.faults == ()


def test_times_rates_and_ratios_belong_together(result: Benchmark) -> None:
    for case, record in zip(CASES, result.cases, strict=True):
        assert record.reference is not None
        assert record.count == case.count
        assert record.flops == thin_svd_flops(max(case.shape), min(case.shape))
        for run in record.runs:
            assert len(run.samples) == CONDITIONS.repeats
            assert min(run.samples) <= run.seconds <= max(run.samples)
            assert run.gflops == pytest.approx(record.flops / run.seconds / 1e9)
            assert run.speedup == pytest.approx(record.reference.seconds / run.seconds)
            assert run.pair_seconds is not None
            assert run.pair_speedup == pytest.approx(2 * record.reference.seconds / run.pair_seconds)


def test_peak_covers_the_gram_matrix_and_is_no_larger_than_a_few_matrices(result: Benchmark) -> None:
    for record in result.cases:
        (m, n) = (max(record.shape), min(record.shape))
        gram = record.runs[0]
        assert gram.peak_array_bytes is not None
        assert 8 * n * n <= gram.peak_array_bytes <= 40 * n * n + 24 * m * n + 1_000_000
        assert gram.peak_device_bytes is None


def test_a_record_survives_json(result: Benchmark) -> None:
    assert msgspec.json.decode(msgspec.json.encode(result), type=Benchmark, strict=True) == result


def test_flops_of_a_thin_svd() -> None:
    assert thin_svd_flops(7, 5) == 4 * 7 * 25 + 8 * 125


def test_one_thread_measures_no_second_worker_and_no_check_leaves_the_check_out() -> None:
    found = measure(CASES[:1], replace(CONDITIONS, threads=1, check=False, backends=("gram",)), tell=_silent)
    (run,) = found.cases[0].runs
    assert run.pair_seconds is run.pair_speedup is run.check is None
    assert found.cases[0].reference is not None
    assert found.cases[0].reference.threads == 1


def test_without_torch_the_backends_are_measured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "absence", lambda: "torch is not installed")
    found = measure(CASES[:1], CONDITIONS, tell=_silent)
    assert found.cases[0].reference is None
    assert found.cases[0].reference_absent == "torch is not installed"
    assert [run.speedup for run in found.cases[0].runs] == [None, None]
    assert found.faults == ()


def _measured_with(monkeypatch: pytest.MonkeyPatch, change: Callable[[Truncation], Truncation]) -> Benchmark:
    """A measurement in which every decision is passed through `change`."""
    decompose = ladder.decompose
    monkeypatch.setattr(ladder, "decompose", lambda *args, **knobs: change(decompose(*args, **knobs)))
    return measure(CASES[1:], replace(CONDITIONS, backends=("gram",)), tell=_silent)


def _run(found: Benchmark) -> Run:
    return found.cases[0].runs[0]


def test_a_backend_that_keeps_one_value_too_few_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(right: Truncation) -> Truncation:
        rank = right.threshold.rank_kept - 1
        return replace(right, threshold=replace(right.threshold, rank_kept=rank), vh=right.vh[1:])

    found = _measured_with(monkeypatch, change)
    check = _run(found).check
    assert check is not None
    assert not check.rank_agrees
    assert _run(found).rank_kept == check.rank_exact - 1
    assert len(found.faults) == 1
    assert found.faults[0].startswith("128x300 heavy: gram keeps")


def test_a_backend_with_wrong_vectors_is_a_fault_even_if_its_rank_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(right: Truncation) -> Truncation:
        turned = right.vh.copy()
        turned[0] += 3e-2 * np.roll(turned[0], 1)
        return replace(right, vh=turned)

    found = _measured_with(monkeypatch, change)
    check = _run(found).check
    assert check is not None
    assert check.rank_agrees
    assert check.delta_error > 1e-4
    assert found.faults


def test_a_backend_that_fails_ends_the_measurement_with_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(_: Truncation) -> Truncation:
        raise NumericalError("no answer")

    with pytest.raises(NumericalError, match="128x300 heavy: gram: no answer"):
        _measured_with(monkeypatch, change)


def test_a_result_that_is_not_finite_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NumericalError, match="not finite"):
        _measured_with(monkeypatch, lambda right: replace(right, vh=right.vh * np.nan))


def test_a_merge_that_drops_a_vector_is_seen() -> None:
    """The error is that of Δ* as merged, not of the vectors alone."""

    class Dropping(HostArithmetic):
        def merger(self, vh, out_dtype):  # type: ignore[no-untyped-def]
            return super().merger(vh[1:], out_dtype)

    source, rule = pair((64, 96), "heavy", "BF16"), HardThreshold()
    answer = exact(source, rule)
    truncation = ladder.decompose(source, rule, arithmetic=HostArithmetic(), backend="gram")
    rank = truncation.threshold.rank_kept
    assert answer.check(rank, merged_delta(source, truncation.vh, HostArithmetic())).passed
    assert not answer.check(rank, merged_delta(source, truncation.vh, Dropping())).passed


def test_the_output_is_base_plus_the_kept_delta_rounded_once() -> None:
    """What is timed is a repair: its result, not only its decision, is right."""
    subject = measuring._Subject(pair((64, 96), "heavy", "F32"), HardThreshold(), None)
    worker = measuring._Worker(subject, "gram", "cpu", lambda: None)
    worker.repair()
    expected = subject.source.base.astype(np.float64) + exact(subject.source, subject.rule).star.T
    np.testing.assert_array_equal(worker._out, expected.astype(np.float32))


def test_a_cards_peak_can_begin_before_anything_was_done_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own reset raises until CUDA is initialised, which a measurement is the first to need."""
    began: list[object] = []

    def reset(device: torch.device) -> None:
        if not began:
            raise RuntimeError(f"Allocator not initialized for device {device.index}: did you call init?")
        began.append(device)

    monkeypatch.setattr(torch.cuda, "init", lambda: began.append("init"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    reference.begin_device_peak("cuda:0")
    assert began == ["init", torch.device("cuda:0")]
