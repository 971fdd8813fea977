"""The repair of one matrix: pass one decides, pass two merges, rounds once and writes.

The only module of the engine that computes with torch; loaded when the first tensor that differs is met.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamrepair.checkpoint import osfile
from streamrepair.checkpoint.write import digest_text, new_digest
from streamrepair.decompose import ladder
from streamrepair.decompose.blocks import block_rows
from streamrepair.decompose.operator import Panel, delta
from streamrepair.decompose.truncation import NonFiniteDeltaError, Truncation, merge
from streamrepair.engine.memory import COPY_BYTES
from streamrepair.engine.task import Job, copy, find_nonfinite, passed_through
from streamrepair.engine.view import TORCH_DTYPE, MatrixView, StoredMatrix
from streamrepair.errors import NumericalError, shown
from streamrepair.report import TensorRecord
from streamrepair.spectral.threshold import HardThreshold

_CPU = torch.device("cpu")
_FIRST_PASS_SHARE = 0.6  # of a repair's time, for the progress bar


def repair(job: Job) -> tuple[TensorRecord, str | None]:
    """Repair the job's matrix; returns its record, and where an input is not finite if that is allowed.

    Raises:
        InputError: an input holds NaN or infinity.
        NumericalError: no backend could decide, or the result overflows its dtype.
    """
    view = _view(job)
    settings = job.around.settings
    rule = HardThreshold(scale=settings.scale, sigma=settings.sigma)
    began = time.perf_counter()
    try:
        truncation = ladder.decompose(
            view,
            rule,
            device=torch.device(job.around.device),
            backend=settings.backend,
            full_fits=job.around.full_fits(job.task),
        )
    except NonFiniteDeltaError as error:
        where = find_nonfinite(job)
        if where is None:
            raise _failed(job, error) from error
        digest, _ = copy(job)
        return passed_through(job.task, "kept_ft", where, digest), where
    except NumericalError as error:
        raise _failed(job, error) from error
    job.spent.decompose_s += time.perf_counter() - began
    record = _written(job, view, truncation)
    job.spent.read_s += view.stats.seconds
    job.spent.bytes_read += view.stats.bytes
    return record, None


def _failed(job: Job, error: Exception) -> NumericalError:
    return NumericalError(
        f"tensor {shown(job.task.name)} {list(job.task.out.shape)}: no backend could decompose its delta ({error}); "
        f"leave it out with --exclude '^{shown(job.task.name)}$' to pass it through"
    )


def _written(job: Job, view: MatrixView, truncation: Truncation) -> TensorRecord:
    if truncation.frob_delta_in == 0.0:
        digest, _ = copy(job)
        return passed_through(job.task, "copied", "delta is zero", digest)
    if truncation.noise_free:
        digest, _ = copy(job)
        reason = "delta has exactly low rank (its median singular value is zero): there is no noise to estimate"
        return passed_through(job.task, "kept_ft", reason, digest)
    merged = _Merged(job, view, truncation)
    merged.run()
    threshold, out = truncation.threshold, truncation.frob_delta_out
    gap = threshold.nearest_gap
    return TensorRecord(
        action="repaired",
        reason="",
        shape=job.task.out.shape,
        dtype=job.task.out.dtype,
        rank_total=view.cols,
        rank_kept=threshold.rank_kept,
        sigma_hat=threshold.sigma_hat,
        threshold=threshold.tau,
        frob_delta_in=truncation.frob_delta_in,
        frob_delta_out=out,
        rounding_loss=merged.lost_square**0.5 / out if out > 0 else 0.0,
        nearest_sigma_gap=gap if gap < float("inf") else None,
        undecidable=truncation.undecidable,
        backend=truncation.backend,
        climbed=truncation.climbed,
        digest=merged.digest,
    )


class _Merged:
    """The second pass over a matrix: W_base + Δ* block by block, rounded once, written, digested."""

    def __init__(self, job: Job, view: MatrixView, truncation: Truncation) -> None:
        self._job, self._view = job, view
        self._out_dtype = TORCH_DTYPE[job.task.out.dtype]
        # Formed in float32, which holds every 16-bit float; float64 only where the output can tell.
        self._work_dtype = torch.float64 if self._out_dtype == torch.float64 else torch.float32
        self._vh = truncation.vh.to(self._work_dtype)
        self._device = self._vh.device
        self._running = None if view.wide else new_digest()
        self.lost_square = 0.0
        """‖round(W_base + Δ*) − (W_base + Δ*)‖_F²."""
        self.digest = ""
        """Of the tensor's bytes, after `run`."""

    def run(self) -> None:
        """Do the pass.

        Raises:
            NumericalError: a value overflows the output dtype.
        """
        for panel in self._view.panels():
            for start, rounded in self._blocks(panel):
                if self._view.wide:
                    self._write_columns(panel.start + start, rounded)
                else:
                    self._write_rows(panel.start + start, rounded)
            self._job.tell(
                _FIRST_PASS_SHARE + (1 - _FIRST_PASS_SHARE) * (panel.start + len(panel.ft)) / self._view.rows
            )
        if self._running is None:
            self.digest = self._job.around.shards[self._job.task.shard].digest(self._job.task.name)
        else:
            self.digest = digest_text(self._running)

    def _blocks(self, panel: Panel) -> Iterator[tuple[int, Tensor]]:
        height = block_rows(self._view.cols)
        for start in range(0, len(panel.ft), height):
            part = Panel(panel.start + start, panel.base[start : start + height], panel.ft[start : start + height])
            base = part.base.to(device=self._device, dtype=self._work_dtype, copy=True)
            exact, _ = merge(base, delta(part, self._device, self._work_dtype), self._vh)
            yield start, self._rounded(exact)

    def _rounded(self, exact: Tensor) -> Tensor:
        """The one rounding, on the CPU; its loss is added up."""
        rounded = exact.to(self._out_dtype)
        if rounded.dtype != exact.dtype:
            exact -= rounded
            lost = float(torch.linalg.vector_norm(exact)) ** 2
            if not lost < float("inf"):
                raise NumericalError(
                    f"tensor {shown(self._job.task.name)}: a repaired value overflows {self._job.task.out.dtype}: "
                    "write the result with --out-dtype float32"
                )
            self.lost_square += lost
        return rounded.to(_CPU)

    def _write_rows(self, start: int, rounded: Tensor) -> None:
        data = _bytes(rounded.contiguous())
        assert self._running is not None
        self._running.update(data)
        self._job.write(start * self._view.cols * rounded.element_size(), data)

    def _write_columns(self, start: int, rounded: Tensor) -> None:
        """A block of columns of a wide tensor: one stretch of each stored row."""
        data = _bytes(rounded.T.contiguous())
        item = rounded.element_size()
        stretch = len(rounded) * item
        for row in range(self._view.cols):
            offset = (row * self._view.rows + start) * item
            self._job.write(offset, data[row * stretch : (row + 1) * stretch])


def copy_widened(job: Job) -> tuple[str, str | None]:
    """Write FT's tensor in the wider output dtype; exact.

    Raises:
        InputError: it holds NaN or infinity and the user did not allow it.
    """
    where = find_nonfinite(job) if job.task.pairing.base else None
    digest = new_digest()
    entry, out = job.task.ft.entry, TORCH_DTYPE[job.task.out.dtype]
    source = TORCH_DTYPE[entry.dtype]
    buffer = memoryview(bytearray(min(COPY_BYTES, entry.nbytes)))
    for offset, length in osfile.chunks(entry.nbytes, COPY_BYTES):
        job.around.check_stop()
        job.read(job.task.ft, offset, buffer[:length], of_base=False)
        data = _bytes(torch.frombuffer(buffer[:length], dtype=source).to(out))
        digest.update(data)
        job.write(offset // source.itemsize * out.itemsize, data)
    return digest_text(digest), where


def _view(job: Job) -> MatrixView:
    base, task, around = job.task.pairing.base, job.task, job.around
    assert base is not None
    done_rows = 0

    def advance(rows: int) -> None:
        nonlocal done_rows
        done_rows += rows
        job.tell(_FIRST_PASS_SHARE * min(1.0, done_rows / max(task.ft.entry.shape)))

    return MatrixView(
        files=around.files,
        base=StoredMatrix(around.base.shards[base.shard], base.entry),
        ft=StoredMatrix(around.ft.shards[task.ft.shard], task.ft.entry),
        panel_rows=task.panel_rows,
        check_stop=around.check_stop,
        advance=advance,
    )


def _bytes(tensor: Tensor) -> memoryview:
    raw: NDArray[np.uint8] = tensor.view(torch.uint8).flatten().numpy()
    return raw.data if raw.size else memoryview(b"")
