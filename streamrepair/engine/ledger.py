"""The ledger of memory: a task reserves its projected bytes before it starts and returns them when it ends."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

from streamrepair.engine.plan import Task


class Ledger:
    """Hands out tasks in order, each once its bytes are free.

    Only the first waiting task is considered, so that a large one is never starved by small ones behind it; every task
    fits alone (the plan saw to that), so the first one always gets its turn.
    """

    def __init__(self, tasks: Iterable[Task], *, room_bytes: int) -> None:
        self._waiting = deque(tasks)
        self._room_bytes = room_bytes
        self._running = 0
        self._closed = False
        self._changed = threading.Condition()

    def take(self, before_waiting: Callable[[], None]) -> Task | None:
        """The next task, waiting until its bytes are free; None when there are no more.

        Args:
            before_waiting: lets go of what the worker keeps from its last task.
        """
        with self._changed:
            while self._waiting and not self._closed:
                # With nothing running the first task may go even if the room was overestimated: it fits alone.
                if self._waiting[0].ram_bytes <= self._room_bytes or self._running == 0:
                    task = self._waiting.popleft()
                    self._room_bytes -= task.ram_bytes
                    self._running += 1
                    return task
                before_waiting()
                self._changed.wait()
            return None

    def give_back(self, task: Task) -> None:
        """Return a finished task's bytes."""
        with self._changed:
            self._room_bytes += task.ram_bytes
            self._running -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Hand out no more tasks."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
