"""Where each task runs and in which order they start. Pure: shapes, shards and predicted seconds in, an order out.

Three aims, in this order: what a task computes must not depend on how many workers there are, so its *place* (CPU or
GPU) is a matter of its shape and of the kinds of device that the user named; shards seal one after another, so tasks go
by shard; and no device is left alone with a long task at the end, so tasks that are long against what comes after them
start earlier. Which device of a kind a task gets is decided by the ledger when one is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from streamrepair.engine import cost
from streamrepair.engine.lanes import PLACES, Place, workers_at

if TYPE_CHECKING:
    from streamrepair.engine.plan import Task, Unit

CPU_PAYS = 2.0
"""With `--device cuda,cpu` a matrix goes to the CPU if one core takes at most so many times as long as a GPU: two cores
then do as well as it, so that even a model of small matrices alone is not slowed down."""


def place_of(task: Task, devices: Sequence[str]) -> Place:
    """Where a task runs, given the devices that the user named.

    Copies need no GPU. Beside GPUs the CPU takes, if named, the matrices that it is nearly as quick with: small ones.
    """
    if task.shape is None or all(device == "cpu" for device in devices):
        return "cpu"
    if "cpu" in devices and cost.seconds(task, "cpu") <= CPU_PAYS * cost.seconds(task, "cuda"):
        return "cpu"
    return "cuda"


def order(units: Sequence[Unit], lanes: Sequence[str]) -> tuple[Unit, ...]:
    """All units in the order they start.

    Args:
        units: each with its place. lanes: the device of each worker.
    """
    ordered: list[Unit] = []
    for place in PLACES:  # two queues, independent of each other
        ordered += _ordered([unit for unit in units if unit.place == place], max(1, workers_at(lanes, place)))
    return tuple(ordered)


def _ordered(units: Sequence[Unit], workers: int) -> list[Unit]:
    """Units of one place: by shard and dearest first, but none so late that it would run on alone.

    A unit of s seconds should start while the others still have s seconds for each worker: the latest such position in
    the order by shard is where it is put.
    """

    def seconds(unit: Unit) -> float:
        return cost.seconds(unit, unit.place)

    by_shard = sorted(units, key=lambda unit: (unit.shard, -seconds(unit), -unit.out_bytes))
    left_s = list(accumulate(seconds(unit) for unit in reversed(by_shard)))[::-1]
    keyed = []
    for i, unit in enumerate(by_shard):
        start = _latest(left_s, workers * seconds(unit), i)
        keyed.append((start, start == i, -seconds(unit), i))
    return [by_shard[key[-1]] for key in sorted(keyed)]


def _latest(left_s: list[float], need_s: float, last: int) -> int:
    """The largest position up to `last` with `need_s` left from it on; 0 if there is none. `left_s` falls."""
    if left_s[last] >= need_s:
        return last
    low, high = 0, last
    while low < high:
        middle = (low + high + 1) // 2
        if left_s[middle] >= need_s:
            low = middle
        else:
            high = middle - 1
    return low
