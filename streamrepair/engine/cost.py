"""How long a task will take, roughly: what the schedule, the plan's estimate and the simulation go by. Pure.

No number of a result depends on it. The rates are of one CPU core with AVX-512 and of one data-centre GPU with fast
float64 (measured on neither machine of the reader's): an estimate is right within a factor of two or three at best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamrepair.engine.plan import Task


@dataclass(frozen=True, slots=True)
class Rates:
    """Speed of one worker."""

    product_flops_per_s: float
    """Matrix products."""
    factor_flops_per_s: float
    """Eigenvalues and vectors, counted as `_factor_flops`."""
    start_s: float
    """Of each repair, whatever its size."""


CPU = Rates(product_flops_per_s=35e9, factor_flops_per_s=14e9, start_s=0.002)
"""One core: float64 ?syrk; ?sytrd, half of which is bound by memory."""
CUDA = Rates(product_flops_per_s=25e12, factor_flops_per_s=0.2e12, start_s=0.05)
"""One GPU: cuBLAS in float64; cuSOLVER's syevd, far below the card's peak."""
COPY_BYTES_PER_S = 1.0e9
"""Reading, comparing, digesting and writing a tensor that is passed through."""
DISK_BYTES_PER_S = 1.5e9
"""Reads and writes together, where nothing better is known."""


@dataclass(frozen=True, slots=True)
class Stages:
    """Seconds of computation in the three stages of a task; files are not in them."""

    gram_s: float
    """While both sides are streamed."""
    factor_s: float
    """No file is touched."""
    merge_s: float
    """While both sides are streamed and the result is written."""

    @property
    def total_s(self) -> float:
        """All three."""
        return self.gram_s + self.factor_s + self.merge_s


def stages(task: Task, place: str) -> Stages:
    """Seconds of computation of a task on one worker of a place ("cpu" or "cuda")."""
    if task.shape is None:
        return Stages(0.0, 0.0, task.out.nbytes / COPY_BYTES_PER_S)
    rates = CPU if place == "cpu" else CUDA
    m, n = float(task.shape.rows), float(task.shape.cols)
    factor = 20 * n**3 if task.backend == "full" else 4 / 3 * n**3
    gram, merge = m * n * n, 0.4 * m * n * n  # a tenth of the rank is kept, two products
    return Stages(
        gram / rates.product_flops_per_s,
        rates.start_s + factor / rates.factor_flops_per_s,
        merge / rates.product_flops_per_s,
    )


def seconds(task: Task, place: str) -> float:
    """Seconds of computation of a task on one worker of a place."""
    return stages(task, place).total_s


def estimate_s(tasks: Sequence[Task], lanes: Sequence[str]) -> float:
    """About how long tasks take together: the slowest of the CPU's workers, the GPUs, and the files.

    Args:
        lanes: the device of each worker.
    """
    found = sum(task.read_once_bytes + task.out.nbytes for task in tasks) / DISK_BYTES_PER_S
    for place in ("cpu", "cuda"):
        here = [seconds(task, place) for task in tasks if task.place == place]
        workers = max(1, sum((lane == "cpu") == (place == "cpu") for lane in lanes))
        found = max(found, sum(here) / workers, max(here, default=0.0))
    return found
