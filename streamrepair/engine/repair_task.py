"""The repair of one matrix: what is kept of its delta is decided here; `second_pass` merges, rounds once and writes.

Loaded when the first tensor that differs is met: a run that only copies needs none of SciPy.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from streamrepair.decompose import ladder
from streamrepair.decompose.arithmetic import Arithmetic
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.truncation import NonFiniteDeltaError
from streamrepair.engine import cost
from streamrepair.engine.copying import copy
from streamrepair.engine.job import Job
from streamrepair.engine.nonfinite import find_nonfinite
from streamrepair.engine.pace import Pace
from streamrepair.engine.second_pass import failed, written
from streamrepair.engine.short_memory import Patient, ReservedHost
from streamrepair.engine.task import passed_through
from streamrepair.engine.view import MatrixView, StoredMatrix
from streamrepair.errors import NumericalError
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
            raise failed(job, error) from error
        digest, _ = copy(job)
        return passed_through(job.task, "kept_ft", where, digest), where
    except NumericalError as error:
        raise failed(job, error) from error
    job.spent.decompose_s += time.perf_counter() - began
    record = written(job, view, truncation, arithmetic, host)
    job.spent.read_s += view.stats.seconds
    job.spent.bytes_read += view.stats.bytes
    return record, None


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
