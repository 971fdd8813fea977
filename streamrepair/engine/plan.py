"""The plan of a run, from headers alone: what is done with every tensor, where it goes, what it needs. Pure.

Everything that can be refused without reading a weight is refused while planning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from streamrepair.checkpoint.headers import TensorEntry
from streamrepair.checkpoint.layout import Checkpoint
from streamrepair.checkpoint.pairing import Pairing, Selection, Side, pair
from streamrepair.checkpoint.write import ShardLayout, layout_like
from streamrepair.decompose.choose import held_share, krylov_share
from streamrepair.decompose.speed import CPU, Rates
from streamrepair.engine import batches, cost, memory, schedule
from streamrepair.engine.batches import Batch
from streamrepair.engine.finite import is_searched
from streamrepair.engine.fit import Room, affordable_lanes, fitted, gpus_of, holds, most_at_once, refuse_too_large
from streamrepair.engine.lanes import PLACES, Place, workers_at
from streamrepair.engine.memory import MatrixShape
from streamrepair.report import Settings

_WHOLE_BYTES = 1 << 26
"""A pair of matrices smaller than this is read whole, and once, where memory allows."""
_STRETCH_ELEMENTS = 4096
"""Columns read of each row of a larger wide matrix: in blocks of columns every row costs a system call."""


@dataclass(frozen=True, slots=True)
class Task:
    """One tensor of the output."""

    pairing: Pairing
    shard: int
    """Position of the output shard."""
    out: TensorEntry
    """Where the result goes."""
    ram_bytes: int
    """Projected host bytes while it runs."""
    shape: MatrixShape | None = None
    """None for a tensor that is passed through: what follows is of repairs."""
    panel_rows: int = 0
    backend: str = ""
    """What is tried first, and whose memory is projected: `randomized` includes `gram`, to which it hands over."""
    place: Place = "cpu"
    """Whether the CPU or a GPU computes it."""
    vram_bytes: int = 0
    """Projected device bytes while it runs; 0 on the CPU."""

    @property
    def ft(self) -> Side:
        """FT's tensor, which every task has."""
        assert self.pairing.ft is not None
        return self.pairing.ft

    @property
    def flops(self) -> float:
        """Projected floating-point operations."""
        return 0.0 if self.shape is None else cost.flops(self.shape, self.backend)

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.pairing.name

    @property
    def paired_with(self) -> str | None:
        """The name of BASE's tensor, where it is another."""
        base = self.pairing.base
        return base.entry.name if self.shape is not None and base is not None and base.entry.name != self.name else None

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Itself: what it has in common with a batch."""
        return (self,)

    @property
    def out_bytes(self) -> int:
        """Bytes of the result."""
        return self.out.nbytes

    @property
    def read_bytes(self) -> int:
        """Bytes read: a repair reads each side for the Gram pass and for the merge, unless one panel keeps it whole."""
        if self.shape is None or self.pairing.base is None:
            return self.ft.entry.nbytes
        passes = 1 if self.panel_rows >= self.shape.rows else 2
        return passes * self.read_once_bytes

    @property
    def read_once_bytes(self) -> int:
        """Bytes of what it reads, however often."""
        if self.shape is None or self.pairing.base is None:
            return self.ft.entry.nbytes
        return self.ft.entry.nbytes + self.pairing.base.entry.nbytes


Unit = Task | Batch
"""What a worker is given at once."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All of a run's work."""

    base: Checkpoint
    ft: Checkpoint
    settings: Settings
    layouts: tuple[ShardLayout, ...]
    """Output shards, in FT's order."""
    units: tuple[Unit, ...]
    """All tasks, some of them in batches, in the order they are started."""
    dropped: tuple[Pairing, ...]
    """Tensors only BASE has."""
    devices: tuple[str, ...]
    """What the user named: "cpu", "cuda:0", …"""
    lanes: tuple[str, ...]
    """The device of each worker: one for each GPU, any number for the CPU."""
    ram_allowed_bytes: int
    vram_allowed_bytes: int | None
    rates: Rates = CPU
    """Speeds of one of the CPU's workers, for predicted times."""
    copies: Mapping[str, str] | None = None
    """Tensor of FT alone → the one that it is a copy of; None where only headers were read."""

    @property
    def tasks(self) -> tuple[Task, ...]:
        """In the order they are started."""
        return tuple(task for unit in self.units for task in unit.tasks)

    @property
    def batches(self) -> list[Batch]:
        """Those of the units that are batches."""
        return [unit for unit in self.units if isinstance(unit, Batch)]

    @property
    def device(self) -> str:
        """The devices as one word."""
        return ",".join(self.devices)

    @property
    def workers(self) -> int:
        """Units in work at once."""
        return len(self.lanes)

    @property
    def gpus(self) -> tuple[str, ...]:
        """The GPUs in use."""
        return gpus_of(self.devices)

    @property
    def tensors(self) -> int:
        """Tensors of both sides."""
        return len(self.tasks) + len(self.dropped)

    @property
    def records_bytes(self) -> int:
        """Host bytes of the headers and records of all of them."""
        return _records_bytes(self.base, self.ft, self.tensors)

    @property
    def fixed_bytes(self) -> int:
        """Host bytes of the run without its units."""
        return memory.run_bytes(self.workers, records_bytes=self.records_bytes, gpus=len(self.gpus))

    @property
    def ram_projected_bytes(self) -> int:
        """Projected peak of the process: with the neediest units that the budget lets run together."""
        if self.ram_unhindered_bytes <= self.ram_allowed_bytes:
            return self.ram_unhindered_bytes
        needs = [[unit.ram_bytes for unit in self.units if unit.place == place] for place in PLACES]
        counts = [workers_at(self.lanes, place) for place in PLACES]
        return self.ram_allowed_bytes - self.room_bytes + most_at_once(needs, counts, self.room_bytes)

    @property
    def ram_unhindered_bytes(self) -> int:
        """The least budget in which no worker ever waits for memory."""
        return self.fixed_bytes + sum(unit.ram_bytes for unit in self.at_once)

    @property
    def room_bytes(self) -> int:
        """What is left for units, all together."""
        return self.ram_allowed_bytes - self.fixed_bytes

    @property
    def side_by_side(self) -> int:
        """How many of the neediest units can run together; all workers have one if there is room."""
        needs = accumulate(sorted((unit.ram_bytes for unit in self.at_once), reverse=True))
        return sum(need <= self.room_bytes for need in needs)

    @property
    def at_once(self) -> list[Unit]:
        """The neediest units that can run together."""
        found: list[Unit] = []
        for place in PLACES:
            here = sorted((u for u in self.units if u.place == place), key=lambda u: -u.ram_bytes)
            found += here[: workers_at(self.lanes, place)]
        return found

    @property
    def vram_projected_bytes(self) -> int | None:
        """Projected peak per GPU."""
        if not self.gpus:
            return None
        return memory.card_bytes(max((unit.vram_bytes for unit in self.units), default=0))

    @property
    def estimated_s(self) -> float:
        """About how long it takes, by `cost`."""
        return cost.estimate_s(self.units, self.lanes, self.room_bytes, self.rates)

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


def _records_bytes(base: Checkpoint, ft: Checkpoint, tensors: int) -> int:
    headers_bytes = sum(len(shard.header_bytes) for side in (base, ft) for shard in side.shards)
    return memory.records_bytes(tensors, headers_bytes=headers_bytes)


def make_plan(
    base: Checkpoint,
    ft: Checkpoint,
    settings: Settings,
    *,
    devices: Sequence[str],
    workers: int,
    ram_bytes: int,
    vram_bytes: int | None,
    free_of: str | None = None,
    rates: Rates = CPU,
    copies: Mapping[str, str] | None = None,
) -> Plan:
    """Plan the repair of FT against BASE.

    Args:
        devices: "cpu", "cuda:0", …; with GPUs, "cpu" beside them lets the CPU take matrices too. workers: of the CPU.
        ram_bytes: for the process. vram_bytes: for each GPU; None without one.
        free_of: whose free memory `ram_bytes` is a share of, where nobody gave it.
        rates: speeds of one of the CPU's workers, for predicted times.
        copies: as of `pair`; None where nobody looked.

    Raises:
        InputError: the two have nothing in common.
        UsageError: a pattern does not compile.
        BudgetError: a tensor does not fit the memory even alone.
    """
    layouts = tuple(layout_like(shard, settings.out_dtype) for shard in ft.shards)
    pairings = pair(base, ft, Selection(settings.include, settings.exclude), copies)
    records_bytes, gpus = _records_bytes(base, ft, len(pairings)), len(gpus_of(devices))
    room = Room(ram_bytes, vram_bytes, records_bytes=records_bytes, gpus=gpus, free_of=free_of)
    places = {layout.name: place for place, layout in enumerate(layouts)}
    tasks = []
    for pairing in pairings:
        if pairing.ft is not None:
            place = places[pairing.ft.shard.path.name]
            task = _task(pairing, pairing.ft.entry, place, layouts[place].entries[pairing.name], settings)
            tasks.append(_placed(task, devices, room))
    refuse_too_large(tasks, room)
    units = batches.formed(tasks, lambda batch: holds(room, batch, tasks))
    units = [fitted(unit, room, workers) if isinstance(unit, Task) else unit for unit in units]
    lanes = affordable_lanes(units, devices, workers, room)
    return Plan(
        base=base,
        ft=ft,
        settings=settings,
        layouts=layouts,
        units=schedule.order(units, lanes),
        dropped=tuple(pairing for pairing in pairings if pairing.ft is None),
        devices=tuple(devices),
        lanes=lanes,
        ram_allowed_bytes=ram_bytes,
        vram_allowed_bytes=vram_bytes,
        rates=rates,
        copies=copies,
    )


def _task(pairing: Pairing, ft: TensorEntry, shard: int, out: TensorEntry, settings: Settings) -> Task:
    """One tensor's task, as it would be on the CPU."""
    if pairing.intent != "repair" or pairing.base is None:
        return Task(pairing, shard, out, memory.copy_bytes())
    shape = matrix_shape(pairing.base.entry, ft, out, settings)
    rows = shape.block
    if pairing.base.entry.nbytes + ft.nbytes <= _WHOLE_BYTES:
        rows = shape.rows
    elif ft.shape[0] < ft.shape[1]:
        rows = min(shape.rows, max(rows, _STRETCH_ELEMENTS))
    backend = "full" if settings.backend == "full" else "gram"
    krylov = krylov_share(settings.backend, settings.noise_estimate, shape.cols)
    if settings.sigma == "median" and (krylov or shape.held):
        backend = "randomized"
    return Task(pairing, shard, out, memory.repair_bytes(shape, backend, rows), shape, rows, backend)


def _placed(task: Task, devices: Sequence[str], room: Room) -> Task:
    """The task where it will run, with what it needs there; on the CPU, if that was named, when no GPU holds it."""
    if task.shape is None or schedule.place_of(task, devices) == "cpu":
        return task
    backend = "full" if task.backend == "full" else "gram"  # block Krylov is the CPU's alone
    vram_bytes = memory.device_bytes(task.shape, backend)
    if "cpu" in devices and not room.fits_device(vram_bytes):
        return task
    ram_bytes = memory.repair_bytes(task.shape, backend, task.panel_rows, cuda=True)
    return replace(task, backend=backend, place="cuda", ram_bytes=ram_bytes, vram_bytes=vram_bytes)


def matrix_shape(base: TensorEntry, ft: TensorEntry, out: TensorEntry, settings: Settings) -> MatrixShape:
    """What a pair's memory and cost depend on."""
    # τ exceeds the median by a factor of at least √2 (β → 0) at scale 1, so at most half of the values can be kept.
    halved = settings.sigma == "median" and settings.scale >= 0.71
    rows, cols = max(ft.shape), min(ft.shape)
    held = held_share(settings.backend, settings.noise_estimate, rows, cols) if out.item_bytes == 2 else 0.0
    return MatrixShape(
        rows=rows,
        cols=cols,
        base_item_bytes=base.item_bytes,
        ft_item_bytes=ft.item_bytes,
        out_item_bytes=out.item_bytes,
        kept_share=0.5 if halved else 1.0,
        held=held > 0.0,
    )
