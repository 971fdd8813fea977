"""The local executor: a few worker threads on this machine that take tasks from the ledger and hand outcomes back.

Threads and not processes: the work is in BLAS, LAPACK, torch and system calls, which all release the interpreter lock,
and one process holds one copy of the libraries.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from streamrepair.decompose.scratch import Scratch
from streamrepair.engine.ledger import Ledger
from streamrepair.engine.plan import Task
from streamrepair.engine.stop import StopRequest
from streamrepair.engine.task import Outcome
from streamrepair.errors import InterruptedRunError

_POLL_S = 0.2
_PARTING_S = 2.0  # for workers that are left in the middle of a task


class LocalExecutor:
    """Runs tasks on threads.

    Args:
        workers: number of threads. room_bytes: memory that running tasks may hold together. stop: ends the run early.
    """

    def __init__(self, *, workers: int, room_bytes: int, stop: StopRequest) -> None:
        self._workers, self._room_bytes, self._stop = workers, room_bytes, stop

    def run(self, tasks: Iterable[Task], do: Callable[[Task, Scratch], Outcome]) -> Iterator[Outcome | None]:
        """Outcomes as tasks finish; None now and then while none has, so that the caller can see to other things.

        Raises:
            InterruptedRunError: stopped on request, after every outcome that was finished has been yielded.
            StreamRepairError: the first failure of a task, likewise.
        """
        ledger = Ledger(tasks, room_bytes=self._room_bytes)
        done: queue.SimpleQueue[Outcome | BaseException | None] = queue.SimpleQueue()
        threads = [
            threading.Thread(target=_work, args=(ledger, do, done), name=f"worker-{number}", daemon=True)
            for number in range(self._workers)
        ]
        for thread in threads:
            thread.start()
        try:
            yield from self._collect(ledger, done)
        finally:
            ledger.close()
            self._part(threads)

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
        alive, failure = self._workers, None
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
    ledger: Ledger, do: Callable[[Task, Scratch], Outcome], done: queue.SimpleQueue[Outcome | BaseException | None]
) -> None:
    """One worker's life; it puts its outcomes, at most one failure, and None at its end."""
    scratch = Scratch()
    while (task := ledger.take(scratch.clear)) is not None:
        try:
            done.put(do(task, scratch))
            scratch.settle()
        except BaseException as error:  # whatever it is, the collector raises it in the caller's thread
            done.put(error)
            break
        finally:
            ledger.give_back(task)
    done.put(None)
