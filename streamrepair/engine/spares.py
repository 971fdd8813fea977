"""Workers without a task, lent to one that has a large matrix: at the end of a run, and where memory holds others back.

What is done aside is cut by shape (`decompose/halves`): whether somebody was free changes no number.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from streamrepair.decompose.halves import Work, in_turn


class Spares:
    """How many of the CPU's workers are at work, or are lent.

    Args:
        workers: of the CPU.
    """

    def __init__(self, workers: int) -> None:
        self._free = workers
        self._lock = threading.Lock()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """A worker has a task of its own, even if it is lent at that moment."""
        with self._lock:
            self._free -= 1
        try:
            yield
        finally:
            self._back()

    def both(self, first: Work, second: Work) -> None:
        """Two pieces of work, the second by a worker that is free, if there is one.

        Raises:
            BaseException: the first failure, once both have ended.
        """
        if not self._borrowed():
            in_turn(first, second)
            return
        failures: list[BaseException] = []

        def aside() -> None:
            try:
                second()
            except BaseException as error:  # it is the caller's
                failures.append(error)

        context = contextvars.copy_context()  # NumPy's warnings are a matter of context
        thread = threading.Thread(target=context.run, args=(aside,), name=f"{threading.current_thread().name} aside")
        try:
            thread.start()
        except RuntimeError:  # the system has no more threads, which is no failure of the work
            self._back()
            in_turn(first, second)
            return
        try:
            first()
        finally:
            thread.join()
            self._back()
        if failures:
            raise failures[0]

    def _borrowed(self) -> bool:
        """Take a free worker; whether there was one. Asked and taken at once: else two could take the same."""
        with self._lock:
            lent = self._free > 0
            self._free -= lent
        return lent

    def _back(self) -> None:
        with self._lock:
            self._free += 1
