"""How long a task will take: what the schedule, the plan's estimate and the simulation go by. Pure.

With this machine's speeds where they were measured: no number of a result depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from streamrepair.decompose import speed
from streamrepair.decompose.halves import is_cut
from streamrepair.decompose.speed import CPU, CUDA, KEPT_SHARE, Rates, Stages
from streamrepair.engine.lanes import PLACES, workers_at
from streamrepair.engine.memory import MatrixShape

if TYPE_CHECKING:
    from streamrepair.engine.plan import Task, Unit

COPY_BYTES_PER_S = 1.0e9
"""Reading, comparing, digesting and writing a tensor that is passed through."""
DISK_BYTES_PER_S = 1.5e9
"""Reads and writes together, where nothing better is known."""
TENSOR_START_S = 1.3e-4
"""Of the interpreter for a tensor, whatever its size: one at a time, by however many workers."""
BATCH_START = 0.25
"""Of the start of a repair, what each further member of a batch takes: its checks and its merge; not measured."""


def predicted(shape: MatrixShape, method: str, rates: Rates, kept: float = KEPT_SHARE) -> Stages:
    """Seconds of a repair by one worker, as `speed.predicted` has them."""
    return speed.predicted(shape.rows, shape.cols, method, rates, kept, narrow=shape.out_item_bytes == 2)


def flops(shape: MatrixShape, backend: str) -> float:
    """Floating-point operations of a repair, with a tenth of the rank kept."""
    m, n = float(shape.rows), float(shape.cols)
    if backend == "full":
        return 2 * m * n * n + 20 * n**3
    return m * n * n + 4 / 3 * n**3 + 0.4 * m * n * n


def stages(unit: Unit, place: str, cpu: Rates = CPU) -> Stages:
    """Seconds of computation of a unit on one worker of a place ("cpu" or "cuda").

    The members of a batch share most of a repair's start.
    """
    if len(unit.tasks) == 1:
        return _of_task(unit.tasks[0], place, cpu)
    each = [_of_task(task, place, cpu) for task in unit.tasks]
    rates = cpu if place == "cpu" else CUDA
    saved_s = (len(each) - 1) * (1.0 - BATCH_START) * rates.start_s
    return Stages(
        sum(one.gram_s for one in each), sum(one.factor_s for one in each) - saved_s, sum(one.merge_s for one in each)
    )


def _of_task(task: Task, place: str, cpu: Rates) -> Stages:
    """Seconds of a task by itself.

    A task that tries block Krylov first is counted as if that gave up: real fine-tunes mostly keep too much for it.
    """
    if task.shape is None:
        return Stages(0.0, 0.0, TENSOR_START_S + task.out.nbytes / COPY_BYTES_PER_S)
    method = "full" if task.backend == "full" else "gram"
    return predicted(task.shape, method, cpu if place == "cpu" else CUDA)


def seconds(unit: Unit, place: str, cpu: Rates = CPU) -> float:
    """Seconds of computation of a unit on one worker of a place."""
    return stages(unit, place, cpu).total_s


def estimate_s(units: Sequence[Unit], lanes: Sequence[str], room_bytes: int, cpu: Rates = CPU) -> float:
    """About how long units take together: the slowest of the CPU's workers, the GPUs, the files, and the memory.

    CPU workers that are held back by memory, or have no more to do, are lent to those with a large matrix.

    Args:
        lanes: the device of each worker. room_bytes: what units may hold together. cpu: speeds of one of the CPU's
            workers.
    """
    each_s = [seconds(unit, unit.place, cpu) for unit in units]
    cpus = workers_at(lanes, "cpu")
    helped_s = [_helped_s(unit, cpu) if cpus > 1 else unit_s for unit, unit_s in zip(units, each_s, strict=True)]
    found = sum(unit.read_once_bytes + unit.out_bytes for unit in units) / DISK_BYTES_PER_S
    found = max(found, TENSOR_START_S * sum(len(unit.tasks) for unit in units))
    for place in PLACES:
        here = [i for i, unit in enumerate(units) if unit.place == place]
        workers = max(1, workers_at(lanes, place))
        found = max(found, sum(each_s[i] for i in here) / workers, max((helped_s[i] for i in here), default=0.0))
    needs = [unit.ram_bytes for unit in units]
    for k in range(1, len(lanes)):
        found = max(found, _in_turns_s(needs, helped_s if k <= cpus // 2 else each_s, k, room_bytes))
    return found


def _helped_s(unit: Unit, cpu: Rates) -> float:
    """Seconds of a unit, by one of the CPU's workers and, where it is cut in halves, one that has nothing to do."""
    alone = stages(unit, unit.place, cpu)
    shape = unit.tasks[0].shape
    if unit.place != "cpu" or shape is None or not is_cut(shape.cols):
        return alone.total_s
    return alone.total_s - (alone.gram_s + alone.merge_s) / 2


def _in_turns_s(needs: Sequence[int], each_s: Sequence[float], k: int, room_bytes: int) -> float:
    """What memory alone makes it: of units that need more than a (k + 1)-th of the room only k run at once.

    Args:
        needs: bytes of each unit. each_s: its seconds.
    """
    return sum(unit_s for need, unit_s in zip(needs, each_s, strict=True) if need > room_bytes // (k + 1)) / k
