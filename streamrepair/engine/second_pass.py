"""The second pass over one matrix: W_base + Δ*, rounded once, written and digested; and what its record says.

`repair_task` decides what is kept.
"""

from __future__ import annotations

import msgspec
import numpy as np

from streamrepair.checkpoint.write import digest_text, new_digest
from streamrepair.decompose.arithmetic import Arithmetic, Merger, Vectors, rescued
from streamrepair.decompose.convert import Raw
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.operator import Panel
from streamrepair.decompose.spot_check import SpotCheck, WrongMergeError
from streamrepair.decompose.truncation import Truncation
from streamrepair.engine import cost
from streamrepair.engine.copying import copy
from streamrepair.engine.job import Job
from streamrepair.engine.pace import with_merge
from streamrepair.engine.task import passed_through
from streamrepair.engine.view import MatrixView
from streamrepair.errors import NumericalError, brief, shown
from streamrepair.report import TensorRecord
from streamrepair.units import whole_mb


def written(
    job: Job, view: MatrixView, truncation: Truncation, arithmetic: Arithmetic, host: HostArithmetic
) -> TensorRecord:
    """The record of a matrix that is decided, once its result is written.

    Raises:
        NumericalError: no device could merge it, or the result overflows its dtype.
    """
    if truncation.frob_delta_in == 0.0:
        digest, _ = copy(job)
        return passed_through(job.task, "copied", "delta is zero", digest)
    if truncation.noise_free:
        digest, _ = copy(job)
        zero = "median singular value is zero"
        if job.around.settings.sigma == "tail":
            zero = "smallest singular values are zero"
        reason = f"delta has exactly low rank (its {zero}): there is no noise to estimate"
        return msgspec.structs.replace(
            passed_through(job.task, "kept_ft", reason, digest),
            rank_total=view.cols,
            frob_delta_in=truncation.frob_delta_in,
            backend=truncation.backend,
            climbed=truncation.climbed,
        )
    merged = _merged(job, view, truncation, arithmetic, host)
    threshold, out = truncation.threshold, truncation.frob_delta_out
    lost = merged.lost()  # asked of a delta of which nothing is kept, too: BASE's values may overflow FT's dtype
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
        rounding_loss=lost**0.5 / out if out > 0 else 0.0,
        nearest_sigma_gap=gap if gap < float("inf") else None,
        undecidable=truncation.undecidable,
        threshold_interval=truncation.interval,
        within_interval=truncation.within if truncation.interval else None,
        backend=truncation.backend,
        climbed=truncation.climbed + merged.climbed,
        digest=merged.digest,
    )


def _merged(
    job: Job, view: MatrixView, truncation: Truncation, arithmetic: Arithmetic, host: HostArithmetic
) -> _Merged:
    """The second pass, done; anew on the CPU if a device fails in a way that it does not see to itself."""
    try:
        merged = _Merged(job, view, arithmetic.merger(truncation.vh, job.task.out.dtype), truncation.vh)
        try:
            merged.run()
        except RuntimeError as error:
            if isinstance(arithmetic, HostArithmetic):
                raise
            left, vectors = f"merge: {brief(error)}", rescued(truncation.vh)
            merged = _Merged(job, view, host.merger(vectors, job.task.out.dtype), vectors, left=(left,))
            merged.run()
    except WrongMergeError as error:
        name = shown(job.task.name)
        raise NumericalError(f"tensor {name}: {error}: the processor or its BLAS library is at fault") from error
    except NumericalError as error:
        raise failed(job, error) from error
    return merged


class _Merged:
    """The second pass over a matrix: W_base + Δ* block by block, rounded once, spot-checked, written, digested.

    Args:
        vh: what the merger has. left: why it is not the first that tried.
    """

    def __init__(self, job: Job, view: MatrixView, merger: Merger, vh: Vectors, *, left: tuple[str, ...] = ()) -> None:
        self._job, self._view, self._merger, self._left = job, view, merger, left
        self._spots = SpotCheck(vh, job.task.out.dtype)
        # Column blocks are not consecutive in the file: such a tensor's digest is taken from the file afterwards.
        self._running = None if view.wide and view.panel_rows < view.rows else new_digest()
        self.digest = ""
        """Of the tensor's bytes, after `run`."""

    @property
    def climbed(self) -> tuple[str, ...]:
        """Why a device was left, if it was."""
        return self._left + self._merger.climbed

    def lost(self) -> float:
        """‖round(W_base + Δ*) − (W_base + Δ*)‖_F².

        Raises:
            NumericalError: a value overflows the output dtype, or a device broke after the last block.
        """
        try:
            lost = self._merger.lost()
        except NumericalError as error:
            raise failed(self._job, error) from error
        if not lost < float("inf"):
            name, dtype = shown(self._job.task.name), self._job.task.out.dtype
            remedy = f"leave it out with --exclude '^{name}$' to pass it through"
            if dtype in ("BF16", "F16"):
                remedy = "write the result with --out-dtype float32"
            raise NumericalError(f"tensor {name}: a repaired value overflows {dtype}: {remedy}")
        return lost

    def run(self) -> None:
        """Do the pass.

        Raises:
            NumericalError: a device failed, and the CPU has no room for its work.
            WrongMergeError: a value is not that of W_base + Δ*, and nothing of its block is written; or one is missing.
        """
        panels = self._spots.watched(self._view.panels())
        if self._view.wide:
            for panel in panels:
                self._write_columns(panel)
                self._tell(panel)
        else:
            for block, rounded in self._merger.merged(panels):
                self._spots.check(block, rounded)
                self._write(block.start * self._view.cols * rounded.itemsize, rounded)
                self._tell(block)
        self._spots.finish()
        if self._running is None:
            self.digest = self._job.around.shards[self._job.task.shard].digest(self._job.task.name)
        else:
            self.digest = digest_text(self._running)

    def _tell(self, done: Panel) -> None:
        share = (done.start + done.rows) / self._view.rows
        task = self._job.task
        self._job.tell(with_merge(cost.stages(task, task.place), share))

    def _write_columns(self, panel: Panel) -> None:
        """A stretch of each stored row of a wide tensor; all of it at once if the panel is the whole tensor."""
        rounded: Raw | None = None
        for block, merged in self._merger.merged([panel]):
            self._spots.check(block, merged)
            if rounded is None:
                rounded = self._job.scratch.array("gathered", (self._view.cols, panel.rows), merged.dtype)
            start = block.start - panel.start
            rounded[:, start : start + block.rows] = merged
        assert rounded is not None
        if panel.rows == self._view.rows:
            self._write(0, rounded)
            return
        for row, stretch in enumerate(rounded):
            self._job.write((row * self._view.rows + panel.start) * rounded.itemsize, stretch.view(np.uint8).data)

    def _write(self, offset: int, rounded: Raw) -> None:
        data = rounded.reshape(-1).view(np.uint8).data
        if self._running is not None:
            self._running.update(data)
        self._job.write(offset, data)


def failed(job: Job, error: Exception) -> NumericalError:
    """What is to be said of a matrix that nothing could decompose."""
    more = ""
    if not job.around.full_fits[job.task.name]:
        enough = whole_mb(job.around.full_budget(job.task))
        more = f"give the float64 SVD room with --ram {enough} --workers 1, or "
    return NumericalError(
        f"tensor {shown(job.task.name)} {list(job.task.out.shape)}: no backend could decompose its delta ({error}); "
        f"{more}leave it out with --exclude '^{shown(job.task.name)}$' to pass it through"
    )
