"""A task at work: what it is given, what it has spent, and what comes of it.

Tasks read and write through their `Job`, so that time, bytes and progress are counted in one place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field

from streamrepair.checkpoint.pairing import Side
from streamrepair.checkpoint.read import InputFiles
from streamrepair.checkpoint.write import ShardFile
from streamrepair.decompose.arithmetic import Arithmetic
from streamrepair.decompose.scratch import Scratch
from streamrepair.engine.plan import Task
from streamrepair.engine.worker import Worker
from streamrepair.report import Settings, TensorRecord, Timings


@dataclass(slots=True)
class Spent:
    """Where a task's time and bytes went."""

    read_s: float = 0.0
    decompose_s: float = 0.0
    write_s: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0

    def add(self, other: Spent) -> None:
        """Sum into this."""
        self.read_s += other.read_s
        self.decompose_s += other.decompose_s
        self.write_s += other.write_s
        self.bytes_read += other.bytes_read
        self.bytes_written += other.bytes_written

    def timings(self, *, wall_s: float, cpu_s: float) -> Timings:
        """For the report, to a tenth of a millisecond."""
        return Timings(
            wall_s=round(wall_s, 4),
            read_s=round(self.read_s, 4),
            decompose_s=round(self.decompose_s, 4),
            write_s=round(self.write_s, 4),
            bytes_read=self.bytes_read,
            bytes_written=self.bytes_written,
            cpu_s=round(cpu_s, 4),
        )


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a task needs besides itself."""

    settings: Settings
    files: InputFiles
    shards: tuple[ShardFile, ...]
    advance: Callable[[int], None]
    """Told that so many more of the plan's output bytes are done."""
    check_stop: Callable[[], None]
    """Raises InterruptedRunError when the task in hand is to be abandoned."""
    hold_threads: Callable[[], None]
    """Called before a thread computes."""
    full_fits: Mapping[str, bool]
    """Repair → whether the reference route on the CPU would fit the budget, should all others fail."""
    full_budget: Callable[[Task], int]
    """Bytes of --ram, with one worker, in which the reference route would fit."""
    arithmetic: Callable[[str, Scratch], Arithmetic] | None = None
    """How a device computes, in place of the usual."""
    done_with: Callable[[Task], None] = lambda _task: None
    """Told once a task needs its inputs no more."""
    finished: Container[str] = ()
    """Tensors that an earlier run finished: a batch they belong to is computed with them, and does not write them."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished task."""

    task: Task
    record: TensorRecord
    spent: Spent
    nonfinite: str | None = None
    """Where NaN or infinity was met and passed through because the user chose so."""


@dataclass(slots=True)
class Job:
    """A task at work: the task, its surroundings, and what it has spent."""

    task: Task
    around: Surroundings
    worker: Worker
    spent: Spent = field(default_factory=Spent)
    told_bytes: int = 0
    dry: bool = False
    """Nothing is written or told: the result is there already."""

    @property
    def scratch(self) -> Scratch:
        """The worker's working memory."""
        return self.worker.scratch

    def read(self, side: Side, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of one side's tensor."""
        began = time.perf_counter()
        with self.worker.lane.file("read"):
            self.around.files.read_into(side.shard, side.entry.start + offset, buffer)
        self.spent.read_s += time.perf_counter() - began
        self.spent.bytes_read += len(buffer)

    def write(self, offset: int, data: memoryview, *, past_cache: bool = False) -> None:
        """Write bytes at `offset` of the output tensor."""
        if self.dry:
            return
        began = time.perf_counter()
        with self.worker.lane.file("write"):
            shard = self.around.shards[self.task.shard]
            shard.write(self.task.out.start + offset, data, past_cache=past_cache)
        self.spent.write_s += time.perf_counter() - began
        self.spent.bytes_written += len(data)

    def tell(self, share: float) -> None:
        """Report that `share` (0–1) of the task is done."""
        done = int(share * self.task.out.nbytes)
        if done > self.told_bytes and not self.dry:
            self.around.advance(done - self.told_bytes)
            self.told_bytes = done
