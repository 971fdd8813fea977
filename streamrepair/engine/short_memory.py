"""What a task does when memory runs short while it runs: smaller pieces on the GPU, then the CPU, then an error.

The plan's projections keep a run inside its budgets. This is for what no plan can know: another process took the card's
memory, or every cheap backend failed and a dear one is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from streamrepair.decompose.arithmetic import Arithmetic, BatchArithmetic, Gram, Merger, Precision, Vectors
from streamrepair.decompose.convert import Doubles
from streamrepair.decompose.host import HostArithmetic, HostMerger
from streamrepair.decompose.operator import Panel, PanelSource, blocks
from streamrepair.engine import gpu, memory
from streamrepair.engine.job import Job
from streamrepair.errors import NumericalError
from streamrepair.units import format_bytes

_PARTS = (1, 4, 16)
"""Into how many pieces a block is cut, attempt by attempt."""

T = TypeVar("T")


class ReservedHost(HostArithmetic):
    """The CPU, which reserves what a dearer route needs before it starts.

    Raises (each method):
        NumericalError: the budget has no room beside the other tasks.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job.scratch, job.worker.both)
        self._job = job
        self._reserved_bytes = job.task.ram_bytes

    def gram(self, source: PanelSource, probes: Doubles, precision: Precision) -> Gram:
        """As on any CPU."""
        self._reserve("gram")
        return super().gram(source, probes, precision)

    def triangular_factor(self, source: PanelSource) -> Doubles:
        """As on any CPU."""
        self._reserve("full")
        return super().triangular_factor(source)

    def merger(self, vh: Vectors, out_dtype: str) -> HostMerger:
        """As on any CPU."""
        self._reserve("gram")
        return super().merger(vh, out_dtype)

    def _reserve(self, backend: str) -> None:
        task = self._job.task
        assert task.shape is not None
        need_bytes = memory.repair_bytes(task.shape, backend, task.panel_rows)
        more_bytes = need_bytes - self._reserved_bytes
        if more_bytes <= 0:
            return
        self.scratch.clear()
        if not self._job.worker.grow(more_bytes):
            raise NumericalError(f"{backend} on the CPU needs {format_bytes(need_bytes)}, which --ram has no room for")
        self._reserved_bytes = need_bytes


class Patient(Arithmetic):
    """A device's arithmetic that meets a full card with smaller pieces; past the smallest, the error goes on.

    Sums are then formed in another order, which may change last bits, as the CPU in its place would.
    """

    def __init__(self, inner: Arithmetic) -> None:
        self._inner = inner
        self.precisions = inner.precisions

    @property
    def in_batches(self) -> BatchArithmetic | None:
        """The device's way with many matrices at once, if it has one: it halves a batch that does not fit."""
        return self._inner if isinstance(self._inner, BatchArithmetic) else None

    def gram(self, source: PanelSource, probes: Doubles, precision: Precision) -> Gram:
        """The device's."""
        return self._tried(lambda parts: self._inner.gram(_Cut(source, parts), probes, precision))

    def triangular_factor(self, source: PanelSource) -> Doubles:
        """The device's."""
        return self._tried(lambda parts: self._inner.triangular_factor(_Cut(source, parts)))

    def svd(self, matrix: Doubles, driver: str) -> tuple[Doubles, Doubles, Doubles]:
        """The device's."""
        return self._inner.svd(matrix, driver)

    def merger(self, vh: Vectors, out_dtype: str) -> Merger:
        """The device's, which sees to its memory itself: blocks it handed over cannot be asked for again."""
        return self._inner.merger(vh, out_dtype)

    def _tried(self, attempt: Callable[[int], T]) -> T:
        from streamrepair.decompose.device.faults import no_memory  # torch is loaded for a GPU only

        for parts in _PARTS:
            try:
                return attempt(parts)
            except RuntimeError as error:
                if parts == _PARTS[-1] or not no_memory(error):
                    raise
            gpu.release_memory()  # after the failed attempt's frame, and all it referred to, is gone
        raise AssertionError("the last attempt returns or raises")


class _Cut:
    """A source whose blocks are cut into pieces."""

    def __init__(self, source: PanelSource, parts: int) -> None:
        self._source, self._parts = source, parts

    @property
    def rows(self) -> int:
        return self._source.rows

    @property
    def cols(self) -> int:
        return self._source.cols

    def panels(self) -> Iterator[Panel]:
        if self._parts == 1:
            yield from self._source.panels()
            return
        for block in blocks(self._source):
            yield from _cut(block, self._parts)


def _cut(block: Panel, parts: int) -> Iterator[Panel]:
    step = max(1, -(-block.rows // parts))
    for start in range(0, block.rows, step):
        yield block.part(start, min(block.rows, start + step))
