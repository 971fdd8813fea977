"""One task, start to finish: read both sides, decide, write the result, return the record.

The same function runs wherever an executor puts it. It writes only its own tensor's bytes, so tasks may run in any
order, at once, and again after a crash, with the same result.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import numpy as np

from streamrepair.checkpoint import osfile
from streamrepair.checkpoint.headers import TensorEntry
from streamrepair.checkpoint.layout import Checkpoint
from streamrepair.checkpoint.pairing import Side
from streamrepair.checkpoint.read import InputFiles
from streamrepair.checkpoint.write import ShardFile, digest_text, new_digest
from streamrepair.decompose.arithmetic import Arithmetic
from streamrepair.decompose.scratch import Scratch
from streamrepair.engine.finite import first_nonfinite
from streamrepair.engine.memory import COPY_BYTES
from streamrepair.engine.plan import Task
from streamrepair.engine.worker import Worker
from streamrepair.errors import InputError, shown
from streamrepair.report import Settings, TensorRecord, Timings

_DIRECT_FROM_BYTES = 1 << 20
"""Smaller tensors go through the page cache, which gathers them."""


class NonFiniteInputError(InputError):
    """A weight of BASE or FT is NaN or infinite: the pair is refused and leaves no output."""


class Progress(Protocol):
    """What a run tells a watching person."""

    def advance(self, done_bytes: int) -> None:
        """So many more of the plan's output bytes are done."""
        ...


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
        """The same for the report, beside the whole run's wall and processor time."""
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

    base: Checkpoint
    ft: Checkpoint
    settings: Settings
    files: InputFiles
    shards: tuple[ShardFile, ...]
    progress: Progress
    check_stop: Callable[[], None]
    """Raises InterruptedRunError when the task in hand is to be abandoned."""
    hold_threads: Callable[[], None]
    """Called before a thread computes."""
    fits: Callable[[Task, str], bool]
    """Whether a dearer backend on the CPU would fit the budget for a task, should its own one fail."""
    arithmetic: Callable[[str, Scratch], Arithmetic] | None = None
    """How a device computes, in place of the usual."""
    done_with: Callable[[Task], None] = lambda _task: None
    """Told once a task needs its inputs no more."""


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

    @property
    def scratch(self) -> Scratch:
        """The worker's working memory."""
        return self.worker.scratch

    def read(self, side: Side, offset: int, buffer: memoryview, *, of_base: bool) -> None:
        """Fill `buffer` from byte `offset` of one side's tensor."""
        checkpoint = self.around.base if of_base else self.around.ft
        began = time.perf_counter()
        with self.worker.lane.file("read"):
            self.around.files.read_into(checkpoint.shards[side.shard], side.entry.start + offset, buffer)
        self.spent.read_s += time.perf_counter() - began
        self.spent.bytes_read += len(buffer)

    def write(self, offset: int, data: memoryview, *, past_cache: bool = False) -> None:
        """Write bytes at `offset` of the output tensor."""
        began = time.perf_counter()
        with self.worker.lane.file("write"):
            shard = self.around.shards[self.task.shard]
            shard.write(self.task.out.start + offset, data, past_cache=past_cache)
        self.spent.write_s += time.perf_counter() - began
        self.spent.bytes_written += len(data)

    def tell(self, share: float) -> None:
        """Report that `share` (0–1) of the task is done."""
        done = int(share * self.task.out.nbytes)
        if done > self.told_bytes:
            self.around.progress.advance(done - self.told_bytes)
            self.told_bytes = done


def run_task(task: Task, around: Surroundings, worker: Worker) -> Outcome:
    """Do one task, on the calling worker's device and in its memory.

    Raises:
        InputError: an input is not finite, changed, or cannot be read.
        NumericalError: no backend could decide the matrix, or the result overflows its dtype.
        OutputError: the result cannot be written.
        InterruptedRunError: abandoned on request.
    """
    began = time.perf_counter()
    job = Job(task, around, worker)
    if task.shape is not None:
        worker.scratch.begin(task.shape)
    nonfinite: str | None = None
    if task.shape is None:
        digest, nonfinite = copy(job)
        record = passed_through(task, "kept_ft", task.pairing.reason, digest)
    else:
        record, nonfinite = _repair(job)
    job.tell(1.0)
    around.done_with(task)
    record = _with_seconds(record, time.perf_counter() - began)
    record.check_finite(task.name)
    return Outcome(task, record, job.spent, nonfinite)


def _repair(job: Job) -> tuple[TensorRecord, str | None]:
    digest = _copy_while_equal(job)
    if digest is not None:
        return passed_through(job.task, "copied", "delta is zero", digest), None
    # Not imported above: a run that only copies never loads torch.
    from streamrepair.engine.repair_task import repair

    job.around.hold_threads()
    return repair(job)


def passed_through(task: Task, action: str, reason: str, digest: str) -> TensorRecord:
    """The record of a tensor whose bytes are FT's (converted, if the output dtype differs)."""
    assert action in ("copied", "kept_ft")
    return TensorRecord(
        action="copied" if action == "copied" else "kept_ft",
        reason=reason,
        shape=task.out.shape,
        dtype=task.out.dtype,
        digest=digest,
    )


def copy(job: Job) -> tuple[str, str | None]:
    """Write FT's tensor as it is; returns the digest, and where it is not finite if that is allowed.

    Raises:
        NonFiniteInputError: it holds NaN or infinity and the user did not allow it.
    """
    entry, out = job.task.ft.entry, job.task.out
    if out.dtype != entry.dtype:
        from streamrepair.engine.repair_task import copy_widened

        return copy_widened(job)
    digest = new_digest()
    nonfinite: str | None = None
    buffer, past_cache = _copy_buffer(out)
    for offset, length in osfile.chunks(entry.nbytes, COPY_BYTES):
        job.around.check_stop()
        piece = buffer[:length]
        job.read(job.task.ft, offset, piece, of_base=False)
        nonfinite = nonfinite or met_nonfinite(job, piece, offset, of_base=False)
        digest.update(piece)
        job.write(offset, piece, past_cache=past_cache)
        job.tell((offset + length) / entry.nbytes)
    return digest_text(digest), nonfinite


def _copy_buffer(out: TensorEntry) -> tuple[memoryview, bool]:
    """A buffer for pieces of a tensor that is only copied, and whether they go past the page cache.

    They do where that is worth it: the buffer then lies at pages as the tensor does in the file.
    """
    if out.nbytes < _DIRECT_FROM_BYTES:
        return memoryview(bytearray(min(COPY_BYTES, out.nbytes))), False
    lead = out.start % osfile.PAGE_BYTES
    return osfile.page_aligned(lead + COPY_BYTES)[lead:], True


def _copy_while_equal(job: Job) -> str | None:
    """Copy FT's tensor for as long as BASE's bytes are the same; the digest if they all are.

    A tensor that fine-tuning did not touch is done in this one pass; any other leaves at its first difference, which is
    nearly always in the first piece, and is overwritten by its repair.
    """
    base, ft, out = job.task.pairing.base, job.task.ft, job.task.out
    assert base is not None
    if base.entry.dtype != ft.entry.dtype or out.dtype != ft.entry.dtype:
        return None
    digest = new_digest()
    base_buffer = memoryview(bytearray(min(COPY_BYTES, out.nbytes)))
    ft_buffer, past_cache = _copy_buffer(out)
    for offset, length in osfile.chunks(out.nbytes, COPY_BYTES):
        job.around.check_stop()
        base_piece, ft_piece = base_buffer[:length], ft_buffer[:length]
        if offset == 0:  # most pairs differ at once: a page tells
            head = min(length, 1 << 14)
            job.read(base, 0, base_piece[:head], of_base=True)
            job.read(ft, 0, ft_piece[:head], of_base=False)
            if base_piece[:head].tobytes() != ft_piece[:head].tobytes():
                return None
        job.read(base, offset, base_piece, of_base=True)
        job.read(ft, offset, ft_piece, of_base=False)
        if not _equal(base_piece, ft_piece):
            return None
        if met_nonfinite(job, ft_piece, offset, of_base=False):
            return None
        digest.update(ft_piece)
        job.write(offset, ft_piece, past_cache=past_cache)
        job.tell((offset + length) / out.nbytes)
    return digest_text(digest)


def _equal(a: memoryview, b: memoryview) -> bool:
    whole = len(a) // 8 * 8
    words = np.array_equal(np.frombuffer(a[:whole], np.uint64), np.frombuffer(b[:whole], np.uint64))
    return bool(words) and a[whole:].tobytes() == b[whole:].tobytes()


def met_nonfinite(job: Job, piece: memoryview, offset: int, *, of_base: bool) -> str | None:
    """Where a piece is not finite, if the user allowed it.

    Raises:
        NonFiniteInputError: it is not finite and the user did not allow it.
    """
    side = job.task.pairing.base if of_base else job.task.ft
    assert side is not None
    index = first_nonfinite(piece, side.entry.dtype)
    if index is None:
        return None
    item = side.entry.nbytes // side.entry.numel
    checkpoint = job.around.base if of_base else job.around.ft
    path = checkpoint.shards[side.shard].path
    message = (
        f"{shown(str(path))}: tensor {shown(job.task.name)} holds NaN or infinity at element {offset // item + index}, "
        "expected finite numbers"
    )
    if job.around.settings.on_nonfinite == "copy-ft":
        return message
    raise NonFiniteInputError(f"{message}: restore the file, or pass such tensors through with --on-nonfinite copy-ft")


def find_nonfinite(job: Job) -> str | None:
    """Search both sides of a pair for NaN and infinity; where one is, if the user allowed it.

    Raises:
        NonFiniteInputError: one is not finite and the user did not allow it.
    """
    buffer = memoryview(bytearray(COPY_BYTES))
    for side, of_base in ((job.task.pairing.base, True), (job.task.ft, False)):
        assert side is not None
        for offset, length in osfile.chunks(side.entry.nbytes, COPY_BYTES):
            job.read(side, offset, buffer[:length], of_base=of_base)
            found = met_nonfinite(job, buffer[:length], offset, of_base=of_base)
            if found:
                return found
    return None


def _with_seconds(record: TensorRecord, seconds: float) -> TensorRecord:
    return msgspec.structs.replace(record, seconds=round(seconds, 6))
