"""Times every backend on every case, whole: stored bits in, certified decision, merge, stored bits out.

Ours runs one BLAS thread per matrix, as a repair does, and on the CPU also two matrices at once on two workers, which
is how a repair uses further threads. The reference gets all threads or one, whichever is faster. The first run of each
contender is a warm-up: it is not timed, its memory is taken, and its answer is held against float64.
"""

from __future__ import annotations

import math
import os
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import numpy as np
from threadpoolctl import threadpool_limits

from streamrepair.benchmark import reference
from streamrepair.benchmark.cases import Case
from streamrepair.benchmark.conditions import BACKENDS, Conditions, refuse_too_large
from streamrepair.benchmark.exact import Exact, exact, merged_delta
from streamrepair.benchmark.machine import describe
from streamrepair.benchmark.records import Benchmark, CaseRecord, Check, Run
from streamrepair.benchmark.sources import MemorySource
from streamrepair.benchmark.spectra import pair
from streamrepair.decompose import ladder
from streamrepair.decompose.arithmetic import Arithmetic
from streamrepair.decompose.convert import STORED_TYPE, Raw
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.truncation import Truncation
from streamrepair.engine.gpu import unusable
from streamrepair.engine.numeric_threads import NumericThreads
from streamrepair.errors import NumericalError
from streamrepair.spectral.threshold import HardThreshold

_LEAST_SAMPLE_S = 0.25
"""A few hundredths of a second say more of when threads were woken than of what they do."""
_LEAST_PAIR_S = 1.0
"""Likewise of two workers, of whom one waits at the end of each sample for the other's last repair."""


@dataclass(frozen=True, slots=True)
class _Subject:
    """What all contenders of a case are given, and what they are held against."""

    source: MemorySource
    rule: HardThreshold
    answer: Exact | None


def measure(cases: Sequence[Case], conditions: Conditions, *, tell: Callable[[str], None]) -> Benchmark:
    """Measure all cases in order; `tell` gets a line before each.

    Raises:
        BudgetError: a case does not fit the memory that is free; nothing was measured.
        NumericalError: a backend failed on a case.
    """
    refuse_too_large(cases, conditions)
    records: list[CaseRecord] = []
    load = os.getloadavg()[0]
    with threadpool_limits(limits=conditions.threads):
        for number, case in enumerate(cases, 1):
            tell(f"{number} of {len(cases)}: {case.shape[0]}x{case.shape[1]} {case.spectrum}")
            records.append(measure_case(case, conditions))
    return Benchmark(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe(conditions.device),
        load_before=load,
        device=conditions.device,
        dtype=conditions.dtype,
        threads=conditions.threads,
        repeats=conditions.repeats,
        cases=tuple(records),
    )


def measure_case(case: Case, conditions: Conditions) -> CaseRecord:
    """Reference and backends on one synthetic pair.

    Raises:
        NumericalError: a backend failed.
    """
    source, rule = pair(case.shape, case.spectrum, conditions.dtype), HardThreshold()
    subject = _Subject(source, rule, exact(source, rule) if conditions.check else None)
    plain: Run | None = None
    absent = reference.absence()
    if not absent:
        try:
            plain = _reference(subject, conditions)
        except NumericalError as error:
            absent = f"{reference.NAME} failed: {error}"
    runs = []
    for backend in conditions.backends:
        try:
            runs.append(_run(subject, backend, plain, conditions))
        except NumericalError as error:
            raise NumericalError(f"{case.shape[0]}x{case.shape[1]} {case.spectrum}: {backend}: {error}") from error
    return CaseRecord(
        shape=case.shape,
        spectrum=case.spectrum,
        count=case.count,
        flops=thin_svd_flops(source.rows, source.cols),
        reference=plain,
        reference_absent=absent,
        runs=tuple(runs),
    )


def thin_svd_flops(m: int, n: int) -> int:
    """4·m·n² + 8·n³: all singular values and the right vectors of an m × n matrix, m ≥ n, by Golub–Reinsch.

    It is the same for every contender, so that ratios of rates are ratios of times; ours computes less than this.
    Source: Golub & Van Loan, Matrix Computations (4th ed.), figure 8.6.1.
    """
    return 4 * m * n * n + 8 * n**3


def _reference(subject: _Subject, conditions: Conditions) -> Run:
    source, rule, answer, device = subject.source, subject.rule, subject.answer, conditions.device
    reference.begin_device_peak(device)
    with reference.torch_threads(conditions.threads):
        rank, star = reference.repaired(source, rule, device)
        peak_bytes = reference.device_peak_bytes(device)
        upright = (star.T if source.wide else star).cpu().numpy()
        check = answer.check(rank, upright) if answer is not None else None
        del star, upright
    timed = {}
    # On small matrices, or where processors are taken, threads wait for each other: the reference gets the better way.
    for threads in sorted({conditions.threads, 1}) if device == "cpu" else [conditions.threads]:
        with reference.torch_threads(threads):
            reference.repaired(source, rule, device)
            timed[threads] = _timed(lambda: reference.repaired(source, rule, device), conditions.repeats)
    threads, samples = min(timed.items(), key=lambda item: statistics.median(item[1]))
    seconds = statistics.median(samples)
    return Run(
        name=reference.NAME,
        decided_by=f"{reference.NAME}-float32",
        threads=threads,
        samples=samples,
        seconds=seconds,
        gflops=_gflops(source, seconds),
        rank_kept=rank,
        peak_device_bytes=peak_bytes,
        check=check,
    )


def _run(subject: _Subject, backend: str, plain: Run | None, conditions: Conditions) -> Run:
    """One backend on one pair, BLAS held to one thread."""
    threads = NumericThreads()
    threads.hold()
    try:
        worker = _Worker(subject, backend, conditions.device, threads.hold)
        truncation, array_bytes, device_bytes = worker.warm_up()
        samples = _timed(worker.repair, conditions.repeats)
        two = conditions.device == "cpu" and conditions.threads > 1
        pair_samples = _two_at_once(worker, conditions.repeats) if two else None
    finally:
        threads.release()
    seconds = statistics.median(samples)
    pair_seconds = statistics.median(pair_samples) if pair_samples else None
    return Run(
        name=backend,
        decided_by=truncation.backend,
        climbed=truncation.climbed,
        threads=1,
        samples=samples,
        seconds=seconds,
        gflops=_gflops(subject.source, seconds),
        speedup=plain.seconds / seconds if plain else None,
        pair_seconds=pair_seconds,
        pair_speedup=2.0 * plain.seconds / pair_seconds if plain and pair_seconds else None,
        rank_kept=truncation.threshold.rank_kept,
        peak_array_bytes=array_bytes,
        peak_device_bytes=device_bytes,
        check=_checked(subject, truncation, worker.arithmetic),
    )


def _checked(subject: _Subject, truncation: Truncation, arithmetic: Arithmetic) -> Check | None:
    if subject.answer is None:
        return None
    star = merged_delta(subject.source, truncation.vh, arithmetic)
    return subject.answer.check(truncation.threshold.rank_kept, star)


class _Worker:
    """One backend with its own working memory and a place for its output."""

    def __init__(self, subject: _Subject, backend: str, device: str, hold: Callable[[], None]) -> None:
        self._subject, self._backend, self._device, self._hold = subject, backend, device, hold
        self._source = subject.source
        self._out: Raw = np.zeros(self._source.base.shape, STORED_TYPE[self._source.dtype])
        self.arithmetic: Arithmetic = _arithmetic(device)

    def twin(self) -> _Worker:
        """Another worker with memory of its own."""
        return _Worker(self._subject, self._backend, self._device, self._hold)

    def repair(self) -> Truncation:
        """Decide, merge, round: both passes of a repair."""
        self._hold()  # in the thread that computes
        backend, estimate = BACKENDS[self._backend]
        truncation = ladder.decompose(
            self._source,
            self._subject.rule,
            arithmetic=self.arithmetic,
            backend=backend,
            estimate=estimate,
            sharp=self._source.dtype not in ("BF16", "F16"),
        )
        merge = self.arithmetic.merger(truncation.vh, self._source.dtype)
        for block, merged in merge.merged(self._source.panels()):
            rows = slice(block.start, block.start + block.rows)
            self._out[(slice(None), rows) if block.wide else rows] = merged
        return truncation

    def warm_up(self) -> tuple[Truncation, int, int | None]:
        """A repair with its peaks: bytes of NumPy arrays beyond inputs and output, and on the device."""
        reference.begin_device_peak(self._device)
        tracemalloc.start()
        try:
            truncation = self.repair()
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        return truncation, peak_bytes, reference.device_peak_bytes(self._device)


def _arithmetic(device: str) -> Arithmetic:
    if device == "cpu":
        return HostArithmetic()
    from streamrepair.decompose.device import DeviceArithmetic  # torch is loaded for a GPU only

    try:
        return DeviceArithmetic(device)
    except RuntimeError as error:
        raise unusable(device, error) from error


def _two_at_once(worker: _Worker, repeats: int) -> tuple[float, ...]:
    """Seconds in which each of two workers repairs the matrix once, none waiting for the other between two of them."""
    workers = (worker, worker.twin())
    with ThreadPoolExecutor(len(workers)) as pool:

        def both(rounds: int) -> None:
            for future in [pool.submit(_repeatedly, one.repair, rounds) for one in workers]:
                future.result()

        both(1)
        return _samples(both, repeats, least_s=_LEAST_PAIR_S)


def _timed(work: Callable[[], object], repeats: int) -> tuple[float, ...]:
    return _samples(partial(_repeatedly, work), repeats)


def _repeatedly(work: Callable[[], object], rounds: int) -> None:
    for _ in range(rounds):
        work()


def _samples(work: Callable[[int], None], repeats: int, *, least_s: float = _LEAST_SAMPLE_S) -> tuple[float, ...]:
    """Seconds per round of `work`, which is given how many; short rounds are taken several at a time."""
    first = _seconds(work, 1)
    if (rounds := math.ceil(least_s / first)) <= 1:
        return (first, *(_seconds(work, 1) for _ in range(repeats - 1)))
    return tuple(_seconds(work, rounds) / rounds for _ in range(repeats))


def _seconds(work: Callable[[int], None], rounds: int) -> float:
    began = time.perf_counter()
    work(rounds)
    return time.perf_counter() - began


def _gflops(source: MemorySource, seconds: float) -> float:
    return thin_svd_flops(source.rows, source.cols) / seconds / 1e9
