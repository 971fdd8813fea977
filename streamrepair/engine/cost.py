"""How long a task will take: what the schedule, the plan's estimate and the simulation go by. Pure.

Counted are products, the reduction to tridiagonal form (half products, half memory traffic), factorisations, and what
grows with the kept rank; what is bound by memory scales with its speed. No number of a result depends on it;
docs/performance.md holds it against measurement.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from streamrepair.engine.memory import MatrixShape
from streamrepair.engine.rates import CACHE_BYTES, CPU, CUDA, Rates

if TYPE_CHECKING:
    from streamrepair.engine.plan import Task, Unit

COPY_BYTES_PER_S = 1.0e9
"""Reading, comparing, digesting and writing a tensor that is passed through."""
DISK_BYTES_PER_S = 1.5e9
"""Reads and writes together, where nothing better is known."""
KEPT_SHARE = 0.1
"""Of the rank, where nothing better is known; real fine-tunes keep 3 to 30%."""
_CONVERT_S = 6.5e-9
"""Per element, both passes: widening, subtracting, rounding."""
_VALUES_S = 9e-9
"""Per n², of all eigenvalues of a tridiagonal matrix."""
_VECTORS_S = 6e-8
"""Per n and vector, of twisted factorisations."""
_WINDOWS = 60
"""Vectors that are made exact."""
_KRYLOV_PRODUCTS = 27
"""Products with 16 vectors until the top and the density are known."""
_SOLVES = 15
BATCH_START = 0.25
"""Of the start of a repair, what each further member of a batch takes: its checks and its merge; not measured."""
_SKINNY, _INDEFINITE, _SOLVING, _CHOLESKY, _SVD = 0.33, 0.5, 0.4, 0.85, 0.35
"""Speeds relative to float64 products."""


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


def predicted(shape: MatrixShape, method: str, rates: Rates, kept: float = KEPT_SHARE) -> Stages:
    """Seconds of a repair by one worker.

    Args:
        method: "gram", "randomized", "fast" or "full". kept: share of the rank.
    """
    m, n = float(shape.rows), float(shape.cols)
    k, single = kept * n, rates.float32_first and shape.out_item_bytes == 2 and method != "full"
    item, product = (4, rates.float32_flops_per_s) if single else (8, rates.float64_flops_per_s)
    double, slow = rates.float64_flops_per_s, CPU.memory_bytes_per_s / rates.memory_bytes_per_s
    convert = 0.5 * _CONVERT_S * slow * m * n
    gram = m * n * n * (2 if method == "full" else 1) / product + convert
    if method == "gram":
        factor = (
            _reduction_s(n, item, rates) + slow * (_VALUES_S * n * n + _VECTORS_S * n * k) + 3 * n * n * k / product
        )
        factor += 4 * n * n * _WINDOWS / double if single else 0.0
    elif method == "full":
        factor = 9 * n**3 / (_SVD * double)
    else:
        factor = 32 * n * n * _KRYLOV_PRODUCTS / (_SKINNY * double) + n**3 / 3 / (_CHOLESKY * double)
        if method == "randomized":
            factor += n**3 / 3 / (_INDEFINITE * double) + 32 * n * n * _SOLVES / (_SOLVING * double)
    return Stages(gram, rates.start_s + factor, 4 * m * n * k / product + convert)


def flops(shape: MatrixShape, backend: str) -> float:
    """Floating-point operations of a repair, with a tenth of the rank kept."""
    m, n = float(shape.rows), float(shape.cols)
    if backend == "full":
        return 2 * m * n * n + 20 * n**3
    return m * n * n + 4 / 3 * n**3 + 0.4 * m * n * n


def _reduction_s(n: float, item_bytes: int, rates: Rates) -> float:
    """Reduction to tridiagonal form: 2n³/3 operations in products, and half the matrix read at each of n steps."""
    product = rates.float32_flops_per_s if item_bytes == 4 else rates.float64_flops_per_s
    speed = rates.cache_bytes_per_s if n * n / 2 * item_bytes <= CACHE_BYTES else rates.memory_bytes_per_s
    return 2 / 3 * n**3 / product + n**3 / 6 * item_bytes / speed


def stages(unit: Unit, place: str, cpu: Rates = CPU) -> Stages:
    """Seconds of computation of a unit on one worker of a place ("cpu" or "cuda").

    The members of a batch share most of a repair's start.
    """
    if len(unit.tasks) == 1:
        return _of_task(unit.tasks[0], place, cpu)
    each = [_of_task(task, place, cpu) for task in unit.tasks]
    rates = cpu if place == "cpu" else CUDA
    saved_s = (len(each) - 1) * (1.0 - BATCH_START) * rates.start_s
    return Stages(
        sum(one.gram_s for one in each), sum(one.factor_s for one in each) - saved_s, sum(one.merge_s for one in each)
    )


def _of_task(task: Task, place: str, cpu: Rates) -> Stages:
    """Seconds of a task by itself.

    A task that tries block Krylov first is counted as if that gave up: real fine-tunes mostly keep too much for it.
    """
    if task.shape is None:
        return Stages(0.0, 0.0, task.out.nbytes / COPY_BYTES_PER_S)
    method = "full" if task.backend == "full" else "gram"
    return predicted(task.shape, method, cpu if place == "cpu" else CUDA)


def seconds(unit: Unit, place: str, cpu: Rates = CPU) -> float:
    """Seconds of computation of a unit on one worker of a place."""
    return stages(unit, place, cpu).total_s


def estimate_s(units: Sequence[Unit], lanes: Sequence[str], room_bytes: int, cpu: Rates = CPU) -> float:
    """About how long units take together: the slowest of the CPU's workers, the GPUs, the files, and the memory.

    Args:
        lanes: the device of each worker. room_bytes: what units may hold together. cpu: speeds of one of the CPU's
            workers.
    """
    each_s = [seconds(unit, unit.place, cpu) for unit in units]
    found = sum(unit.read_once_bytes + unit.out_bytes for unit in units) / DISK_BYTES_PER_S
    for place in ("cpu", "cuda"):
        here = [unit_s for unit, unit_s in zip(units, each_s, strict=True) if unit.place == place]
        workers = max(1, sum((lane == "cpu") == (place == "cpu") for lane in lanes))
        found = max(found, sum(here) / workers, max(here, default=0.0))
    needs = [(unit.ram_bytes, unit_s) for unit, unit_s in zip(units, each_s, strict=True)]
    return max(found, _in_turns_s(needs, len(lanes), room_bytes))


def _in_turns_s(units: Sequence[tuple[int, float]], workers: int, room_bytes: int) -> float:
    """What memory alone makes it: of units that need more than a (k + 1)-th of the room only k run at once.

    Args:
        units: bytes and seconds of each.
    """
    neediest = sorted(units, key=lambda unit: -unit[0])
    needs = [-ram_bytes for ram_bytes, _ in neediest]
    until_s = [0.0, *accumulate(unit_s for _, unit_s in neediest)]
    return max((until_s[bisect_left(needs, -(room_bytes // (k + 1)))] / k for k in range(1, workers)), default=0.0)
