"""The repair of one matrix: pass one decides, pass two merges, rounds once and writes.

Loaded when the first tensor that differs is met: a run that only copies needs none of SciPy.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import numpy as np

from streamrepair.checkpoint import osfile
from streamrepair.checkpoint.write import digest_text, new_digest
from streamrepair.decompose import ladder
from streamrepair.decompose.arithmetic import Arithmetic, Merger
from streamrepair.decompose.convert import STORED_TYPE, Raw, widened
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.operator import Panel
from streamrepair.decompose.truncation import NonFiniteDeltaError, Truncation
from streamrepair.engine import cost
from streamrepair.engine.copying import copy
from streamrepair.engine.job import Job
from streamrepair.engine.memory import COPY_BYTES
from streamrepair.engine.nonfinite import find_nonfinite, met_nonfinite
from streamrepair.engine.pace import Pace, with_merge
from streamrepair.engine.short_memory import Patient, ReservedHost
from streamrepair.engine.task import passed_through
from streamrepair.engine.view import MatrixView, StoredMatrix
from streamrepair.errors import NumericalError, shown
from streamrepair.report import TensorRecord
from streamrepair.spectral.threshold import HardThreshold

_LEAST_SINGLE_COLS = 256


def repair(job: Job) -> tuple[TensorRecord, str | None]:
    """Repair the job's matrix; returns its record, and where an input is not finite if that is allowed.

    Raises:
        InputError: an input holds NaN or infinity.
        NumericalError: no backend could decide, or the result overflows its dtype.
    """
    pace = Pace(cost.stages(job.task, job.task.place), max(job.task.out.shape), job.tell)
    view = _view(job, pace.advance)
    settings = job.around.settings
    rule = HardThreshold(scale=settings.scale, sigma=settings.sigma)
    host = ReservedHost(job)
    arithmetic = _arithmetic(job, host)
    fits = job.around.fits(job.task, "full")
    # In small matrices float32 saves next to nothing, and a delta as large as its weights shows the difference.
    sharp = job.task.out.dtype not in ("BF16", "F16") or view.cols < _LEAST_SINGLE_COLS
    began = time.perf_counter()
    try:
        with pace:
            truncation = ladder.decompose(
                view,
                rule,
                arithmetic=arithmetic,
                backend=settings.backend,
                sharp=sharp,
                full_fits=fits,
                estimate=settings.noise_estimate,
                host=host,
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
    record = _written(job, view, truncation, arithmetic, host)
    job.spent.read_s += view.stats.seconds
    job.spent.bytes_read += view.stats.bytes
    return record, None


def _failed(job: Job, error: Exception) -> NumericalError:
    more = ""
    if not job.around.fits(job.task, "full"):
        need_mb = -(-job.around.full_budget(job.task) // 1_000_000)
        more = f"give the float64 SVD room with --ram {need_mb}MB --workers 1, or "
    return NumericalError(
        f"tensor {shown(job.task.name)} {list(job.task.out.shape)}: no backend could decompose its delta ({error}); "
        f"{more}leave it out with --exclude '^{shown(job.task.name)}$' to pass it through"
    )


def _written(
    job: Job, view: MatrixView, truncation: Truncation, arithmetic: Arithmetic, host: HostArithmetic
) -> TensorRecord:
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
        merged = _Merged(job, view, arithmetic.merger(truncation.vh, job.task.out.dtype))
        try:
            merged.run()
        except RuntimeError:
            if isinstance(arithmetic, HostArithmetic):
                raise
            merged = _Merged(job, view, host.merger(truncation.vh, job.task.out.dtype))
            merged.run()
    except NumericalError as error:
        raise _failed(job, error) from error
    return merged


class _Merged:
    """The second pass over a matrix: W_base + Δ* block by block, rounded once, written, digested."""

    def __init__(self, job: Job, view: MatrixView, merger: Merger) -> None:
        self._job, self._view, self._merger = job, view, merger
        # Column blocks are not consecutive in the file: such a tensor's digest is taken from the file afterwards.
        self._running = None if view.wide and view.panel_rows < view.rows else new_digest()
        self.digest = ""
        """Of the tensor's bytes, after `run`."""

    @property
    def climbed(self) -> tuple[str, ...]:
        """Why a device was left half-way, if it was."""
        return self._merger.climbed

    def lost(self) -> float:
        """‖round(W_base + Δ*) − (W_base + Δ*)‖_F².

        Raises:
            NumericalError: a value overflows the output dtype.
        """
        lost = self._merger.lost()
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
        """
        if self._view.wide:
            for panel in self._view.panels():
                self._write_columns(panel)
                self._tell(panel)
        else:
            for block, rounded in self._merger.merged(self._view.panels()):
                self._write(block.start * self._view.cols * rounded.itemsize, rounded)
                self._tell(block)
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


def copy_widened(job: Job) -> tuple[str, str | None]:
    """Write FT's tensor in the wider output dtype; exact.

    Raises:
        NonFiniteInputError: it holds NaN or infinity and the user did not allow it.
    """
    digest = new_digest()
    nonfinite: str | None = None
    entry = job.task.ft.entry
    stored = np.dtype(STORED_TYPE[entry.dtype])
    buffer = memoryview(bytearray(min(COPY_BYTES, entry.nbytes)))
    for offset, length in osfile.chunks(entry.nbytes, COPY_BYTES):
        job.around.check_stop()
        job.read(job.task.ft, offset, buffer[:length], of_base=False)
        nonfinite = nonfinite or met_nonfinite(job, buffer[:length], offset, of_base=False)
        wide = np.empty(length // stored.itemsize, np.float32)
        widened(np.frombuffer(buffer[:length], stored), entry.dtype, wide)
        data = wide.view(np.uint8).data
        digest.update(data)
        job.write(offset // stored.itemsize * 4, data)
    return digest_text(digest), nonfinite


def _arithmetic(job: Job, host: HostArithmetic) -> Arithmetic:
    if job.around.arithmetic is not None:
        chosen = job.around.arithmetic(job.worker.device, job.scratch)
        return chosen if isinstance(chosen, HostArithmetic) else Patient(chosen)
    if job.worker.device == "cpu":
        return host
    from streamrepair.decompose.device import DeviceArithmetic  # torch is loaded for a GPU only

    return Patient(DeviceArithmetic(job.worker.device, host=host))


def _view(job: Job, advance: Callable[[int], None]) -> MatrixView:
    base, task, around = job.task.pairing.base, job.task, job.around
    assert base is not None
    return MatrixView(
        files=around.files,
        base=StoredMatrix(around.base.shards[base.shard], base.entry),
        ft=StoredMatrix(around.ft.shards[task.ft.shard], task.ft.entry),
        scratch=job.scratch,
        panel_rows=task.panel_rows,
        check_stop=around.check_stop,
        advance=advance,
        lane=job.worker.lane,
    )
