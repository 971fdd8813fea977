"""How long a task will take: what the schedule, the plan's estimate and the simulation go by. Pure.

With this machine's speeds where they were measured: no number of a result depends on it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from streamrepair.decompose import speed
from streamrepair.decompose.speed import CPU, CUDA, KEPT_SHARE, Rates, Stages
from streamrepair.engine.memory import MatrixShape

if TYPE_CHECKING:
    from streamrepair.engine.plan import Task

COPY_BYTES_PER_S = 1.0e9
"""Reading, comparing, digesting and writing a tensor that is passed through."""
DISK_BYTES_PER_S = 1.5e9
"""Reads and writes together, where nothing better is known."""


def predicted(shape: MatrixShape, method: str, rates: Rates, kept: float = KEPT_SHARE) -> Stages:
    """Seconds of a repair by one worker, as `speed.predicted` has them."""
    return speed.predicted(shape.rows, shape.cols, method, rates, kept, narrow=shape.out_item_bytes == 2)


def stages(task: Task, place: str, cpu: Rates = CPU) -> Stages:
    """Seconds of computation of a task on one worker of a place ("cpu" or "cuda").

    A task that tries block Krylov first is counted as if that gave up: real fine-tunes mostly keep too much for it.
    """
    if task.shape is None:
        return Stages(0.0, 0.0, task.out.nbytes / COPY_BYTES_PER_S)
    method = "full" if task.backend == "full" else "gram"
    return predicted(task.shape, method, cpu if place == "cpu" else CUDA)


def seconds(task: Task, place: str, cpu: Rates = CPU) -> float:
    """Seconds of computation of a task on one worker of a place."""
    return stages(task, place, cpu).total_s


def estimate_s(tasks: Sequence[Task], lanes: Sequence[str], room_bytes: int, cpu: Rates = CPU) -> float:
    """About how long tasks take together: the slowest of the CPU's workers, the GPUs, the files, and the memory.

    Args:
        lanes: the device of each worker. room_bytes: what tasks may hold together. cpu: speeds of one of the CPU's
            workers.
    """
    each_s = {task.name: seconds(task, task.place, cpu) for task in tasks}
    found = sum(task.read_once_bytes + task.out.nbytes for task in tasks) / DISK_BYTES_PER_S
    for place in ("cpu", "cuda"):
        here = [each_s[task.name] for task in tasks if task.place == place]
        workers = max(1, sum((lane == "cpu") == (place == "cpu") for lane in lanes))
        found = max(found, sum(here) / workers, max(here, default=0.0))
    return max(found, _in_turns_s(tasks, each_s, len(lanes), room_bytes))


def _in_turns_s(tasks: Sequence[Task], each_s: Mapping[str, float], workers: int, room_bytes: int) -> float:
    """What memory alone makes it: of tasks that need more than a (k + 1)-th of the room only k run at once."""
    neediest = sorted(tasks, key=lambda task: -task.ram_bytes)
    needs = [-task.ram_bytes for task in neediest]
    until_s = [0.0, *accumulate(each_s[task.name] for task in neediest)]
    return max((until_s[bisect_left(needs, -(room_bytes // (k + 1)))] / k for k in range(1, workers)), default=0.0)
