"""What workers do between their tasks: they start none once the run is to stop, and keep nothing while they wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest

from streamrepair.engine.job import Outcome, Spent
from streamrepair.engine.local import LocalExecutor
from streamrepair.engine.plan import Unit
from streamrepair.engine.stop import StopRequest
from streamrepair.engine.timeline import Timeline
from streamrepair.engine.worker import Worker
from streamrepair.errors import InterruptedRunError
from streamrepair.report import TensorRecord
from tests.engine.tasks import bf16_task

KEPT_BYTES = 80_000_000


def _outcomes(unit: Unit) -> list[Outcome]:
    return list(unit.tasks)  # type: ignore[arg-type]  # handed through as they are


def test_none_starts_while_the_main_thread_commits_and_a_stop_is_pending() -> None:
    """One worker ends its task, the other gets the memory that it waited for: neither goes on, and both leave."""
    stop, began, go_on = StopRequest(), list[str](), threading.Event()

    def do(unit: Unit, _worker: Worker) -> list[Outcome]:
        began.append(unit.name)
        assert go_on.wait(20)
        return _outcomes(unit)

    def commit() -> None:
        """A long one, in which the stop comes: nobody closes the ledger meanwhile."""
        workers = [thread for thread in threading.enumerate() if thread.name.startswith("cpu ")]
        stop.request("SIGTERM")
        go_on.set()
        for thread in workers:
            thread.join(20)

    executor = LocalExecutor(lanes=("cpu", "cpu"), room_bytes=10, stop=stop, timeline=Timeline())
    running = executor.run([bf16_task(f"t{i}", (8,), ram_bytes=10) for i in range(8)], do)
    assert next(running) is None
    commit()
    assert next(running) is not None, "what was finished is not lost"
    with pytest.raises(InterruptedRunError, match="SIGTERM"):
        next(running)
    assert began == ["t0"]


def test_a_worker_that_waits_for_the_disk_keeps_nothing() -> None:
    """Its last task's bytes are another's by then; a wait that there is not is not in the trace."""
    timeline, kept, calls = Timeline(keep=True), list[int](), list[int]()

    def hold(before_waiting: Callable[[], None]) -> None:
        calls.append(1)
        if len(calls) == 2:
            before_waiting()
            kept.append(sum(len(held) for held in workers[0].scratch._held.values()))

    workers: list[Worker] = []

    def do(unit: Unit, worker: Worker) -> list[Outcome]:
        workers.append(worker)
        worker.scratch.array("x", (KEPT_BYTES,), np.uint8)
        return _outcomes(unit)

    executor = LocalExecutor(lanes=("cpu",), room_bytes=10, stop=StopRequest(), timeline=timeline, hold=hold)
    tasks = [bf16_task(f"t{i}", (8,), ram_bytes=10) for i in range(3)]
    assert len([outcome for outcome in executor.run(tasks, do) if outcome]) == 3
    assert kept == [0]
    assert [span.name for span in timeline.spans].count("wait: disk") == 1
    assert len(calls) == 4


@pytest.mark.parametrize("action", ["copied", "repaired"])
def test_workers_that_copy_write_to_different_shards(action: Literal["copied", "repaired"]) -> None:
    """The kernel lets one thread at a time write to a file; repairs stay together, so that shards seal early."""
    both, names = threading.Barrier(2), dict[int, list[str]]()

    def do(unit: Unit, worker: Worker) -> list[Outcome]:
        names.setdefault(worker.number, []).append(unit.name)
        both.wait(20)
        backend = "gram-float32" if action == "repaired" else None
        record = TensorRecord(action=action, reason="", shape=(512, 1024), dtype="BF16", backend=backend)
        return [Outcome(task, record, Spent()) for task in unit.tasks]

    tasks = [bf16_task(f"{shard}.{i}", (512, 1024), shard=shard, ram_bytes=1) for shard in range(3) for i in range(4)]
    executor = LocalExecutor(lanes=("cpu", "cpu"), room_bytes=10, stop=StopRequest(), timeline=Timeline())
    assert sum(outcome is not None for outcome in executor.run(tasks, do)) == 12
    apart = [len({name[0] for name in pair}) == 2 for pair in zip(names[0], names[1], strict=True)]
    assert apart == ([False] + [True] * 4 + [False] if action == "copied" else [False] * 6)
