"""Which matrices a GPU decides together: small ones of one shape, one trio of dtypes, one shard. Pure.

What a batched kernel makes of a matrix may depend, in its last bits, on how many lie beside it. So who belongs together
is settled here, before anything runs, from shapes, dtypes, shards and settings; not by what happens to be waiting, nor
by how many GPUs there are. `batch_task` carries it out; docs/decisions/0008 has the reasons.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamrepair.decompose.choose import MOST_BATCHED_COLUMNS
from streamrepair.engine import memory
from streamrepair.engine.memory import MatrixShape

if TYPE_CHECKING:
    from streamrepair.engine.lanes import Place
    from streamrepair.engine.plan import Task, Unit

MOST_MEMBERS = 32
"""Past that a launch is shared by so many that one more saves nothing."""
MOST_HOST_BYTES = 1 << 26
"""Of all members' pairs, which are read whole: what a single matrix that is read whole may have."""
MOST_DEVICE_BYTES = 1 << 29
"""Of what further members add on the device: less than its context alone takes."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Tasks that are decided together, by one worker, in this order; each is merged, written and recorded by itself."""

    tasks: tuple[Task, ...]
    """Two or more, alike."""

    @property
    def name(self) -> str:
        """For a person: the first member, and how many go with it."""
        return f"{self.tasks[0].name} and {len(self.tasks) - 1} alike"

    @property
    def shape(self) -> MatrixShape:
        """Of every member."""
        shape = self.tasks[0].shape
        assert shape is not None
        return shape

    @property
    def shard(self) -> int:
        """Position of the output shard."""
        return self.tasks[0].shard

    @property
    def place(self) -> Place:
        """Always a GPU."""
        return self.tasks[0].place

    @property
    def ram_bytes(self) -> int:
        """Projected host bytes while it runs."""
        return self.tasks[0].ram_bytes + memory.batch_bytes(self.shape, len(self.tasks))

    @property
    def vram_bytes(self) -> int:
        """Projected device bytes while it runs."""
        return self.tasks[0].vram_bytes + memory.batch_device_bytes(self.shape, len(self.tasks))

    @property
    def read_once_bytes(self) -> int:
        """Bytes of what it reads, however often."""
        return sum(task.read_once_bytes for task in self.tasks)

    @property
    def out_bytes(self) -> int:
        """Bytes of its results."""
        return sum(task.out_bytes for task in self.tasks)


def formed(tasks: Sequence[Task], fits: Callable[[Batch], bool]) -> list[Unit]:
    """The tasks, those that go together as batches, each in the place of its first member.

    Args:
        tasks: in an order that follows from the checkpoints alone. fits: whether the budgets hold a batch; the members
            of one that they do not hold stay single.
    """
    alike: dict[object, list[Task]] = defaultdict(list)
    for task in tasks:
        if is_small(task):
            assert task.pairing.base is not None
            dtypes = (task.pairing.base.entry.dtype, task.ft.entry.dtype, task.out.dtype)
            alike[task.shard, task.shape, dtypes].append(task)
    batches = [Batch(part) for group in alike.values() for part in _parts(group) if len(part) > 1]
    batch_of = {task.name: batch for batch in batches if fits(batch) for task in batch.tasks}
    units: list[Unit] = []
    for task in tasks:
        batch = batch_of.get(task.name)
        if batch is None:
            units.append(task)
        elif batch.tasks[0] is task:
            units.append(batch)
    return units


def is_small(task: Task) -> bool:
    """Whether a GPU has it done sooner than launched: then it may share its launches."""
    if task.shape is None or task.place != "cuda" or task.backend != "gram":
        return False
    return task.shape.cols <= MOST_BATCHED_COLUMNS and task.panel_rows >= task.shape.rows


def most_members(shape: MatrixShape) -> int:
    """How many matrices of a shape go into a batch at most."""
    on_host = MOST_HOST_BYTES // memory.pair_bytes(shape)
    on_device = 1 + MOST_DEVICE_BYTES // memory.batch_device_bytes(shape, 2)
    return min(MOST_MEMBERS, on_host, on_device)


def _parts(group: Sequence[Task]) -> Iterator[tuple[Task, ...]]:
    """Matrices of one kind in as few parts as may be, all of them equally large but for one member."""
    shape = group[0].shape
    assert shape is not None
    count = -(-len(group) // max(1, most_members(shape)))
    for part in range(count):
        yield tuple(group[part * len(group) // count : (part + 1) * len(group) // count])
