"""A plan as data for `plan --json` and as rows for its table; pure."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from streamrepair.decompose.choose import FEW
from streamrepair.decompose.speed import Rates
from streamrepair.engine import cost
from streamrepair.engine.batches import Batch
from streamrepair.engine.fit import full_fits
from streamrepair.engine.notices import plan_warnings
from streamrepair.engine.plan import Plan, Task, Unit
from streamrepair.report import Settings

_REPAIR = "repair, "


@dataclass(frozen=True, slots=True)
class Group:
    """Tasks that are alike: same treatment, shape and backend."""

    treatment: str
    """The backend, or why tensors are passed through."""
    why: str
    """Why that backend; "" for tensors that are passed through."""
    shape: tuple[int, ...]
    count: int
    out_bytes: int
    """Of all of them together."""
    ram_bytes: int
    """Projected for one, or for a batch of them."""
    vram_bytes: int
    """Likewise."""
    flops: float
    """Of all of them together."""
    seconds: float
    """Predicted, of all of them one after another."""
    batch: int
    """How many at most are decided together; 1 if each is alone."""

    @property
    def means(self) -> str:
        """What a repair is done with and where."""
        return self.treatment.removeprefix(_REPAIR)


def groups(plan: Plan) -> list[Group]:
    """The plan's tasks in groups, dearest first."""
    gathered: dict[tuple[str, tuple[int, ...]], list[tuple[Task, Unit]]] = defaultdict(list)
    for unit in plan.units:
        for task in unit.tasks:
            gathered[_treatment(task, unit), task.out.shape if task.shape else ()].append((task, unit))
    found = [
        Group(
            treatment=treatment,
            why=why(*members[0], plan.settings) if shape else "",
            shape=shape,
            count=len(members),
            out_bytes=sum(task.out.nbytes for task, _ in members),
            ram_bytes=max(unit.ram_bytes for _, unit in members),
            vram_bytes=max(unit.vram_bytes for _, unit in members),
            flops=sum(task.flops for task, _ in members),
            seconds=sum(_share_s(unit, plan.rates) for _, unit in members),
            batch=max(len(unit.tasks) for _, unit in members),
        )
        for (treatment, shape), members in gathered.items()
    ]
    return sorted(found, key=lambda group: (-group.seconds, -group.out_bytes))


def _treatment(task: Task, unit: Unit) -> str:
    if task.shape is None:
        return f"keep, {task.pairing.kind or task.pairing.reason}"
    backend = "randomized or gram" if task.backend == "randomized" else task.backend
    on = ", on GPU" if task.place == "cuda" else ""
    return f"{_REPAIR}{backend}{on}{' in batches' if len(unit.tasks) > 1 else ''}"


def _share_s(unit: Unit, rates: Rates) -> float:
    """Predicted seconds of one of a unit's tasks."""
    return cost.seconds(unit, unit.place, rates) / len(unit.tasks)


def plan_view(plan: Plan) -> dict[str, object]:
    """The plan as JSON-ready data."""
    fits = full_fits(plan)
    repaired = sum(task.shape is not None for task in plan.tasks)
    return {
        "format": "streamrepair.plan/1",
        "device": plan.device,
        "lanes": plan.lanes,
        "workers": plan.workers,
        "budget": {
            "ram_allowed_bytes": plan.ram_allowed_bytes,
            "ram_projected_bytes": plan.ram_projected_bytes,
            "vram_allowed_bytes": plan.vram_allowed_bytes,
            "vram_projected_bytes": plan.vram_projected_bytes,
            "ram_unhindered_bytes": plan.ram_unhindered_bytes,
            "side_by_side": plan.side_by_side,
        },
        "totals": {
            "tensors": plan.tensors,
            "intents": {"repair": repaired, "keep": len(plan.tasks) - repaired},
            "dropped": len(plan.dropped),
            "shards": len(plan.layouts),
            "out_bytes": plan.out_bytes,
            "read_bytes": plan.read_bytes,
            "flops": sum(t.flops for t in plan.tasks),
            "estimated_s": round(plan.estimated_s, 3),
        },
        "warnings": plan_warnings(plan),
        "groups": groups(plan),
        "batches": [_batch_view(batch, plan) for batch in plan.batches],
        "tensors": {
            task.name: _task_view(task, unit, plan, fits.get(task.name, False))
            for unit in plan.units
            for task in unit.tasks
        }
        | {p.name: {"intent": "drop", "reason": p.reason} for p in plan.dropped},
    }


def _batch_view(batch: Batch, plan: Plan) -> dict[str, object]:
    return {
        "tensors": [task.name for task in batch.tasks],
        "ram_bytes": batch.ram_bytes,
        "vram_bytes": batch.vram_bytes,
        "seconds": round(cost.seconds(batch, batch.place, plan.rates), 6),
    }


def _task_view(task: Task, unit: Unit, plan: Plan, has_room: bool) -> dict[str, object]:
    view: dict[str, object] = {
        "intent": "repair" if task.shape else "keep",
        "reason": task.pairing.reason,
        "shape": task.out.shape,
        "dtype": task.out.dtype,
        "place": task.place,
        "ram_bytes": task.ram_bytes,
    }
    if task.shape:
        view |= {
            "backend": task.backend,
            "why": why(task, unit, plan.settings),
            "tries": _tries(task, has_room=has_room),
            "threads": 1,
            "panel_rows": task.panel_rows,
            "vram_bytes": task.vram_bytes,
            "flops": task.flops,
            "seconds": round(_share_s(unit, plan.rates), 6),
            "batch": len(unit.tasks),
        }
        if task.place == "cpu":
            view["predicted_s"] = predicted_s(task, plan.settings, plan.rates)
    return view


def _tries(task: Task, *, has_room: bool) -> list[str]:
    """Backends in the order in which they are tried, as far as numbers alone decide; the last one if it has room."""
    if task.backend == "full":
        return ["full"]
    first = ["randomized", "gram"] if task.backend == "randomized" else ["gram"]
    return [*first, "full"] if has_room else first


def why(task: Task, unit: Unit, settings: Settings) -> str:
    """Why a repair's backend is what it is."""
    if len(unit.tasks) > 1:
        return "small matrices of one shape share their launches; the memory is a batch's, each is recorded by itself"
    if task.backend == settings.backend:
        return f"--backend {settings.backend}"
    if task.place == "cuda":
        return "all values at once suit a GPU best"
    if task.backend == "randomized":
        return "predicted to be quicker where few values are kept; hands over where many are"
    if settings.sigma == "tail":
        return "--sigma tail needs more values than block Krylov finds"
    too_few = "too few columns for block Krylov, whose basis would be as large as the matrix"
    slower = "the reduction is predicted to be about as quick as block Krylov, or quicker"
    return too_few if settings.backend == "randomized" else slower


def predicted_s(task: Task, settings: Settings, rates: Rates) -> dict[str, float]:
    """Backend → predicted seconds: `randomized` if 3% are kept, `gram` if 3% and if 20% are."""
    assert task.shape is not None
    many = 0.2
    krylov = "randomized" if settings.noise_estimate == "exact" else "held" if task.shape.held else "fast"
    return {
        "randomized": round(cost.predicted(task.shape, krylov, rates, FEW).total_s, 6),
        "gram": round(cost.predicted(task.shape, "gram", rates, FEW).total_s, 6),
        "gram_many_kept": round(cost.predicted(task.shape, "gram", rates, many).total_s, 6),
        "full": round(cost.predicted(task.shape, "full", rates).total_s, 6),
    }
