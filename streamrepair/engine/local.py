"""The local executor: a few worker threads on this machine that take tasks from the ledger and hand outcomes back.

Threads and not processes: the work is in BLAS, LAPACK, torch and system calls, which all release the interpreter lock,
and one process holds one copy of the libraries.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from streamrepair.decompose.halves import in_turn
from streamrepair.decompose.scratch import Scratch
from streamrepair.engine.gpu import own_stream
from streamrepair.engine.job import Outcome
from streamrepair.engine.lanes import lane_names, workers_at
from streamrepair.engine.ledger import Ledger
from streamrepair.engine.plan import Task, Unit
from streamrepair.engine.spares import Spares
from streamrepair.engine.stop import StopRequest
from streamrepair.engine.timeline import Lane, Timeline
from streamrepair.engine.worker import Worker
from streamrepair.errors import InterruptedRunError

Do = Callable[[Unit, Worker], Iterable[Outcome]]
"""Carries a unit out: its tasks' outcomes, as they finish."""
_POLL_S = 0.2
_LARGE_COPY_BYTES = 1 << 20
"""Smaller ones tell nothing of the units that follow."""
_PARTING_S = 2.0  # for workers that are left in the middle of a task


class LocalExecutor:
    """Runs units, tasks and batches of them, on threads.

    Args:
        lanes: the device of each thread. room_bytes: memory that running units may hold together.
        stop: ends the run early. timeline: told what every thread does.
        upcoming: told, more than once, of the tasks that are next in line, so that they can be read ahead.
        hold: called before a worker asks for a unit; waits while results pile up in front of the disk, and calls what
            it is given before it does.
    """

    def __init__(
        self,
        *,
        lanes: Sequence[str],
        room_bytes: int,
        stop: StopRequest,
        timeline: Timeline,
        upcoming: Callable[[Task], None] = lambda _task: None,
        hold: Callable[[Callable[[], None]], None] = lambda _before_waiting: None,
    ) -> None:
        self._lanes, self._room_bytes, self._stop = tuple(lanes), room_bytes, stop
        self._timeline, self._upcoming, self._hold = timeline, upcoming, hold

    def run(self, units: Iterable[Unit], do: Do) -> Iterator[Outcome | None]:
        """Outcomes as tasks finish; None now and then while none has, so that the caller can see to other things.

        Raises:
            InterruptedRunError: stopped on request, after every outcome that was finished has been yielded.
            StreamRepairError: the first failure of a task, likewise.
        """
        ledger = Ledger(units, room_bytes=self._room_bytes)
        lanes = [Lane(self._timeline, name) for name in lane_names(self._lanes)]
        spares = Spares([lane for lane, device in zip(lanes, self._lanes, strict=True) if device == "cpu"])
        done: queue.SimpleQueue[Outcome | BaseException | None] = queue.SimpleQueue()
        threads = [
            threading.Thread(target=self._work, args=(worker, spares, do, done), name=worker.lane.name, daemon=True)
            for worker in self._workers(lanes, ledger, spares)
        ]
        for thread in threads:
            thread.start()
        try:
            yield from self._collect(ledger, done)
        finally:
            ledger.close()
            self._part(threads)

    def _workers(self, lanes: Sequence[Lane], ledger: Ledger, spares: Spares) -> Iterator[Worker]:
        for number, (device, lane) in enumerate(zip(self._lanes, lanes, strict=True)):
            both = spares.both if device == "cpu" else in_turn
            yield Worker(number, device, Scratch(), lane, ledger, workers_at(self._lanes, device), both)

    def _part(self, threads: list[threading.Thread]) -> None:
        """See the workers out, so that none writes to a file that is about to be closed."""
        if any(thread.is_alive() for thread in threads):
            self._stop.abandon()
        until = time.monotonic() + _PARTING_S
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _collect(
        self, ledger: Ledger, done: queue.SimpleQueue[Outcome | BaseException | None]
    ) -> Iterator[Outcome | None]:
        alive, failure = len(self._lanes), None
        while alive:
            if self._stop.requested:
                ledger.close()
            if self._stop.overdue:
                break
            try:
                result = done.get(timeout=_POLL_S)
            except queue.Empty:
                yield None
                continue
            if result is None:
                alive -= 1
            elif isinstance(result, BaseException):
                failure = failure or result
                ledger.close()
            else:
                yield result
        if failure is not None and not isinstance(failure, InterruptedRunError):
            raise failure
        if self._stop.requested:
            raise InterruptedRunError(self._stop.reason)

    def _work(
        self,
        worker: Worker,
        spares: Spares,
        do: Do,
        done: queue.SimpleQueue[Outcome | BaseException | None],
    ) -> None:
        """One worker's life; it puts its outcomes, at most one failure, and None at its end."""
        ledger, copied = worker.ledger, False
        try:
            with own_stream(worker.device):
                while (unit := self._next(worker, apart=copied)) is not None:
                    try:
                        if self._stop.requested:
                            break  # the collector, which closes the ledger, may be in the middle of a commit
                        coming = (1, unit.shard) if copied else (worker.peers, None)
                        for following in ledger.following(worker.place, *coming):
                            for task in following.tasks:
                                self._upcoming(task)
                        with (
                            worker.lane.task(unit.name),
                            spares.at_work(worker.lane) if worker.device == "cpu" else contextlib.nullcontext(),
                        ):
                            large = unit.out_bytes >= _LARGE_COPY_BYTES
                            copied = copied or large
                            for outcome in do(unit, worker):
                                done.put(outcome)
                                copied = copied and not (large and outcome.record.backend)
                        worker.scratch.settle()
                    finally:
                        ledger.give_back(worker.number)
        except BaseException as error:  # whatever it is, the collector raises it in the caller's thread
            done.put(error)
        done.put(None)

    def _next(self, worker: Worker, *, apart: bool) -> Unit | None:
        """The worker's next unit; while it waits for one it keeps nothing of the last, which no reservation covers.

        Args:
            apart: it copied its last large one, and may copy on; the kernel lets one thread at a time write to a file.
        """
        with contextlib.ExitStack() as waiting:

            def before_waiting() -> None:
                worker.scratch.clear()
                waiting.enter_context(worker.lane.waiting_for_disk())

            self._hold(before_waiting)
        with worker.lane.waiting("memory"):
            clear = worker.scratch.clear
            return worker.ledger.take(worker.number, worker.place, before_waiting=clear, apart=apart)
