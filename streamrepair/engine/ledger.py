"""The ledger of memory: a task reserves its projected bytes before it starts and returns them when it ends.

`admission` has the rules; here are the lock and the waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from streamrepair.engine.admission import Admission
from streamrepair.engine.plan import Task


class Ledger:
    """Hands out tasks, each once its bytes are free; shared by all workers of a run.

    Args:
        tasks: in the order they start. room_bytes: what running tasks may hold together.
    """

    def __init__(self, tasks: Iterable[Task], *, room_bytes: int) -> None:
        self._state = Admission.of(tasks, room_bytes)
        self._changed = threading.Condition()

    def take(self, worker: int, place: str, *, before_waiting: Callable[[], None]) -> Task | None:
        """The next task for a worker, waiting until its bytes are free; None when there are no more.

        Args:
            place: "cpu" or "cuda". before_waiting: lets go of what the worker keeps from its last task.
        """
        waited = False
        with self._changed:
            while not self._state.exhausted(place):
                task = self._state.take(worker, place)
                if task is not None:
                    break
                if not waited:
                    before_waiting()
                    waited = True
                    continue  # nothing may have changed, but the line may have: ask once more before sleeping
                self._changed.wait()
            else:
                task = None
                self._state.leave(worker)
            self._changed.notify_all()  # the next in line may go too, or leave
            return task

    def grow(self, worker: int, more_bytes: int) -> bool:
        """Reserve more for a worker's running task, waiting for it; False if it cannot be had beside the others."""
        with self._changed:
            self._changed.notify_all()  # whoever waits for more may be the last that runs: it has to look again
            while (granted := self._state.grow(worker, more_bytes)) is None:
                self._changed.wait()
            self._changed.notify_all()
            return granted

    def following(self, place: str, count: int) -> list[Task]:
        """The tasks that workers of that place will get next: worth reading ahead for."""
        with self._changed:
            return self._state.following(place, count)

    def give_back(self, worker: int) -> None:
        """Return all that a worker's task had reserved."""
        with self._changed:
            self._state.give_back(worker)
            self._changed.notify_all()

    def close(self) -> None:
        """Hand out no more tasks."""
        with self._changed:
            self._state.drop_waiting()
            self._changed.notify_all()
