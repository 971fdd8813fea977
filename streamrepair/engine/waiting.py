"""The units of one place that have not started, in their order, and by shard."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from itertools import islice

from streamrepair.engine.plan import Unit

_Queue = OrderedDict[str, Unit]
"""By name. A plain dict takes the longer to its first item the more were taken from there."""


class Waiting:
    """A queue of units, from which one further back can be taken; a batch counts as one."""

    def __init__(self) -> None:
        self._all: _Queue = OrderedDict()
        self._by_shard: dict[int, _Queue] = {}

    def __len__(self) -> int:
        return len(self._all)

    def add(self, unit: Unit) -> None:
        """One more, after all others."""
        self._all[unit.name] = unit
        self._by_shard.setdefault(unit.shard, OrderedDict())[unit.name] = unit

    def first(self) -> Unit:
        """The next."""
        return next(iter(self._all.values()))

    def first_apart(self, shards: Container[int]) -> Unit:
        """The next of a shard that is not among `shards`; the next if there is none."""
        of_others = (units for shard, units in self._by_shard.items() if shard not in shards)
        return next(iter(next(of_others, self._all).values()))

    def following(self, count: int) -> list[Unit]:
        """The next so many."""
        return list(islice(self._all.values(), count))

    def remove(self, unit: Unit) -> None:
        """It starts."""
        del self._all[unit.name]
        of_shard = self._by_shard[unit.shard]
        del of_shard[unit.name]
        if not of_shard:
            del self._by_shard[unit.shard]

    def clear(self) -> None:
        """None is left."""
        self._all.clear()
        self._by_shard.clear()
