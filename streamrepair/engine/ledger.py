"""The ledger of memory: a unit reserves its projected bytes before it starts and returns them when it ends.

`admission` has the rules; here are the lock and the waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from streamrepair.engine.admission import Admission
from streamrepair.engine.plan import Unit


class Ledger:
    """Hands out units, each once its bytes are free; shared by all workers of a run.

    Args:
        units: in the order they start. room_bytes: what running units may hold together.
    """

    def __init__(self, units: Iterable[Unit], *, room_bytes: int) -> None:
        self._state = Admission.of(units, room_bytes)
        self._changed = threading.Condition()

    def take(self, worker: int, place: str, *, before_waiting: Callable[[], None], apart: bool = False) -> Unit | None:
        """The next unit for a worker, waiting until its bytes are free; None when there are no more.

        Args:
            place: "cpu" or "cuda". before_waiting: lets go of what the worker keeps from its last unit.
            apart: of a shard that no other worker is at, if there is such a unit.
        """
        waited = False
        with self._changed:
            while not self._state.exhausted(place):
                unit = self._state.take(worker, place, apart=apart)
                if unit is not None:
                    break
                if not waited:
                    before_waiting()
                    waited = True
                    continue  # nothing may have changed, but the line may have: ask once more before sleeping
                self._changed.wait()
            else:
                unit = None
                self._state.leave(worker)
            self._changed.notify_all()  # the next in line may go too, or leave
            return unit

    def grow(self, worker: int, more_bytes: int) -> bool:
        """Reserve more for a worker's running unit, waiting for it; False if it cannot be had beside the others."""
        with self._changed:
            self._changed.notify_all()  # whoever waits for more may be the last that runs: it has to look again
            while (granted := self._state.grow(worker, more_bytes)) is None:
                self._changed.wait()
            self._changed.notify_all()
            return granted

    def following(self, place: str, count: int, shard: int | None = None) -> list[Unit]:
        """The units that workers of that place, or one that stays at a shard, will get next: to be read ahead."""
        with self._changed:
            return self._state.following(place, count, shard)

    def give_back(self, worker: int) -> None:
        """Return all that a worker's unit had reserved."""
        with self._changed:
            self._state.give_back(worker)
            self._changed.notify_all()

    def close(self) -> None:
        """Hand out no more units."""
        with self._changed:
            self._state.drop_waiting()
            self._changed.notify_all()
