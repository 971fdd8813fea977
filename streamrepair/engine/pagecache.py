"""The kernel's page cache as a run uses it: what is next in line is read ahead, what is done with is let go.

Letting go is for checkpoints that are large against the machine's memory: 300 GB read once would push out everything
that other programs have there. What fits easily stays, so that a second run finds it.
"""

from __future__ import annotations

import contextlib
import queue
import threading

from streamrepair.checkpoint import osfile
from streamrepair.checkpoint.pairing import Side
from streamrepair.checkpoint.read import InputFiles
from streamrepair.engine.plan import Plan, Task
from streamrepair.engine.timeline import Timeline
from streamrepair.errors import StreamRepairError

_PIECE_BYTES = 1 << 23
_LEAST_BYTES = 1 << 16
"""Tensors with less to read are not read ahead: the kernel reads on as far by itself, and to be told costs time."""
_AHEAD_SHARE = 0.1
"""Of the machine's free memory, as much as may be read ahead."""
_LARGE_SHARE = 0.5
"""A run that moves more than this share of the machine's free memory lets go of what it is done with."""


def lets_go(plan: Plan, free_bytes: int) -> bool:
    """Whether a run is so large that it should leave the page cache as it found it."""
    moved = plan.out_bytes + sum(task.read_once_bytes for task in plan.tasks)
    return moved > _LARGE_SHARE * free_bytes


class PageCache:
    """Advice to the kernel about a run's inputs; wrong advice costs time, never correctness.

    Args:
        free_bytes: memory that the machine has free when the run begins. lets_go: whether what is done with is let go.
        timeline: told when files are read ahead.
    """

    def __init__(self, files: InputFiles, *, free_bytes: int, lets_go: bool, timeline: Timeline | None = None) -> None:
        self._files, self._lets_go, self._timeline = files, lets_go, timeline or Timeline()
        self._room_bytes = int(_AHEAD_SHARE * free_bytes)
        self._ahead: dict[str, int] = {}
        """Bytes read ahead of tasks that are not done."""
        self._seen: set[str] = set()
        self._lock = threading.Lock()
        self._orders: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._read, name="read-ahead of the line", daemon=True)
        self._thread.start()

    def upcoming(self, task: Task) -> None:
        """A task will start soon: read its inputs ahead, once, if there is room."""
        if task.read_once_bytes < _LEAST_BYTES:
            return
        with self._lock:
            held = sum(self._ahead.values())
            if task.name in self._seen or held + task.read_once_bytes > self._room_bytes:
                return
            self._seen.add(task.name)
            self._ahead[task.name] = task.read_once_bytes
        self._orders.put(task)

    def done_with(self, task: Task) -> None:
        """A task needs its inputs no more."""
        with self._lock:
            self._ahead.pop(task.name, None)
            self._seen.discard(task.name)
        if self._lets_go:
            for side in _sides(task):
                osfile.let_go(self._files.descriptor(side.shard), side.entry.start, side.entry.nbytes)

    def close(self) -> None:
        """Read no more ahead."""
        self._closed = True
        self._orders.put(None)
        self._thread.join()

    def _read(self) -> None:
        while (task := self._orders.get()) is not None:
            with self._timeline.span("read ahead", "read", task.name, file=True):
                self._read_ahead(task)

    def _read_ahead(self, task: Task) -> None:
        for side in _sides(task):
            for offset, length in osfile.chunks(side.entry.nbytes, _PIECE_BYTES):
                if self._closed or task.name not in self._ahead:
                    break  # done already
                with contextlib.suppress(StreamRepairError):  # the task itself will meet it, and name it
                    osfile.read_ahead(self._files.descriptor(side.shard), side.entry.start + offset, length)


def _sides(task: Task) -> list[Side]:
    """What a task reads."""
    return [task.ft] if task.shape is None or task.pairing.base is None else [task.pairing.base, task.ft]
