"""A pair of matrices on disk as a stream of tall panels: the seam between files and decompositions.

A tall weight is read as consecutive rows; a wide one whole where it is small, else as blocks of columns, a stretch of
each row. A thread reads the next panel while the present one is computed on, in a ring of three reused buffers.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from streamrepair.checkpoint.pairing import Side
from streamrepair.checkpoint.read import InputFiles
from streamrepair.decompose.convert import STORED_TYPE, Raw
from streamrepair.decompose.operator import Panel
from streamrepair.decompose.scratch import Scratch
from streamrepair.engine.memory import RING_SLOTS
from streamrepair.engine.timeline import Lane, unwatched


@dataclass(slots=True)
class ReadStats:
    """What reading cost; written by one reader thread at a time."""

    seconds: float = 0.0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class MatrixView:
    """The `PanelSource` of a plain 2-D pair."""

    files: InputFiles
    base: Side
    ft: Side
    scratch: Scratch
    """Where the ring's buffers live."""
    panel_rows: int
    """Rows (of the tall orientation) per panel, a multiple of the block."""
    check_stop: Callable[[], None] = lambda: None
    """Called between panels; raises to abandon the task."""
    advance: Callable[[int], None] = lambda _rows: None
    """Told the rows of every panel once it is done with."""
    lane: Lane = field(default_factory=unwatched)
    """Told what is read and waited for."""
    stats: ReadStats = field(default_factory=ReadStats)
    member: int = 0
    """Of matrices that are held at once, which one this is: each has buffers of its own."""
    whole: list[Panel] = field(default_factory=list, repr=False)
    """The only panel of a matrix that one panel holds, once it is read."""

    @property
    def wide(self) -> bool:
        """Whether the stored matrix has more columns than rows."""
        return self.ft.entry.shape[0] < self.ft.entry.shape[1]

    @property
    def rows(self) -> int:
        """The longer side."""
        return max(self.ft.entry.shape)

    @property
    def cols(self) -> int:
        """The shorter side."""
        return min(self.ft.entry.shape)

    def panels(self) -> Iterator[Panel]:
        """All panels in order; one is valid until the next is asked for. A single one is read once and kept."""
        starts = list(range(0, self.rows, self.panel_rows))
        if len(starts) == 1:
            if not self.whole:
                with self.lane.waiting("read"):
                    self.whole.append(self._read(0, self._buffers(0)))
            yield from self._delivered(self.whole[0])
            return
        ring = [self._buffers(slot) for slot in range(min(RING_SLOTS, len(starts)))]
        try:
            with _Ahead(lambda i: self._read(starts[i], ring[i % len(ring)]), len(starts), self.lane) as panels:
                for panel in panels:
                    yield from self._delivered(panel)
        finally:  # what follows a pass takes long, and needs the memory more than the next pass needs warm pages
            for slot in range(len(ring)):
                for name in self._names(slot):
                    self.scratch.release(name)

    def _delivered(self, panel: Panel) -> Iterator[Panel]:
        self.check_stop()
        yield panel
        self.advance(panel.rows)

    def _buffers(self, slot: int) -> tuple[memoryview, memoryview]:
        elements = min(self.panel_rows, self.rows) * self.cols
        of_base, of_ft = self._names(slot)
        base = self.scratch.array(of_base, (elements * self.base.entry.item_bytes,), np.uint8)
        ft = self.scratch.array(of_ft, (elements * self.ft.entry.item_bytes,), np.uint8)
        return base.data, ft.data

    def _names(self, slot: int) -> tuple[str, str]:
        """Of a slot's two buffers in the scratch."""
        which = f"{slot} of {self.member}" if self.member else f"{slot}"
        return f"base {which}", f"ft {which}"

    def _read(self, start: int, buffers: tuple[memoryview, memoryview]) -> Panel:
        began = time.perf_counter()
        count = min(self.panel_rows, self.rows - start)
        with self.lane.ahead():
            base = self._read_side(self.base, start, count, buffers[0])
            ft = self._read_side(self.ft, start, count, buffers[1])
        self.stats.seconds += time.perf_counter() - began
        self.stats.bytes += count * self.cols * (self.base.entry.item_bytes + self.ft.entry.item_bytes)
        return Panel(start, base, ft, self.base.entry.dtype, self.ft.entry.dtype, self.wide)

    def _read_side(self, side: Side, start: int, count: int, buffer: memoryview) -> Raw:
        item, n = side.entry.item_bytes, self.cols
        view = buffer[: count * n * item]
        if self.wide and count < self.rows:
            stretch, stored_row = count * item, self.rows * item
            first = side.entry.start + start * item
            for row in range(n):
                piece = view[row * stretch : (row + 1) * stretch]
                self.files.read_into(side.shard, first + row * stored_row, piece)
        else:
            self.files.read_into(side.shard, side.entry.start + start * n * item, view)
        flat: Raw = np.frombuffer(view, STORED_TYPE[side.entry.dtype])
        return flat.reshape((n, count) if self.wide else (count, n))


class _Ahead:
    """Results of `produce(0) … produce(count − 1)` in order, each made while the one before is in use.

    At most one result waits and one is being made, so that with three buffers none is overwritten while in use.
    """

    def __init__(self, produce: Callable[[int], Panel], count: int, lane: Lane) -> None:
        self._produce, self._count, self._lane = produce, count, lane
        self._ready: queue.Queue[Panel | BaseException] = queue.Queue(maxsize=1)
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)

    def __enter__(self) -> Iterator[Panel]:
        self._thread.start()
        return self._results()

    def __exit__(self, *_: object) -> None:
        self._left.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.01)
            except queue.Empty:
                continue
        self._thread.join()

    def _results(self) -> Iterator[Panel]:
        for _ in range(self._count):
            with self._lane.waiting("read"):
                result = self._ready.get()
            if isinstance(result, BaseException):
                raise result
            yield result

    def _run(self) -> None:
        for i in range(self._count):
            if self._left.is_set():
                return
            try:
                result: Panel | BaseException = self._produce(i)
            except BaseException as error:  # handed to the consumer, which raises it
                result = error
            self._ready.put(result)
            if isinstance(result, BaseException):
                return
