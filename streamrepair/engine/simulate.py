"""A run on a fake clock: the plan's units in their order, the ledger's rules, predicted seconds, one shared disk.

It answers how well an order keeps devices busy, on machines that are not here. What it leaves out: faults, commits and
sealing, the bus (its copies run beside the kernels), and every difference between a prediction and the truth.

The disk serves requests one after another. A worker reads a piece ahead of the one it computes on; the
units next in line, as many as there are workers, are read ahead whole; the second pass finds its bytes in the page
cache while all workers' pairs fit it; what is written goes to the disk behind the worker's back.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from streamrepair.engine import cost
from streamrepair.engine.admission import Admission
from streamrepair.engine.lanes import lane_names, workers_at
from streamrepair.engine.plan import Unit

_PIECE_BYTES = 1 << 26
_MOST_PIECES = 32
Process = Generator[float, float, None]
"""Yields the time at which it goes on; is sent that time."""


@dataclass(frozen=True, slots=True)
class SimulatedSpan:
    """What a lane did."""

    lane: str
    kind: str
    """compute, or wait: for files or memory."""
    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Simulated:
    """How a run went."""

    makespan_s: float
    work_s: float
    """Computation, of all lanes together."""
    disk_s: float
    """The disk at work."""
    spans: tuple[SimulatedSpan, ...]

    def busy_s(self, lane: str) -> float:
        """Seconds that a lane computed."""
        return sum(span.end_s - span.start_s for span in self.spans if span.lane == lane and span.kind == "compute")


@dataclass(slots=True)
class _Disk:
    bytes_per_s: float
    free_at_s: float = 0.0
    busy_s: float = 0.0

    def serve(self, now_s: float, nbytes: float) -> float:
        """When a request made now is done."""
        took_s = nbytes / self.bytes_per_s
        self.free_at_s = max(now_s, self.free_at_s) + took_s
        self.busy_s += took_s
        return self.free_at_s


@dataclass(slots=True)
class Simulation:
    """One run.

    Args:
        lanes: the device of each worker. cache_bytes: page cache that inputs may fill.
        dirty_bytes: written pages that the kernel holds before it makes the writer wait.
    """

    units: Sequence[Unit]
    lanes: Sequence[str]
    room_bytes: int
    disk_bytes_per_s: float = cost.DISK_BYTES_PER_S
    cache_bytes: float = 64e9
    dirty_bytes: float = 2e9
    _disk: _Disk = field(init=False)
    _ledger: Admission = field(init=False)
    _events: list[tuple[float, int, Process]] = field(default_factory=list)
    _count: int = 0
    _parked: deque[Process] = field(default_factory=deque)
    _reader: Process | None = None
    _ahead: deque[Unit] = field(default_factory=deque)
    _asked: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Of each unit's inputs: (bytes from the start, when they are there), as asked for."""
    _spans: list[SimulatedSpan] = field(default_factory=list)

    def run(self) -> Simulated:
        """Play it to its end."""
        self._disk = _Disk(self.disk_bytes_per_s)
        self._ledger = Admission.of(self.units, self.room_bytes)
        for number, (device, name) in enumerate(zip(self.lanes, lane_names(self.lanes), strict=True)):
            self._start(0.0, self._lane(number, name, "cpu" if device == "cpu" else "cuda"))
        while self._events:
            now_s, _, process = heapq.heappop(self._events)
            self._advance(process, now_s)
        work_s = sum(cost.seconds(unit, unit.place) for unit in self.units)
        end_s = max((span.end_s for span in self._spans), default=0.0)
        return Simulated(max(end_s, self._disk.free_at_s), work_s, self._disk.busy_s, tuple(self._spans))

    def _start(self, now_s: float, process: Process) -> None:
        next(process)
        self._push(now_s, process)

    def _push(self, at_s: float, process: Process) -> None:
        self._count += 1
        heapq.heappush(self._events, (at_s, self._count, process))

    def _advance(self, process: Process, now_s: float) -> None:
        try:
            at_s = process.send(now_s)
        except StopIteration:
            return
        if at_s < 0:
            self._parked.append(process)
        else:
            self._push(at_s, process)

    def _wake(self, now_s: float) -> None:
        while self._parked:
            self._push(now_s, self._parked.popleft())

    def _lane(self, number: int, lane: str, place: str) -> Process:
        now_s = yield 0.0
        while not self._ledger.exhausted(place):
            since_s = now_s
            while (unit := self._ledger.take(number, place)) is None and not self._ledger.exhausted(place):
                now_s = yield -1.0
            if unit is None:
                break
            self._note(lane, "wait", "memory", since_s, now_s)
            self._wake(now_s)
            for following in self._ledger.following(place, workers_at(self.lanes, place)):
                self._read_ahead(following, now_s)
            now_s = yield from self._unit(lane, unit, now_s)
            self._ledger.give_back(number)
            self._wake(now_s)
        self._ledger.leave(number)
        self._wake(now_s)

    def _unit(self, lane: str, unit: Unit, now_s: float) -> Generator[float, float, float]:
        stages = cost.stages(unit, unit.place)
        if unit.shape is not None:
            now_s = yield from self._stream(lane, unit, now_s, stages.gram_s, writes=False)
            self._note(lane, "compute", unit.name, now_s, now_s + stages.factor_s)
            now_s = yield now_s + stages.factor_s
            if not self._keeps(unit):
                self._asked.pop(unit.name, None)
        now_s = yield from self._stream(lane, unit, now_s, stages.merge_s, writes=True)
        self._asked.pop(unit.name, None)
        return now_s

    def _keeps(self, unit: Unit) -> bool:
        return unit.read_once_bytes * len(self.lanes) <= self.cache_bytes

    def _stream(
        self, lane: str, unit: Unit, now_s: float, work_s: float, *, writes: bool
    ) -> Generator[float, float, float]:
        """A pass: read a piece ahead, compute, write."""
        pieces = int(min(_MOST_PIECES, max(1, -(-unit.read_once_bytes // _PIECE_BYTES))))
        read_bytes, write_bytes = unit.read_once_bytes / pieces, unit.out_bytes / pieces
        ready_s = self._read(unit, read_bytes, 1, now_s)
        for piece in range(1, pieces + 1):
            self._note(lane, "wait", "read", now_s, ready_s)
            now_s = yield max(now_s, ready_s)
            if piece < pieces:
                ready_s = self._read(unit, read_bytes, piece + 1, now_s)
            self._note(lane, "compute", unit.name, now_s, now_s + work_s / pieces)
            now_s = yield now_s + work_s / pieces
            if writes:
                taken_s = self._disk.serve(now_s, write_bytes) - self.dirty_bytes / self.disk_bytes_per_s
                self._note(lane, "wait", "write", now_s, taken_s)
                now_s = yield max(now_s, taken_s)
        return now_s

    def _read(self, unit: Unit, piece_bytes: float, piece: int, now_s: float) -> float:
        """When a piece is there: by then what was asked for before is too, by whomever."""
        wanted = piece * piece_bytes
        asked = self._asked.setdefault(unit.name, [])
        for upto, at_s in asked:
            if upto >= wanted - 1.0:
                return max(now_s, at_s)
        return self._ask(unit, wanted, now_s)

    def _ask(self, unit: Unit, upto: float, now_s: float) -> float:
        """Ask the disk for all up to a place that nobody has asked for yet; when it is there."""
        asked = self._asked[unit.name]
        done_s = self._disk.serve(now_s, upto - (asked[-1][0] if asked else 0.0))
        asked.append((upto, done_s))
        return done_s

    def _read_ahead(self, unit: Unit, now_s: float) -> None:
        if not self._keeps(unit) or unit.name in self._asked:
            return
        self._asked[unit.name] = []
        self._ahead.append(unit)
        if self._reader is None:
            self._reader = self._reading()
            self._start(now_s, self._reader)

    def _reading(self) -> Process:
        """The thread that reads ahead of the line."""
        now_s = yield 0.0
        while self._ahead:
            unit = self._ahead.popleft()
            while (asked := self._asked.get(unit.name)) is not None:
                at = asked[-1][0] if asked else 0.0
                if at >= unit.read_once_bytes:
                    break
                now_s = yield self._ask(unit, min(float(unit.read_once_bytes), at + _PIECE_BYTES), now_s)
        self._reader = None

    def _note(self, lane: str, kind: str, name: str, start_s: float, end_s: float) -> None:
        if end_s > start_s:
            self._spans.append(SimulatedSpan(lane, kind, name, start_s, end_s))
