"""One batch, start to finish: its members are decided together, then each is merged, written and recorded by itself.

Those whose two sides are equal are copied and leave it first. A batch is always computed as it was planned, for its
numbers may depend on who is in it: members that an earlier run finished are read and decided again, for the others'
sake, and not written.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from streamrepair.engine.batches import Batch
from streamrepair.engine.copying import copy_while_equal
from streamrepair.engine.job import Job, Outcome, Surroundings
from streamrepair.engine.task import finished, passed_through
from streamrepair.engine.worker import Worker


def run_batch(batch: Batch, around: Surroundings, worker: Worker) -> Iterator[Outcome]:
    """Do a batch; outcomes of the members that are not finished yet, as they come.

    Raises:
        StreamRepairError: as `run_task` does, for the first member that fails; those after it are not done.
    """
    worker.scratch.begin((batch.shape, len(batch.tasks)))
    jobs = [Job(task, around, worker, dry=task.name in around.finished) for task in batch.tasks]
    equal: set[str] = set()
    for job in sorted(jobs, key=lambda job: job.dry):
        if job.dry and all(other.dry or other.task.name in equal for other in jobs):
            break  # nobody is left who would be decided
        began = time.perf_counter()
        digest = copy_while_equal(job)
        if digest is None:
            continue
        equal.add(job.task.name)
        if not job.dry:
            record = passed_through(job.task, "copied", "delta is zero", digest)
            yield finished(job, record, None, time.perf_counter() - began)
    differing = [job for job in jobs if job.task.name not in equal]
    if heirs := [job for job in differing if not job.dry]:
        for job in jobs:
            if job.dry:
                heirs[0].spent.add(job.spent)
        # Not imported above: a run that only copies needs none of SciPy.
        from streamrepair.engine.repair_task import repair_batch

        around.hold_threads()
        yield from repair_batch(differing)
    for job in jobs:
        if job.dry:
            around.done_with(job.task)
