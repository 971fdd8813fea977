"""A run, or `verify --deep`, held against the limit on what this process may map, before any work.

`fit` holds plans against --ram, which counts what is used; here counts what is mapped. The need is an upper bound, as a
thread that is refused a buffer in the middle of its work cannot be helped.
"""

from __future__ import annotations

from dataclasses import replace

from streamrepair.decompose import lapack
from streamrepair.engine import address_space, budget, memory
from streamrepair.engine.address_space import Limit
from streamrepair.engine.memory import MatrixShape
from streamrepair.engine.plan import Plan

_THREADS_OF_WORKER = 2
"""Itself and the one that reads its panels ahead; one that is lent to another worker has no task of its own."""
_OTHER_THREADS = 5
"""Reading ahead of the line, progress, two that read a shard back, and one that was lent and is still at it."""
_BUFFERS_OF_WORKER = 2
"""One of NumPy's BLAS and one of SciPy's."""
_DEEP_BLOCKS = 10
"""Arrays of a block, in float64, that holding a result against the exact one has at once."""


def refuse_without_room(plan: Plan) -> None:
    """Hold a plan against the limit, if there is one, and make malloc sparing.

    Raises:
        BudgetError: it leaves less than the plan's workers map together.
    """
    limit = address_space.tightest()
    if limit is None:
        return
    address_space.share_one_arena()
    need_bytes = run_bytes(plan)
    if need_bytes <= limit.left_bytes:
        return
    fewer = _most_workers(plan, limit)
    instead = ", or give a smaller --ram" if _has_wide_panels(plan) else ""
    if fewer is not None:
        instead = f", or give --workers {fewer}"
    count = "one worker" if plan.workers == 1 else f"{plan.workers} workers"
    limit.hold(need_bytes, f"a run with {count}", instead)


def workers_with_room(plan: Plan) -> int:
    """As many of the plan's workers as a limit has room for; all of them where there is not even room for one."""
    limit = address_space.tightest()
    return plan.workers if limit is None else _most_workers(plan, limit) or plan.workers


def _most_workers(plan: Plan, limit: Limit) -> int | None:
    room_bytes = limit.left_bytes - address_space.TAKEN_OTHERWISE_BYTES
    return next((n for n in range(plan.workers, 0, -1) if _with_workers(plan, n) <= room_bytes), None)


def run_bytes(plan: Plan) -> int:
    """What a run maps beyond what the process has mapped by now."""
    repairs = any(task.shape is not None for task in plan.tasks)
    # What it uses, less what is here already and what the terms below have exactly.
    used = plan.ram_projected_bytes - plan.workers * memory.WORKER_BYTES - budget.resident_bytes()
    threads = plan.workers * _THREADS_OF_WORKER + _OTHER_THREADS
    buffers = plan.workers * _BUFFERS_OF_WORKER if repairs else 0
    return max(0, used) + threads * address_space.stack_bytes() + buffers * address_space.BUFFER_BYTES + _load(repairs)


def refuse_deep_without_room(shapes: list[MatrixShape]) -> None:
    """Hold the float64 SVDs of matrices, one after another, against the limit, if there is one.

    Raises:
        BudgetError: it leaves less than the largest takes.
    """
    limit = address_space.tightest()
    if limit is None:
        return
    address_space.share_one_arena()
    fixed = memory.PROCESS_BYTES - budget.resident_bytes() + 3 * address_space.stack_bytes()
    fixed += _BUFFERS_OF_WORKER * address_space.BUFFER_BYTES + _load(bool(shapes))
    need_bytes = max(0, fixed) + max((_deep_bytes(shape) for shape in shapes), default=0)
    limit.hold(need_bytes, "--deep", ", or leave out --deep: the rest of verify needs little")


def _deep_bytes(shape: MatrixShape) -> int:
    """The decomposition with whole panels, and the pass that holds OUT's beside it."""
    panels = memory.RING_SLOTS * shape.rows * shape.cols * (shape.base_item_bytes + shape.out_item_bytes)
    return memory.repair_bytes(shape, "full", shape.rows) + panels + 8 * _DEEP_BLOCKS * shape.block * shape.cols


def _load(repairs: bool) -> int:
    return address_space.lapack_bytes() if repairs and not lapack.is_loaded() else 0


def _has_wide_panels(plan: Plan) -> bool:
    """Whether a smaller budget would make panels smaller."""
    return any(task.shape is not None and task.panel_rows > task.shape.block for task in plan.tasks)


def _with_workers(plan: Plan, workers: int) -> int:
    return run_bytes(replace(plan, lanes=plan.lanes[:workers]))
