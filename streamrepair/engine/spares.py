"""Workers without a task, lent to one that has a large matrix: at the end of a run, and where memory holds others back.

What is done aside is cut by shape (`decompose/halves`): whether somebody was free changes no number.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from streamrepair.decompose.halves import Work, in_turn
from streamrepair.engine.timeline import LENT, Lane


class Spares:
    """Which of the CPU's workers are at work, and which are lent.

    Args:
        lanes: of the CPU's workers.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = tuple(lanes)
        self._at_work: set[Lane] = set()
        self._lent: set[Lane] = set()
        self._lock = threading.Lock()

    @contextmanager
    def at_work(self, lane: Lane) -> Iterator[None]:
        """A worker has a task of its own, even if it is lent at that moment."""
        with self._lock:
            self._at_work.add(lane)
        try:
            yield
        finally:
            with self._lock:
                self._at_work.remove(lane)

    def both(self, first: Work, second: Work) -> None:
        """Two pieces of work, the second by a worker that is free, if there is one.

        Raises:
            BaseException: the first failure, once both have ended.
        """
        lane = self._borrowed()
        if lane is None:
            in_turn(first, second)
            return
        failures: list[BaseException] = []

        def aside() -> None:
            try:
                with lane.lent():
                    second()
            except BaseException as error:  # it is the caller's
                failures.append(error)

        context = contextvars.copy_context()  # NumPy's warnings are a matter of context
        thread = threading.Thread(target=context.run, args=(aside,), name=lane.name + LENT)
        try:
            if not _started(thread):
                in_turn(first, second)
                return
            try:
                first()
            finally:
                thread.join()
        finally:
            with self._lock:
                self._lent.remove(lane)
        if failures:
            raise failures[0]

    def _borrowed(self) -> Lane | None:
        """Take a worker that is free, if there is one. Asked and taken at once: else two could take the same.

        One that went on to a task of its own while it was lent is two threads: as long as it is, another stays free.
        """
        with self._lock:
            if len(self._at_work) + len(self._lent) >= len(self._lanes):
                return None
            lane = next(lane for lane in self._lanes if lane not in self._at_work and lane not in self._lent)
            self._lent.add(lane)
        return lane


def _started(thread: threading.Thread) -> bool:
    """Start a thread; False where the system has no more of them, which is no failure of the work."""
    try:
        thread.start()
    except RuntimeError:
        return False
    return True
