"""How far workers may run ahead of the disk: bytes of finished tensors that are written but not yet synced.

Without a limit a slow disk would be met late: the kernel takes writes into the page cache until a share of all memory
is unwritten, and then stops whoever writes. With one, no worker starts a task while more than that waits for a sync.
"""

from __future__ import annotations

import threading

from streamrepair.engine.stop import StopRequest

LEAST_BYTES = 1 << 31
"""Twice what is committed at once, so that workers go on while it is synced."""
_SHARE = 0.1
"""Of the machine's free memory."""
_POLL_S = 0.2


class Backlog:
    """Shared by the workers, who write, and the committer, who syncs.

    Args:
        free_bytes: memory that the machine has free when the run begins.
    """

    def __init__(self, stop: StopRequest, *, free_bytes: int) -> None:
        self._stop, self._limit_bytes = stop, max(LEAST_BYTES, int(_SHARE * free_bytes))
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

    def wait(self) -> None:
        """Before another task: until no more is unsynced than may be, or the run is to stop.

        Raises:
            InterruptedRunError: nobody waits for this worker any more.
        """
        with self._changed:
            while self._bytes > self._limit_bytes and not self._stop.requested:
                self._stop.check()
                self._changed.wait(_POLL_S)
