"""Stopping on request: finish what is in hand if it is soon done, abandon it otherwise, and keep what is finished."""

from __future__ import annotations

import threading
import time

from streamrepair.errors import InterruptedRunError

GRACE_S = 15.0
"""How long the tensors in hand may take to finish after a request to stop; then they are abandoned between panels."""
LIMIT_S = 25.0
"""When the run ends even if a worker is inside a long LAPACK call: batch systems kill after 30 s."""


class StopRequest:
    """Set once by a signal handler or another thread; read by the engine."""

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._since = 0.0
        self._abandoned = threading.Event()
        self.reason = ""
        self.heeded = False
        """Whether a run looks at it; before that nothing is in OUT that would have to be left in order."""
        self.over = False
        """Whether the run has ended well: what follows only checks it or tells of it."""

    def request(self, reason: str) -> None:
        """Ask the run to stop; safe in a signal handler."""
        if not self._requested.is_set():
            self.reason, self._since = reason, time.monotonic()
            self._requested.set()

    @property
    def requested(self) -> bool:
        """Whether no new task is to be started."""
        return self._requested.is_set()

    @property
    def overdue(self) -> bool:
        """Whether the run has to end without waiting for its workers."""
        return self.requested and time.monotonic() - self._since > LIMIT_S

    def check_at_once(self) -> None:
        """End what is no tensor in hand (reading back, sealing) as soon as it is asked to.

        Raises:
            InterruptedRunError: it is.
        """
        if self.requested:
            raise InterruptedRunError(self.reason)

    def abandon(self) -> None:
        """Let tasks in hand end at their next check: nobody waits for them any more."""
        self._abandoned.set()

    def check(self) -> None:
        """Abandon the task in hand once the grace is over.

        Raises:
            InterruptedRunError: it is.
        """
        if self._abandoned.is_set() or (self.requested and time.monotonic() - self._since > GRACE_S):
            raise InterruptedRunError(self.reason)
