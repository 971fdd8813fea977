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
LENT = " lent"
"""What the track of what a worker does for others is called, after its lane."""


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time."""

    track: str
    """Who did it: a lane, a lane's reader, a lane while it is lent, the committer, who reads ahead."""
    kind: str
    """task, member (of a batch, inside the batch's task), lent, read, write, memory, sync."""
    name: str
    start_s: float
    end_s: float


@dataclass(slots=True, eq=False)
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
    def span(self, track: str, kind: str, name: str, *, file: bool = False) -> Iterator[None]:
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
                for lane, what, seconds in self._meanwhile(track, kind, start_s, end_s):
                    self._totals[lane][f"lent, {what}"] += seconds
                if self.keep:
                    self.spans.append(Span(track, kind, name, start_s - self.began_s, end_s - self.began_s))

    def _enter(self, here: object, span: tuple[str, str, float], *, file: bool) -> None:
        with self._lock:
            self._open[here] = span
            if file and self._active == 0:
                self._active_since_s = span[2]
            self._active += file

    def _meanwhile(self, track: str, kind: str, start_s: float, end_s: float) -> Iterator[tuple[str, str, float]]:
        """What goes on in the lane that is lent, or is lent in the lane where this goes on: lane, what, seconds.

        Asked when a span ends, so that of two that overlap the first to end sees the other.
        """
        lane = track.removesuffix(LENT)
        for other_track, other, other_start_s in self._open.values():
            if other_track != track and other_track.removesuffix(LENT) == lane:
                yield lane, other if kind == "lent" else kind, end_s - max(start_s, other_start_s)

    def uses(self, lanes: list[str], wall_s: float) -> tuple[ResourceUse, ...]:
        """Each lane and the files: seconds busy, waiting, idle, of the wall time; what goes on now counts up to now."""
        with self._lock:
            now_s = time.perf_counter()
            sums = {lane: defaultdict(float, self._totals[lane]) for lane in lanes}
            lent = {lane: self._totals[lane + LENT]["lent"] for lane in lanes}
            for track, kind, start_s in self._open.values():
                if track in sums:
                    sums[track][kind] += now_s - start_s
                elif (lane := track.removesuffix(LENT)) in lent:
                    lent[lane] += now_s - start_s
                    for _, what, seconds in self._meanwhile(track, kind, start_s, now_s):
                        sums[lane][f"lent, {what}"] += seconds
            files_s = self._busy_s + (now_s - self._active_since_s if self._active else 0.0)
        found = []
        for lane, totals in sums.items():
            busy_s = totals["task"] - totals["read"] - totals["write"] - totals["more memory"]
            busy_s += lent[lane] - totals["lent, task"]
            waits = {
                "read": totals["read"],
                "write": totals["write"] + totals["unsynced"] - totals["lent, unsynced"],
                "memory": totals["memory"] - totals["lent, memory"] + totals["more memory"],
            }
            waits = {kind: round(max(0.0, seconds), 4) for kind, seconds in waits.items()}
            found.append(_use(lane, max(0.0, busy_s), waits, wall_s))
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

    def lent(self) -> contextlib.AbstractContextManager[None]:
        """The worker, which waits for memory or has no more to do, does a piece of another's task."""
        return self.timeline.span(self.name + LENT, "lent", "half of another's task")

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
