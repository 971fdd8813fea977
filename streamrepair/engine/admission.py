"""Who may start next: the rules of the ledger as plain state, without threads or a clock. Deterministic.

`ledger` puts locks around it, `simulate` a fake clock; both therefore run the same rules, except that a simulation does
not tell copies apart:
- workers stand in one line, first come, first served, whatever kind of unit they want. Only the first is considered, so
  a large unit is never starved by small ones: nobody overtakes it;
- it gets the next unit in order, or, if it wants to be apart, the next of those whose shard nobody else is at;
- it starts once its bytes are free, or when nothing runs, for every unit fits alone (the plan saw to that);
- a running unit may ask for more (a dearer backend after a cheap one failed). Such a demand goes before the line, and
  while one waits no new unit starts, so that running units end and return their bytes. If all that run are waiting for
  more and the first does not fit, it is refused: it has to do without or fail. So there is no deadlock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from streamrepair.engine.plan import Unit
from streamrepair.engine.waiting import Waiting

Worker = int
"""A worker's number."""


@dataclass(slots=True)
class Admission:
    """Units waiting and running, and the bytes that are free."""

    waiting: dict[str, Waiting]
    """By place ("cpu" or "cuda")."""
    free_bytes: int
    held: dict[Worker, int] = field(default_factory=dict)
    """Bytes of every running unit."""
    shards: dict[Worker, int] = field(default_factory=dict)
    """Of every running unit."""
    line: deque[Worker] = field(default_factory=deque)
    """Workers that want a unit."""
    growing: deque[Worker] = field(default_factory=deque)
    """Workers whose running unit waits for more."""

    @classmethod
    def of(cls, units: Iterable[Unit], room_bytes: int) -> Admission:
        """All units waiting, all bytes free."""
        waiting = {"cpu": Waiting(), "cuda": Waiting()}
        for unit in units:
            waiting[unit.place].add(unit)
        return cls(waiting, room_bytes)

    def exhausted(self, place: str) -> bool:
        """Whether no unit is left for a place."""
        return not self.waiting[place]

    def following(self, place: str, count: int, shard: int | None = None) -> list[Unit]:
        """The next so many units of a place, of all or of a shard."""
        return self.waiting[place].following(count, shard)

    def take(self, worker: Worker, place: str, *, apart: bool = False) -> Unit | None:
        """The next unit for a worker, or None: it stands in line and has to ask again after a change.

        Args:
            apart: of a shard that no other worker is at, if there is such a unit.
        """
        if worker not in self.line:
            self.line.append(worker)
        if self.growing or self.line[0] != worker or not self.waiting[place]:
            return None
        waiting = self.waiting[place]
        unit = waiting.first_apart(set(self.shards.values())) if apart else waiting.first()
        if unit.ram_bytes > self.free_bytes and self.held:
            return None
        self.line.popleft()
        waiting.remove(unit)
        self.free_bytes -= unit.ram_bytes
        self.held[worker], self.shards[worker] = unit.ram_bytes, unit.shard
        return unit

    def leave(self, worker: Worker) -> None:
        """A worker wants no more units."""
        if worker in self.line:
            self.line.remove(worker)

    def grow(self, worker: Worker, more_bytes: int) -> bool | None:
        """Whether a running unit gets more bytes; None: it has to ask again after a change."""
        assert worker in self.held
        if worker not in self.growing:
            self.growing.append(worker)
        if self.growing[0] != worker:
            return None
        fits = more_bytes <= self.free_bytes
        if not fits and len(self.growing) < len(self.held):
            return None  # somebody runs who will return something
        self.growing.popleft()
        if fits:
            self.free_bytes -= more_bytes
            self.held[worker] += more_bytes
        return fits

    def give_back(self, worker: Worker) -> None:
        """A unit ended, well or not."""
        if worker in self.growing:
            self.growing.remove(worker)
        self.free_bytes += self.held.pop(worker)
        del self.shards[worker]

    def drop_waiting(self) -> None:
        """No more units."""
        for units in self.waiting.values():
            units.clear()
