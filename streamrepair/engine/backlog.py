"""How far workers may run ahead of the disk: bytes of finished tensors that are written but not yet synced.

Without a limit a slow disk would be met late: the kernel takes writes into the page cache until a share of all memory
is unwritten, and then stops whoever writes. With one, no worker starts a task while more than that waits for a sync.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from streamrepair.engine.stop import StopRequest

LEAST_BYTES = 1 << 31
"""Twice what is committed at once: a commit is due before anybody waits, and workers go on while it is synced."""
MOST_BYTES = 1 << 32
"""However much memory is free: seconds of a disk's work, as those who wait for its sync would have it."""
_SHARE = 0.1
"""Of the machine's free memory, in between."""
_POLL_S = 0.2


class Backlog:
    """Shared by the workers, who write, and the committer, who syncs.

    Args:
        free_bytes: memory that the machine has free when the run begins.
    """

    def __init__(self, stop: StopRequest, *, free_bytes: int) -> None:
        self._stop, self._limit_bytes = stop, max(LEAST_BYTES, min(MOST_BYTES, int(_SHARE * free_bytes)))
        self._bytes = 0
        self._changed = threading.Condition()

    def wrote(self, nbytes: int) -> None:
        """A tensor is written."""
        with self._changed:
            self._bytes += nbytes

    def synced(self, nbytes: int) -> None:
        """So many of these bytes are on the disk."""
        with self._changed:
            self._bytes -= nbytes
            self._changed.notify_all()

    def wait(self, before_waiting: Callable[[], None]) -> None:
        """Before another task: until no more is unsynced than may be, or the run is to stop.

        Args:
            before_waiting: called once, and only by a worker that has to wait.

        Raises:
            InterruptedRunError: nobody waits for this worker any more.
        """
        waited = False
        with self._changed:
            while self._bytes > self._limit_bytes and not self._stop.requested:
                self._stop.check()
                if not waited:
                    before_waiting()
                    waited = True
                self._changed.wait(_POLL_S)
