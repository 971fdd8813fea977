"""Speeds of this machine that predicted times rest on: shipped defaults, or a short measurement kept per machine.

What was measured decides no number of a result: which backend is tried is settled with the shipped speeds
(`decompose/choose`), so that a run gives the same bytes whatever was measured, and wherever it is continued.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from streamrepair.checkpoint import osfile, wholefile
from streamrepair.decompose.speed import CPU, Rates
from streamrepair.engine import limits
from streamrepair.errors import InputError, OutputError
from streamrepair.report import decoded
from streamrepair.version import __version__

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """A measurement, and what it was made on."""

    machine: str
    version: str
    rates: Rates


def path() -> Path:
    """Where the measurement is kept: in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "streamrepair" / "rates.json"


def machine() -> str:
    """What a measurement belongs to: the host and its processor."""
    return f"{platform.node()}, {limits.cpu_model() or platform.machine()}, {os.cpu_count()} processors"


def load() -> Rates | None:
    """The measurement of this machine, if there is one."""
    try:
        measured = decoded(wholefile.read_whole(path()), Measured)
    except (InputError, RuntimeError, msgspec.MsgspecError):  # RuntimeError: no home folder
        return None
    return measured.rates if (measured.machine, measured.version) == (machine(), __version__) else None


def save(rates: Rates) -> Path:
    """Keep a measurement; returns where.

    Raises:
        OutputError: there is no home folder, or the cache folder cannot be written.
    """
    measured = Measured(machine=machine(), version=__version__, rates=rates)
    try:
        target = path()
        osfile.make_folder(target.parent)
        wholefile.write_atomic(target, msgspec.json.format(msgspec.json.encode(measured)))
    except (OutputError, RuntimeError) as error:  # RuntimeError: no home folder
        why = error.finding if isinstance(error, OutputError) else error
        raise OutputError(
            f"{why}; the speeds are not kept: let XDG_CACHE_HOME name a folder to keep them in"
        ) from error
    return target


def measure() -> Rates:
    """Speeds of one thread, in a few seconds."""
    import numpy as np

    from streamrepair.engine.numeric_threads import NumericThreads

    threads = NumericThreads()
    threads.hold()
    try:
        n = 1024
        single, double = _product_flops_per_s(np.float32, n), _product_flops_per_s(np.float64, n)
        # Reduction to tridiagonal form: half of its operations are products, the rest reads half a matrix n times.
        cached, beyond = (_reduction_bytes_per_s(size, double) for size in (n, 3 * n))
    finally:
        threads.release()
    return Rates(
        float32_flops_per_s=single,
        float64_flops_per_s=double,
        cache_bytes_per_s=cached,
        memory_bytes_per_s=min(beyond, cached),
        float32_first=True,
        start_s=CPU.start_s,
    )


def _product_flops_per_s(kind: type[np.float32] | type[np.float64], n: int) -> float:
    import numpy as np

    from streamrepair.decompose import lapack

    panel: NDArray[Any] = np.random.Generator(np.random.SFC64(0)).standard_normal((4 * n, n)).astype(kind)
    gram: NDArray[Any] = np.empty((n, n), kind)
    return 4 * n**3 / _best(lambda: lapack.add_gram(panel, gram, beta=0.0))


def _reduction_bytes_per_s(n: int, flops_per_s: float) -> float:
    import numpy as np

    from streamrepair.decompose import lapack

    matrix = np.random.Generator(np.random.SFC64(1)).standard_normal((n, n))
    spent = _best(lambda: lapack.tridiagonalise(matrix.copy()), times=2 if n <= 1024 else 1)
    return n**3 / 6 * 8 / max(0.2 * spent, spent - 2 / 3 * n**3 / flops_per_s)


def _best(work: Callable[[], object], times: int = 3) -> float:
    found = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        work()
        found = min(found, time.perf_counter() - began)
    return found
