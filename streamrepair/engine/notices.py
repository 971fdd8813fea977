"""What a person should be told of a plan, and of a tensor that is done."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping

from streamrepair.checkpoint.beside import kind_of
from streamrepair.checkpoint.copies import candidates
from streamrepair.checkpoint.naming import same_by_another_name
from streamrepair.checkpoint.pairing import NOT_IN_BASE, SHAPES_DIFFER, Selection, is_of_no_kind
from streamrepair.checkpoint.sidecars import left_beside, not_carried, sidecars, stated_model
from streamrepair.decompose.choose import LEFT_AS_A_MATTER_OF_COURSE
from streamrepair.engine.fit import full_budget, full_fits
from streamrepair.engine.job import Outcome
from streamrepair.engine.memory import PROCESS_BYTES
from streamrepair.engine.plan import Plan
from streamrepair.errors import InputError, shown
from streamrepair.report import TensorRecord
from streamrepair.units import counted, format_apart, whole_mb

_ROUNDING_ALONE = 1e-5
"""σ̂ below this share of ‖Δ‖_F is no noise of training, of which each value has some 1/√rank; nor that of bfloat16."""
_FEW = 8
_LISTED = 5


def plan_warnings(plan: Plan) -> list[str]:
    """What a person should know before the work starts."""
    found = [*_of_selection(plan)]
    if n := len(plan.dropped):
        found.append(
            f"{counted(n, 'tensor')} of BASE {_are(n)} not in FT and {_are(n)} dropped, "
            f"e.g. {shown(plan.dropped[0].name)}"
        )
    if missing := [t for t in plan.tasks if t.pairing.base is None and t.pairing.reason == NOT_IN_BASE]:
        n = len(missing)
        same = same_by_another_name((t.name for t in missing), [pairing.name for pairing in plan.dropped])
        told = f"e.g. {shown(same[0] if same else missing[0].name)}"
        if same:
            told += f"; BASE has {shown(same[1])}, and only equal names are paired"
        elif plan.copies is None and (perhaps := candidates(plan.base, plan.ft)):
            name, others = next(iter(perhaps.items()))
            told += f"; the repair looks whether such are copies, as {shown(name)} may be of {shown(others[0])}"
        found.append(f"{counted(n, 'tensor')} of FT {_are(n)} not in BASE and {_are(n)} kept, {told}")
    found += _of_copies(plan)
    if short := [t for t in plan.tasks if t.shape is not None and t.shape.cols < _FEW]:
        have = "1 matrix has" if len(short) == 1 else f"{len(short)} matrices have"
        found.append(
            f"{have} a side shorter than {_FEW}, of which the law of large matrices says little; "
            f"--exclude passes them through, e.g. {shown(short[0].name)} {list(short[0].out.shape)}"
        )
    if resized := [t for t in plan.tasks if t.pairing.kind == SHAPES_DIFFER]:
        n = len(resized)
        differ = f"differs in shape and {_are(n)}" if n == 1 else f"differ in shape and {_are(n)}"
        found.append(f"{counted(n, 'tensor')} {differ} kept, e.g. {shown(resized[0].name)}")
    for side, checkpoint in (("BASE", plan.base), ("FT", plan.ft)):
        if n := len(checkpoint.unindexed):
            found.append(f"{side}: {counted(n, 'tensor')} {_are(n)} in its shards but not in its index")
        if checkpoint.stray_files:
            found.append(f"{side}: ignored weight files {', '.join(map(shown, checkpoint.stray_files[:_LISTED]))}")
    kinds = [stated_model(checkpoint) for checkpoint in (plan.base, plan.ft)]
    if None not in kinds and kinds[0] != kinds[1]:
        base, ft = (shown(str(kind)) for kind in kinds)
        found.append(f"BASE is a model of type {base}, FT of type {ft}, by their config.json: was FT tuned from BASE?")
    return [*found, *_of_room(plan), *_of_files_beside(plan)]


def _of_room(plan: Plan) -> list[str]:
    """Tensors whose last resort the budget has no room for."""
    fits = full_fits(plan)
    without = [task for task in plan.tasks if not fits.get(task.name, True)]
    if not without:
        return []
    enough = full_budget(plan, *without)
    more = f"--ram {whole_mb(enough)} " if enough > plan.ram_allowed_bytes else ""
    return [
        f"no room for the float64 SVD that {counted(len(without), 'tensor')} may turn out to need, though few do; one "
        f"that does would fail the run: with {more}--workers 1 there is room"
    ]


def _of_copies(plan: Plan) -> Iterator[str]:
    """Matrices that FT stores twice and BASE once."""
    if like := [t for t in plan.tasks if t.paired_with is not None]:
        what = "is a copy of another" if len(like) == 1 else "are copies of others"
        yield (
            f"{counted(len(like), 'tensor')} of FT {what} that BASE has, and {_are(len(like))} treated like it, "
            f"e.g. {shown(like[0].name)} like {shown(like[0].paired_with or '')}"
        )
    repaired = {task.name for task in plan.tasks if task.shape is not None}
    for name, twin in (plan.copies or {}).items():
        if twin in repaired and name not in repaired:
            yield (
                f"{shown(name)} is a copy of {shown(twin)} in FT, which is repaired; it stays as fine-tuned, and "
                "loaders untie what differs"
            )


def _of_files_beside(plan: Plan) -> Iterator[str]:
    """What lies beside FT's weights and does not come along, and what does not lie there."""
    broken = left_beside(plan.ft)
    if broken:
        listed = ", ".join(map(shown, broken[:_LISTED]))
        yield f"FT: left out beside the weights, no regular files or readable folders three deep at most: {listed}"
    missed = not_carried(plan.ft)
    if weights := [name for name in missed if name.endswith(".safetensors")]:
        listed = ", ".join(map(shown, weights[:_LISTED]))
        yield (
            f"FT: weights in folders beside these are neither repaired nor copied, e.g. {listed}: name such folders by "
            "themselves"
        )
    if left := [name for name in missed if name not in weights]:
        more = f" and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
        listed = ", ".join(map(shown, left[:_LISTED])) + more
        yield f"FT: not copied beside the weights: {listed}: copy what loading needs"
    found = {kind_of(name) for name in (*sidecars(plan.ft), *broken)}
    with contextlib.suppress(InputError):  # what lies beside BASE is not needed
        beside_base = {kind: name for name in reversed(sidecars(plan.base)) if (kind := kind_of(name)) is not None}
        for kind, name in sorted(beside_base.items()):
            if kind not in found:
                yield f"FT has no {kind} beside its weights, and OUT will have none; BASE has {shown(name)}"


def _of_selection(plan: Plan) -> Iterator[str]:
    """A pattern that matches nothing, and a checkpoint most of which is of no kind that can be repaired."""
    chosen = Selection(plan.settings.include, plan.settings.exclude)
    for option, pattern in (("--include", chosen.include), ("--exclude", chosen.exclude)):
        if pattern is not None and not any(re.search(pattern, task.name) for task in plan.tasks):
            yield f"{option} {shown(pattern)} matches no tensor of FT"
    repaired_bytes = sum(task.out.nbytes for task in plan.tasks if task.shape is not None)
    other = [task for task in plan.tasks if is_of_no_kind(task.pairing) and chosen.refusal(task.name) is None]
    if sum(task.out.nbytes for task in other) > repaired_bytes:
        largest = max(other, key=lambda task: task.out.nbytes)
        some = "most of FT is" if repaired_bytes else "no tensor is repaired; FT is"
        yield f"{some} kept as it is: e.g. {shown(largest.name)} {list(largest.out.shape)}, {largest.pairing.reason}"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def machine_warnings(plan: Plan, *, free_bytes: int, resident_bytes: int) -> Iterator[str]:
    """Of a plan on the machine, and in the process, that is to carry it out."""
    if plan.ram_projected_bytes > free_bytes:
        projected, free = format_apart(plan.ram_projected_bytes, free_bytes)
        yield (
            f"{projected} of memory are projected, {free} are free: the kernel may end the run; allow less with --ram"
        )
    held = resident_bytes - PROCESS_BYTES
    if held > 0 and not plan.gpus and plan.ram_projected_bytes + held > plan.ram_allowed_bytes:
        resident, process = format_apart(resident_bytes, PROCESS_BYTES)
        used, allowed = format_apart(plan.ram_projected_bytes + held, plan.ram_allowed_bytes)
        yield (
            f"the program held {resident} before the run, {process} are projected for it: up to {used} are used, "
            f"--ram allows {allowed}"
        )


def result_warnings(records: Mapping[str, TensorRecord]) -> Iterator[str]:
    """Of a result as a whole."""
    flat = [
        name
        for name, record in records.items()
        if record.sigma_hat is not None and record.sigma_hat < _ROUNDING_ALONE * (record.frob_delta_in or 0.0)
    ]
    if flat:
        deltas = "1 delta is" if len(flat) == 1 else f"{len(flat)} deltas are"
        yield (
            f"{deltas} of low rank but for less than {_ROUNDING_ALONE:.0e} of the norm, as a merged LoRA's are, e.g. "
            f"{shown(flat[0])}: what was dropped may be rounding, not noise of training"
        )


def task_warnings(outcome: Outcome) -> Iterator[str]:
    """Of its work, in the order of importance."""
    task, record = outcome.task, outcome.record
    if outcome.nonfinite:
        yield f"{outcome.nonfinite}; passed through as it is"
    elif record.action == "kept_ft" and task.pairing.intent == "repair":
        yield f"tensor {shown(task.name)} is kept as fine-tuned: {record.reason}"
        return  # which way that was found out is in the record
    # A whole Gram matrix that is too blunt is what deflation is for.
    deflated = ("gram-float64",) if record.backend == "deflated-float64" else ()
    for reason in record.climbed:
        if not reason.startswith(LEFT_AS_A_MATTER_OF_COURSE + deflated):
            yield f"tensor {shown(task.name)}: {reason}; decided by {record.backend}"
