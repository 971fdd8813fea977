"""What fits: the budgets held against a plan's tasks, and how many workers they allow. Pure."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from streamrepair.decompose.halves import is_cut
from streamrepair.engine import limits, memory
from streamrepair.engine.limits import RAM_SHARE
from streamrepair.errors import BudgetError, shown
from streamrepair.units import format_apart, whole_mb

if TYPE_CHECKING:
    from streamrepair.engine.batches import Batch
    from streamrepair.engine.plan import Plan, Task, Unit


@dataclass(frozen=True, slots=True)
class Room:
    """The memory that a run may use."""

    ram_bytes: int
    vram_bytes: int | None
    """Of each GPU; None without one."""
    records_bytes: int
    """Headers and records of both sides' tensors."""
    gpus: int
    free_of: str | None = None
    """Whose free memory `ram_bytes` is a share of; None where --ram says it."""

    @property
    def fixed_bytes(self) -> int:
        """What the process takes before any worker."""
        return memory.run_bytes(0, records_bytes=self.records_bytes, gpus=self.gpus)

    def fits_device(self, vram_bytes: int) -> bool:
        """Whether a task that needs so much of a GPU can run there."""
        return self.vram_bytes is not None and memory.card_bytes(vram_bytes) <= self.vram_bytes


def gpus_of(devices: Sequence[str]) -> tuple[str, ...]:
    """The GPUs among devices."""
    return tuple(device for device in devices if device != "cpu")


def refuse_too_large(tasks: Sequence[Task], room: Room) -> None:
    """Hold the neediest tensor against the budgets: what it is told to need is enough for all the others.

    Raises:
        BudgetError: even with the smallest panels it does not fit.
    """
    if not tasks:
        return
    if room.vram_bytes is not None:
        largest = max(tasks, key=lambda task: task.vram_bytes)
        need = memory.card_bytes(largest.vram_bytes)
        if need > room.vram_bytes:
            refusal = _refusal(largest, "--vram", need, room.vram_bytes)
            raise BudgetError(f"{refusal}, or let the CPU do the work: --device cpu")
    largest = max(tasks, key=_least_bytes)
    need = room.fixed_bytes + _least_workers(tasks) * memory.WORKER_BYTES + _least_bytes(largest)
    if need > room.ram_bytes:
        if room.free_of is not None:
            raise BudgetError(_refusal_of_default(largest, need, room.ram_bytes, room.free_of))
        raise BudgetError(_refusal(largest, "--ram", need, room.ram_bytes))


def _least_workers(tasks: Sequence[Task]) -> int:
    """One for each place that has tasks."""
    return max(1, len({task.place for task in tasks}))


def _least_bytes(task: Task) -> int:
    """Projected bytes of a task with the smallest panels."""
    if task.shape is None:
        return task.ram_bytes
    cuda = task.place == "cuda"
    return min(task.ram_bytes, memory.repair_bytes(task.shape, task.backend, task.shape.block, cuda=cuda))


def holds(room: Room, batch: Batch, tasks: Sequence[Task]) -> bool:
    """Whether the budgets hold a batch, with no more workers than the tasks need."""
    fixed_bytes = room.fixed_bytes + _least_workers(tasks) * memory.WORKER_BYTES
    return room.fits_device(batch.vram_bytes) and fixed_bytes + batch.ram_bytes <= room.ram_bytes


def fitted(task: Task, room: Room, workers: int) -> Task:
    """The task, with the smallest panels where with its preferred ones it takes more than one worker's share.

    Narrow panels cost system calls; a worker that waits for memory costs as much as it would have done.

    Args:
        workers: of the CPU.
    """
    lanes = workers + room.gpus
    if task.shape is None or lanes * (task.ram_bytes + memory.WORKER_BYTES) <= room.ram_bytes - room.fixed_bytes:
        return task
    return replace(task, panel_rows=task.shape.block, ram_bytes=_least_bytes(task))


def _refusal(task: Task, option: str, need_bytes: int, allowed_bytes: int) -> str:
    needs, allows = format_apart(need_bytes, allowed_bytes)
    return (
        f"tensor {shown(task.name)} {list(task.out.shape)} needs {needs}, {option} allows {allows}: "
        f"the smallest budget that works is {option} {whole_mb(need_bytes)}"
    )


def _refusal_of_default(task: Task, need_bytes: int, allowed_bytes: int, free_of: str) -> str:
    """Where no --ram is given: one that is more than is free would get the process killed."""
    needs, allows = format_apart(need_bytes, allowed_bytes)
    free_mb = -(-int(need_bytes / RAM_SHARE) // 1_000_000)
    remedy = "raise its limit on memory" if free_of == limits.GROUP else "free some"
    if need_bytes * RAM_SHARE < allowed_bytes:
        remedy = f"let it take more, with --ram {whole_mb(need_bytes)}, or {remedy}"
    return (
        f"tensor {shown(task.name)} {list(task.out.shape)} needs {needs}; without --ram a run takes {RAM_SHARE:.0%} of "
        f"what {free_of} has free, {allows}: {remedy}, so that {free_mb} MB are free"
    )


def affordable_lanes(units: Sequence[Unit], devices: Sequence[str], workers: int, room: Room) -> tuple[str, ...]:
    """The device of each worker: every GPU, then the CPU's; as many as leave room for the largest unit.

    And for at least as much work as stacks. A GPU that has to go is the last one, CPU workers go before it. Of those
    there is one for each unit, and one to lend to each that has a matrix large enough to be cut in halves.
    """
    left_bytes = room.ram_bytes - room.fixed_bytes
    largest = max((unit.ram_bytes for unit in units), default=0)
    most = min((left_bytes - largest) // memory.WORKER_BYTES, left_bytes // memory.WORKER_BYTES // 2)
    cpu_units = [unit for unit in units if unit.place == "cpu"]
    on_cpu, on_gpus = len(cpu_units), len(units) - len(cpu_units)
    to_lend = sum(task.shape is not None and is_cut(task.shape.cols) for unit in cpu_units for task in unit.tasks)
    gpus = gpus_of(devices)[: max(1, on_gpus)] if on_gpus else ()
    if on_gpus and on_cpu:
        gpus = gpus[: max(1, most - 1)]
    elif on_gpus:
        gpus = gpus[: max(1, most)]
    cpus = min(workers, on_cpu + to_lend, max(1, most - len(gpus))) if on_cpu else 0
    return (*gpus, *["cpu"] * cpus) or ("cpu",)


def most_at_once(needs: Sequence[Sequence[int]], counts: Sequence[int], room_bytes: int) -> int:
    """The most that units can hold together, to a 4096th of the room, of those that fit it together; rounded up.

    Args:
        needs: bytes of each unit, by place. counts: how many of a place's run at once.
    """
    step = max(1, room_bytes // 4096)
    reached = 1  # a bit for each sum, in steps, each need rounded down
    for each, count in zip(needs, counts, strict=True):
        by_number = [reached] + [0] * count  # of units taken
        for need, times in Counter(need // step for need in each if need <= room_bytes).items():
            for _ in range(min(times, count)):
                for taken in range(count, 0, -1):
                    by_number[taken] |= by_number[taken - 1] << need
        reached = functools.reduce(operator.or_, by_number) & ((1 << room_bytes // step + 1) - 1)
    return min(room_bytes, (reached.bit_length() - 1 + sum(counts)) * step)


def full_fits(plan: Plan) -> Mapping[str, bool]:
    """For each repair, whether the CPU's part of the reference route fits beside the other workers' largest units.

    One that the plan projects for the CPU with that very route has its room already. Beside a member of a batch are the
    other members' pairs.
    """
    at_once = sorted((unit.ram_bytes for unit in plan.at_once), reverse=True)
    others = sum(at_once[: plan.workers - 1])
    room = plan.room_bytes - others
    return {
        task.name: (task.place == "cpu" and task.backend == "full")
        or memory.repair_bytes(task.shape, "full", task.shape.block) + _beside_bytes(unit, task) <= room
        for unit in plan.units
        for task in unit.tasks
        if task.shape is not None
    }


def _beside_bytes(unit: Unit, task: Task) -> int:
    """What a task's unit holds beside the task."""
    return unit.ram_bytes - task.ram_bytes


def full_budget(plan: Plan, *tasks: Task) -> int:
    """Bytes of --ram in which the reference route fits for each of some repairs, with one worker on the CPU."""
    wanted = {id(task) for task in tasks}
    others = sorted((other.ram_bytes for other in plan.at_once), reverse=True)[: len(plan.gpus)]
    fixed = memory.run_bytes(1 + len(plan.gpus), records_bytes=plan.records_bytes, gpus=len(plan.gpus))
    need = max(
        memory.repair_bytes(task.shape, "full", task.shape.block) + _beside_bytes(unit, task)
        for unit in plan.units
        for task in unit.tasks
        if task.shape is not None and id(task) in wanted
    )
    return fixed + sum(others) + need
