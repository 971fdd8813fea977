"""The repair of matrices, one or a batch of them: what is kept of a delta is decided here.

`second_pass` merges, rounds once and writes.

Loaded when the first tensor that differs is met: a run that only copies needs none of SciPy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from streamrepair.decompose import ladder
from streamrepair.decompose.arithmetic import Arithmetic
from streamrepair.decompose.batched import truncate_batch
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.truncation import NonFiniteDeltaError, Truncation
from streamrepair.engine import cost
from streamrepair.engine.copying import copy
from streamrepair.engine.gpu import unusable
from streamrepair.engine.job import Job, Outcome
from streamrepair.engine.memory import SINGLE_COLUMNS
from streamrepair.engine.nonfinite import find_nonfinite
from streamrepair.engine.pace import Pace
from streamrepair.engine.second_pass import failed, written
from streamrepair.engine.short_memory import Patient, ReservedHost
from streamrepair.engine.task import finished, passed_through
from streamrepair.engine.view import MatrixView
from streamrepair.errors import NumericalError, brief
from streamrepair.report import TensorRecord
from streamrepair.spectral.threshold import HardThreshold


def repair(job: Job) -> tuple[TensorRecord, str | None]:
    """Repair the job's matrix; returns its record, and where an input is not finite if that is allowed.

    Raises:
        InputError: an input holds NaN or infinity.
        NumericalError: no backend could decide, or the result overflows its dtype.
    """
    host = ReservedHost(job)
    return _Repair(job, host, _arithmetic(job, host)).done()


def repair_batch(jobs: Sequence[Job]) -> Iterator[Outcome]:
    """Repair matrices of one shape, decided together; outcomes of those that are to be written.

    Raises:
        InputError, NumericalError: likewise, for the first member that fails.
    """
    began = time.perf_counter()
    host = ReservedHost(jobs[0])  # one for all: their needs are the same, and only one at a time is on the CPU
    arithmetic = _arithmetic(jobs[0], host)
    repairs = [_Repair(job, host, arithmetic, member=i) for i, job in enumerate(jobs)]
    found = _decided_together(repairs)
    to_write = [repair for repair in repairs if not repair.job.dry]
    for repair in repairs:
        if repair.job.dry:
            to_write[0].take_reads_of(repair)
    share_s = (time.perf_counter() - began) / len(to_write)
    for repair in repairs:
        batched = found.pop(0)  # kept vectors are let go one after another
        if repair.job.dry:
            continue
        began = time.perf_counter()
        with repair.job.worker.lane.member(repair.job.task.name):
            repair.job.spent.decompose_s += share_s
            record, nonfinite = repair.done(batched)
        yield finished(repair.job, record, nonfinite, share_s + time.perf_counter() - began)


def _decided_together(repairs: Sequence[_Repair]) -> list[Truncation | NumericalError | None]:
    """For each what a batch of all made of it; None where there is no batch."""
    first = repairs[0]
    place = first.arithmetic.in_batches if isinstance(first.arithmetic, Patient) else None
    if place is None or len(repairs) < 2:
        return [None] * len(repairs)
    precision = ladder.precisions(first.arithmetic, first.rule, first.view.cols, sharp=first.sharp)[0]
    try:
        return [*truncate_batch([repair.view for repair in repairs], first.rule, place, precision=precision)]
    except RuntimeError as error:  # torch's own, of a device that fails at everything
        reason = brief(error)
    return [NumericalError(reason) for _ in repairs]


class _Repair:
    """A matrix at work.

    Args:
        host: the CPU for when the device fails. member: which one it is of several that are held at once.
    """

    def __init__(self, job: Job, host: HostArithmetic, arithmetic: Arithmetic, *, member: int = 0) -> None:
        settings = job.around.settings
        self.job, self.arithmetic, self._host = job, arithmetic, host
        self.rule = HardThreshold(scale=settings.scale, sigma=settings.sigma)
        self._pace = Pace(cost.stages(job.task, job.task.place), max(job.task.out.shape), job.tell)
        self.view = _view(job, self._pace.advance, member)
        # In small matrices a delta as large as its weights shows the difference.
        self.sharp = job.task.out.dtype not in ("BF16", "F16") or self.view.cols < SINGLE_COLUMNS

    def done(self, batched: Truncation | NumericalError | None = None) -> tuple[TensorRecord, str | None]:
        """Decide, unless a batch did, merge and write.

        Raises:
            InputError: an input holds NaN or infinity.
            NumericalError: no backend could decide, or the result overflows its dtype.
        """
        job = self.job
        began = time.perf_counter()
        try:
            with self._pace:
                truncation = self._decided(batched)
        except NonFiniteDeltaError as error:
            where = find_nonfinite(job)
            if where is None:
                raise failed(job, error) from error
            digest, _ = copy(job)
            return passed_through(job.task, "kept_ft", where, digest), where
        except NumericalError as error:
            raise failed(job, error) from error
        job.spent.decompose_s += time.perf_counter() - began
        record = written(job, self.view, truncation, self.arithmetic, self._host)
        self.take_reads_of(self)
        return record, None

    def _decided(self, batched: Truncation | NumericalError | None) -> Truncation:
        settings = self.job.around.settings
        return ladder.decompose(
            self.view,
            self.rule,
            arithmetic=self.arithmetic,
            backend=settings.backend,
            sharp=self.sharp,
            full_fits=self.job.around.full_fits[self.job.task.name],
            estimate=settings.noise_estimate,
            host=self._host,
            batched=batched,
        )

    def take_reads_of(self, other: _Repair) -> None:
        """Count what was read for a matrix, itself or another, as read for this one."""
        self.job.spent.read_s += other.view.stats.seconds
        self.job.spent.bytes_read += other.view.stats.bytes


def _arithmetic(job: Job, host: HostArithmetic) -> Arithmetic:
    if job.around.arithmetic is not None:
        chosen = job.around.arithmetic(job.worker.device, job.scratch)
        return chosen if isinstance(chosen, HostArithmetic) else Patient(chosen)
    if job.worker.device == "cpu":
        return host
    from streamrepair.decompose.device import DeviceArithmetic  # torch is loaded for a GPU only

    try:
        return Patient(DeviceArithmetic(job.worker.device, host=host))
    except RuntimeError as error:  # it cannot even be asked for its rates
        raise unusable(job.worker.device, error) from error


def _view(job: Job, advance: Callable[[int], None], member: int) -> MatrixView:
    base, task, around = job.task.pairing.base, job.task, job.around
    assert base is not None
    return MatrixView(
        files=around.files,
        base=base,
        ft=task.ft,
        scratch=job.scratch,
        panel_rows=task.panel_rows,
        check_stop=around.check_stop,
        advance=advance,
        lane=job.worker.lane,
        member=member,
    )
