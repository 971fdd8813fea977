"""The units of one place that have not started, in their order, and by shard."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from itertools import islice

from streamrepair.engine.plan import Unit

_Queue = OrderedDict[int, Unit]
"""By number. A plain dict takes the longer to its first item the more were taken from there."""


class Waiting:
    """A queue of units, from which one further back can be taken; a batch counts as one."""

    def __init__(self) -> None:
        self._all: _Queue = OrderedDict()
        self._by_shard: dict[int, _Queue] = {}
        self._numbers: dict[str, int] = {}
        """Place in the order, by name."""

    def __len__(self) -> int:
        return len(self._all)

    def add(self, unit: Unit) -> None:
        """One more, after all others."""
        number = self._numbers[unit.name] = len(self._numbers)
        self._all[number] = self._by_shard.setdefault(unit.shard, OrderedDict())[number] = unit

    def first(self) -> Unit:
        """The next."""
        return next(iter(self._all.values()))

    def first_apart(self, shards: Collection[int]) -> Unit:
        """The next of those that are in none of `shards`; the next of all if there is none."""
        others = (next(iter(units)) for shard, units in self._by_shard.items() if shard not in shards)
        number = min(others, default=None) if shards else None
        return self.first() if number is None else self._all[number]

    def following(self, count: int, shard: int | None = None) -> list[Unit]:
        """The next so many units, of all or of a shard."""
        units = self._all if shard is None else self._by_shard.get(shard, _Queue())
        return list(islice(units.values(), count))

    def remove(self, unit: Unit) -> None:
        """It starts."""
        number = self._numbers[unit.name]
        del self._all[number]
        of_shard = self._by_shard[unit.shard]
        del of_shard[number]
        if not of_shard:
            del self._by_shard[unit.shard]

    def clear(self) -> None:
        """None is left."""
        self._all.clear()
        self._by_shard.clear()
