"""The plan of a run, from headers alone: what is done with every tensor, where it goes, what it needs. Pure.

Everything that can be refused without reading a weight is refused while planning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from streamrepair.checkpoint.headers import ITEM_BITS, TensorEntry
from streamrepair.checkpoint.layout import Checkpoint
from streamrepair.checkpoint.pairing import Pairing, Selection, Side, pair
from streamrepair.checkpoint.write import ShardLayout, layout_like
from streamrepair.engine import memory
from streamrepair.engine.finite import is_searched
from streamrepair.engine.memory import MatrixShape
from streamrepair.errors import BudgetError, shown
from streamrepair.report import Settings
from streamrepair.units import format_bytes

_WHOLE_BYTES = 1 << 26
"""A pair of matrices smaller than this is read whole, and once, where memory allows."""
_STRETCH_ELEMENTS = 4096
"""Columns read of each row of a larger wide matrix: in blocks of columns every row costs a system call."""


@dataclass(frozen=True, slots=True)
class Task:
    """One tensor of the output."""

    pairing: Pairing
    ft: Side
    shard: int
    """Position of the output shard."""
    out: TensorEntry
    """Where the result goes."""
    shape: MatrixShape | None
    """None for a tensor that is passed through."""
    panel_rows: int
    backend: str
    ram_bytes: int
    """Projected host bytes while it runs."""
    vram_bytes: int
    """Projected device bytes while it runs; 0 on the CPU."""
    flops: float
    """Projected floating-point operations."""

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.pairing.name

    @property
    def read_bytes(self) -> int:
        """Bytes read: a repair reads each side for the Gram pass and for the merge, unless one panel keeps it whole."""
        if self.shape is None or self.pairing.base is None:
            return self.ft.entry.nbytes
        passes = 1 if self.panel_rows >= self.shape.rows else 2
        return passes * (self.ft.entry.nbytes + self.pairing.base.entry.nbytes)


@dataclass(frozen=True, slots=True)
class Plan:
    """All of a run's work."""

    base: Checkpoint
    ft: Checkpoint
    settings: Settings
    layouts: tuple[ShardLayout, ...]
    """Output shards, in FT's order."""
    tasks: tuple[Task, ...]
    """In the order they are started."""
    dropped: tuple[Pairing, ...]
    """Tensors only BASE has."""
    device: str
    workers: int
    ram_allowed_bytes: int
    vram_allowed_bytes: int | None

    @property
    def tensors(self) -> int:
        """Tensors of both sides."""
        return len(self.tasks) + len(self.dropped)

    @property
    def ram_projected_bytes(self) -> int:
        """Projected peak of the process."""
        task_bytes = [t.ram_bytes for t in self.tasks]
        needed = memory.run_bytes(task_bytes, self.workers, tensors=self.tensors, cuda=self.device != "cpu")
        return min(needed, self.ram_allowed_bytes)

    @property
    def vram_projected_bytes(self) -> int | None:
        """Projected peak per GPU."""
        if self.device == "cpu":
            return None
        return memory.CUDA_CONTEXT_BYTES + max((t.vram_bytes for t in self.tasks), default=0)

    @property
    def out_bytes(self) -> int:
        """Bytes of all output shards."""
        return sum(layout.file_bytes for layout in self.layouts)

    @property
    def read_bytes(self) -> int:
        """Bytes all tasks read, and the check of what only BASE has."""
        return sum(task.read_bytes for task in self.tasks) + self._checked_bytes

    @property
    def _checked_bytes(self) -> int:
        """BASE's sides that no result is made of, but which are searched for NaN and infinity."""
        if self.settings.on_nonfinite != "refuse":
            return 0
        unused = [*self.dropped, *(task.pairing for task in self.tasks if task.shape is None)]
        return sum(p.base.entry.nbytes for p in unused if p.base is not None and is_searched(p.base.entry))


def make_plan(
    base: Checkpoint,
    ft: Checkpoint,
    settings: Settings,
    *,
    device: str,
    workers: int,
    ram_bytes: int,
    vram_bytes: int | None,
) -> Plan:
    """Plan the repair of FT against BASE.

    Raises:
        InputError: the two have nothing in common.
        UsageError: a pattern does not compile.
        BudgetError: a tensor does not fit the memory even alone.
    """
    layouts = tuple(layout_like(shard, settings.out_dtype) for shard in ft.shards)
    pairings = pair(base, ft, Selection(settings.include, settings.exclude))
    tasks = []
    dropped = []
    for pairing in pairings:
        if pairing.ft is None:
            dropped.append(pairing)
        else:
            tasks.append(_task(pairing, pairing.ft, layouts, settings, device=device))
    tasks.sort(key=lambda task: (task.shard, -task.flops, -task.out.nbytes))
    fixed = memory.process_bytes(len(pairings), cuda=device != "cpu")
    _refuse_too_large(tasks, fixed, ram_bytes, vram_bytes)
    fitted = tuple(_fitted(task, ram_bytes - fixed - memory.WORKER_BYTES) for task in tasks)
    # As many workers as leave room for the largest task, and for at least as much work as stacks.
    room = ram_bytes - fixed
    largest = max((task.ram_bytes for task in fitted), default=0)
    affordable = max(1, min((room - largest) // memory.WORKER_BYTES, room // memory.WORKER_BYTES // 2))
    return Plan(
        base=base,
        ft=ft,
        settings=settings,
        layouts=layouts,
        tasks=fitted,
        dropped=tuple(dropped),
        device=device,
        workers=min(workers, affordable, max(1, len(tasks))),
        ram_allowed_bytes=ram_bytes,
        vram_allowed_bytes=vram_bytes,
    )


def _task(pairing: Pairing, ft: Side, layouts: tuple[ShardLayout, ...], settings: Settings, *, device: str) -> Task:
    out = layouts[ft.shard].entries[pairing.name]
    if pairing.intent != "repair" or pairing.base is None:
        return Task(pairing, ft, ft.shard, out, None, 0, "", 2 * memory.COPY_BYTES, 0, 0.0)
    shape = matrix_shape(pairing.base.entry, ft.entry, out, settings)
    rows = shape.block
    if pairing.base.entry.nbytes + ft.entry.nbytes <= _WHOLE_BYTES:
        rows = shape.rows
    elif ft.entry.shape[0] < ft.entry.shape[1]:
        rows = min(shape.rows, max(rows, _STRETCH_ELEMENTS))
    backend = "full" if settings.backend == "full" else "gram"
    ram = memory.repair_bytes(shape, backend, rows, cuda=device != "cpu")
    vram = memory.device_bytes(shape, backend) if device != "cpu" else 0
    return Task(pairing, ft, ft.shard, out, shape, rows, backend, ram, vram, flops(shape, backend))


def matrix_shape(base: TensorEntry, ft: TensorEntry, out: TensorEntry, settings: Settings) -> MatrixShape:
    """What a pair's memory and cost depend on."""
    # τ exceeds the median by a factor of at least √2 (β → 0) at scale 1, so at most half of the values can be kept.
    halved = settings.sigma == "median" and settings.scale >= 0.71
    return MatrixShape(
        rows=max(ft.shape),
        cols=min(ft.shape),
        base_item_bytes=ITEM_BITS[base.dtype] // 8,
        ft_item_bytes=ITEM_BITS[ft.dtype] // 8,
        out_item_bytes=ITEM_BITS[out.dtype] // 8,
        kept_share=0.5 if halved else 1.0,
    )


def flops(shape: MatrixShape, backend: str) -> float:
    """Floating-point operations of a repair, with a tenth of the rank kept."""
    m, n = float(shape.rows), float(shape.cols)
    if backend == "full":
        return 2 * m * n * n + 20 * n**3
    return m * n * n + 4 / 3 * n**3 + 0.4 * m * n * n


def _refuse_too_large(tasks: list[Task], fixed_bytes: int, ram_bytes: int, vram_bytes: int | None) -> None:
    """Hold the neediest tensor against the budgets: what it is told to need is enough for all the others.

    Raises:
        BudgetError: even with the smallest panels it does not fit.
    """
    cuda = vram_bytes is not None
    if not tasks:
        return
    if vram_bytes is not None:
        largest = max(tasks, key=lambda task: task.vram_bytes)
        need = largest.vram_bytes + memory.CUDA_CONTEXT_BYTES
        if need > vram_bytes:
            raise BudgetError(_refusal(largest, "--vram", need, vram_bytes) + ", or --device cpu")
    largest = max(tasks, key=lambda task: _least_bytes(task, cuda=cuda))
    need = fixed_bytes + memory.WORKER_BYTES + _least_bytes(largest, cuda=cuda)
    if need > ram_bytes:
        raise BudgetError(_refusal(largest, "--ram", need, ram_bytes))


def _least_bytes(task: Task, *, cuda: bool) -> int:
    """Projected bytes of a task with the smallest panels."""
    if task.shape is None:
        return task.ram_bytes
    return min(task.ram_bytes, memory.repair_bytes(task.shape, task.backend, task.shape.block, cuda=cuda))


def _fitted(task: Task, ram_bytes: int) -> Task:
    """The task, with the smallest panels where its preferred ones do not fit."""
    if task.shape is None or task.ram_bytes <= ram_bytes:
        return task
    return replace(task, panel_rows=task.shape.block, ram_bytes=_least_bytes(task, cuda=task.vram_bytes > 0))


def _refusal(task: Task, option: str, need_bytes: int, allowed_bytes: int) -> str:
    need_mb = -(-need_bytes // 1_000_000)
    return (
        f"tensor {shown(task.name)} {list(task.out.shape)} needs {format_bytes(need_bytes)}, {option} allows "
        f"{format_bytes(allowed_bytes)}: the smallest budget that works is {option} {need_mb}MB"
    )


def fits_full(plan: Plan) -> Mapping[str, bool]:
    """For each repair, whether the reference route fits beside the other workers, should every cheaper one fail."""
    others = sorted((task.ram_bytes for task in plan.tasks), reverse=True)[: plan.workers - 1]
    fixed = memory.run_bytes(others, plan.workers, tensors=plan.tensors, cuda=plan.device != "cpu")
    room = plan.ram_allowed_bytes - fixed
    return {
        task.name: memory.repair_bytes(task.shape, "full", task.shape.block) <= room
        for task in plan.tasks
        if task.shape is not None
    }


def full_budget(plan: Plan, task: Task) -> int:
    """Bytes of --ram in which the reference route fits for a task, with one worker."""
    assert task.shape is not None
    need = memory.repair_bytes(task.shape, "full", task.shape.block)
    return memory.run_bytes([need], 1, tensors=plan.tensors, cuda=plan.device != "cpu")
