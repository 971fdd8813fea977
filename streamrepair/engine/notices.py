"""What a person should be told of a plan, and of a tensor that is done."""

from __future__ import annotations

from collections.abc import Iterator

from streamrepair.engine.plan import Plan
from streamrepair.engine.task import Outcome
from streamrepair.errors import shown
from streamrepair.units import format_bytes

_FEW = 8


def plan_warnings(plan: Plan) -> list[str]:
    """What a person should know before the work starts."""
    found = []
    if dropped := len(plan.dropped):
        found.append(f"{dropped} tensors of BASE are not in FT and are dropped, e.g. {shown(plan.dropped[0].name)}")
    missing = [t for t in plan.tasks if t.pairing.base is None and t.pairing.reason == "not in the base checkpoint"]
    if missing:
        found.append(f"{len(missing)} tensors of FT are not in BASE and are kept, e.g. {shown(missing[0].name)}")
    short = [t for t in plan.tasks if t.shape is not None and t.shape.cols < _FEW]
    if short:
        found.append(
            f"{len(short)} matrices have a side shorter than {_FEW}, of which the law of large matrices says little; "
            f"--exclude passes them through, e.g. {shown(short[0].name)} {list(short[0].out.shape)}"
        )
    if resized := [t for t in plan.tasks if t.pairing.reason.startswith("shapes differ")]:
        found.append(f"{len(resized)} tensors differ in shape and are kept, e.g. {shown(resized[0].name)}")
    for side, checkpoint in (("BASE", plan.base), ("FT", plan.ft)):
        if checkpoint.unindexed:
            found.append(f"{side}: {len(checkpoint.unindexed)} tensors are in its shards but not in its index")
        if checkpoint.stray_files:
            found.append(f"{side}: ignored weight files {', '.join(map(shown, checkpoint.stray_files[:5]))}")
    return found


def machine_warnings(plan: Plan, free_bytes: int) -> Iterator[str]:
    """Of a plan on the machine that is to carry it out."""
    if plan.ram_projected_bytes > free_bytes:
        projected, free = format_bytes(plan.ram_projected_bytes), format_bytes(free_bytes)
        yield (
            f"{projected} of memory are projected, {free} are free: the kernel may end the run; allow less with --ram"
        )


def task_warnings(outcome: Outcome) -> Iterator[str]:
    """Of its work, in the order of importance."""
    task, record = outcome.task, outcome.record
    if outcome.nonfinite:
        yield f"{outcome.nonfinite}; passed through as it is"
    elif record.action == "kept_ft" and task.pairing.intent == "repair":
        yield f"tensor {shown(task.name)} is kept as fine-tuned: {record.reason}"
        return  # which way that was found out is in the record
    for reason in record.climbed:
        # Left for a better one as a matter of course, and not because something failed.
        if not reason.startswith(("gram-float32", "randomized", "rows", "row-space")):
            yield f"tensor {shown(task.name)}: {reason}; decided by {record.backend}"
