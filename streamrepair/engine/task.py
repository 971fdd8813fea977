"""One task, start to finish: read both sides, decide, write the result, return the record.

The same function runs wherever an executor puts it. It writes only its own tensor's bytes, so tasks may run in any
order, at once, and again after a crash, with the same result.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal

import msgspec

from streamrepair.engine.copying import copy, copy_while_equal
from streamrepair.engine.job import Job, Outcome, Surroundings
from streamrepair.engine.nonfinite import check_base
from streamrepair.engine.plan import Task, Unit
from streamrepair.engine.worker import Worker
from streamrepair.report import TensorRecord


def run_unit(unit: Unit, around: Surroundings, worker: Worker) -> Iterator[Outcome]:
    """Do a task, or a batch of them; outcomes as they come.

    Raises:
        StreamRepairError: as `run_task` does.
    """
    if isinstance(unit, Task):
        yield run_task(unit, around, worker)
        return
    from streamrepair.engine.batch_task import run_batch

    yield from run_batch(unit, around, worker)


def run_task(task: Task, around: Surroundings, worker: Worker) -> Outcome:
    """Do one task, on the calling worker's device and in its memory.

    Raises:
        InputError: an input is not finite, changed, or cannot be read.
        NumericalError: no backend could decide the matrix, or the result overflows its dtype.
        OutputError: the result cannot be written.
        InterruptedRunError: abandoned on request.
    """
    began = time.perf_counter()
    job = Job(task, around, worker)
    if task.shape is not None:
        worker.scratch.begin(task.shape)
    nonfinite: str | None = None
    if task.shape is None:
        if task.pairing.base is not None:
            check_base(job, task.pairing.base)
        digest, nonfinite = copy(job)
        record = passed_through(task, "kept_ft", task.pairing.reason, digest)
    else:
        record, nonfinite = _repair(job)
    return finished(job, record, nonfinite, time.perf_counter() - began)


def finished(job: Job, record: TensorRecord, nonfinite: str | None, seconds: float) -> Outcome:
    """The outcome of a task whose result is written."""
    job.tell(1.0)
    job.around.done_with(job.task)
    record = msgspec.structs.replace(record, seconds=round(seconds, 6), paired_with=job.task.paired_with)
    record.check_finite(job.task.name)
    return Outcome(job.task, record, job.spent, nonfinite)


def _repair(job: Job) -> tuple[TensorRecord, str | None]:
    digest = copy_while_equal(job)
    if digest is not None:
        return passed_through(job.task, "copied", "delta is zero", digest), None
    # Not imported above: a run that only copies needs none of SciPy.
    from streamrepair.engine.repair_task import repair

    job.around.hold_threads()
    return repair(job)


def passed_through(task: Task, action: Literal["copied", "kept_ft"], reason: str, digest: str) -> TensorRecord:
    """The record of a tensor whose bytes are FT's (converted, if the output dtype differs)."""
    return TensorRecord(
        action=action,
        reason=reason,
        shape=task.out.shape,
        dtype=task.out.dtype,
        digest=digest,
    )
