"""Where a run's time goes: what every worker did or waited for, and when any file was being read, written or synced.

Totals are always kept, since they cost nothing; single spans only if a trace is asked for. `trace` writes them down.
"Files" means system calls on files: a read that the page cache answers counts too.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from streamrepair.report import ResourceUse

Wait = Literal["read", "write", "memory"]
FILES = "files"
"""The track of all reads, writes and syncs together."""


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time."""

    track: str
    """Who did it: a lane, a lane's reader, or the committer."""
    kind: str
    """task, member (of a batch, inside the batch's task), read, write, memory, sync."""
    name: str
    start_s: float
    end_s: float


@dataclass(slots=True)
class Timeline:
    """What happened in a run; safe to share between threads.

    Args:
        keep: also keep every span, for a trace.
    """

    keep: bool = False
    began_s: float = field(default_factory=time.perf_counter)
    spans: list[Span] = field(default_factory=list)
    _totals: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    _open: dict[object, tuple[str, str, float]] = field(default_factory=dict)
    """Track, kind and start of what is going on now."""
    _active: int = 0
    _active_since_s: float = 0.0
    _busy_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def span(self, track: str, kind: str, name: str = "", *, file: bool = False) -> Iterator[None]:
        """Time what is done inside; with `file`, the files are busy meanwhile."""
        start_s, here = time.perf_counter(), object()
        self._enter(here, (track, kind, start_s), file=file)
        try:
            yield
        finally:
            end_s = time.perf_counter()
            with self._lock:
                del self._open[here]
                if file:
                    self._active -= 1
                    self._busy_s += end_s - self._active_since_s if self._active == 0 else 0.0
                self._totals[track][kind] += end_s - start_s
                if self.keep:
                    self.spans.append(Span(track, kind, name, start_s - self.began_s, end_s - self.began_s))

    def _enter(self, here: object, span: tuple[str, str, float], *, file: bool) -> None:
        with self._lock:
            self._open[here] = span
            if file and self._active == 0:
                self._active_since_s = span[2]
            self._active += file

    def uses(self, lanes: list[str], wall_s: float) -> tuple[ResourceUse, ...]:
        """Each lane and the files: seconds busy, waiting, idle, of the wall time; what goes on now counts up to now."""
        with self._lock:
            now_s = time.perf_counter()
            sums = {lane: defaultdict(float, self._totals[lane]) for lane in lanes}
            for track, kind, start_s in self._open.values():
                if track in sums:
                    sums[track][kind] += now_s - start_s
            files_s = self._busy_s + (now_s - self._active_since_s if self._active else 0.0)
        found = []
        for lane, totals in sums.items():
            waits = {kind: round(totals[kind], 4) for kind in ("read", "write", "memory")}
            waits["write"] = round(totals["write"] + totals["unsynced"], 4)
            busy_s = max(0.0, totals["task"] - totals["read"] - totals["write"] - totals["more memory"])
            waits["memory"] = round(totals["memory"] + totals["more memory"], 4)
            found.append(_use(lane, busy_s, waits, wall_s))
        return (*found, _use(FILES, files_s, {}, wall_s))


def _use(name: str, busy_s: float, waits: dict[str, float], wall_s: float) -> ResourceUse:
    idle_s = max(0.0, wall_s - busy_s - sum(waits.values()))
    return ResourceUse(name=name, busy_s=round(busy_s, 4), waiting_s=waits, idle_s=round(idle_s, 4))


@dataclass(frozen=True, slots=True)
class Lane:
    """One worker's part of the timeline."""

    timeline: Timeline
    name: str

    def task(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A task from start to end."""
        return self.timeline.span(self.name, "task", name)

    def member(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A member of a batch, from its merge on; the batch is the task."""
        return self.timeline.span(self.name, "member", name)

    def waiting(self, kind: Wait) -> contextlib.AbstractContextManager[None]:
        """The worker waits for a panel that is being read, or for memory to start."""
        return self.timeline.span(self.name, kind, f"wait: {kind}")

    def waiting_for_disk(self) -> contextlib.AbstractContextManager[None]:
        """The worker may not start another task while so much is unsynced."""
        return self.timeline.span(self.name, "unsynced", "wait: disk")

    def waiting_for_more(self) -> contextlib.AbstractContextManager[None]:
        """The worker waits for more memory in the middle of a task."""
        return self.timeline.span(self.name, "more memory", "wait: more memory")

    def file(self, kind: Wait) -> contextlib.AbstractContextManager[None]:
        """The worker itself reads or writes."""
        return self.timeline.span(self.name, kind, kind, file=True)

    def ahead(self) -> contextlib.AbstractContextManager[None]:
        """The worker's reader reads ahead."""
        return self.timeline.span(f"{self.name} reader", "read", "read", file=True)


def unwatched() -> Lane:
    """A lane of a timeline that nobody looks at."""
    return Lane(Timeline(), "")
