"""What a plan and a run say of themselves: warnings, the fingerprint, the index, the report. Does no work."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from streamrepair.checkpoint.layout import Checkpoint
from streamrepair.engine import budget
from streamrepair.engine.plan import Plan
from streamrepair.errors import shown
from streamrepair.report import (
    Budget,
    CheckpointSummary,
    Fingerprint,
    Report,
    ResourceUse,
    TensorRecord,
    Timings,
    storable,
)
from streamrepair.version import __version__

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


def fingerprint(plan: Plan) -> Fingerprint:
    """What must be unchanged for another run to continue this one."""
    return Fingerprint(
        version=__version__,
        base=_identities(plan.base),
        ft=_identities(plan.ft),
        settings=plan.settings,
        device=",".join(sorted({device.partition(":")[0] for device in plan.devices})),
    )


def _identities(checkpoint: Checkpoint) -> dict[str, str]:
    shards = {storable(str(shard.path.resolve())): shard for shard in checkpoint.shards}
    return {
        path: f"{shard.file_bytes} bytes, mtime {shard.mtime_ns}, header {shard.digest[:16]}"
        for path, shard in shards.items()
    }


def shard_index(plan: Plan) -> bytes:
    """The result's index: FT's, with the bytes counted anew."""
    ft = plan.ft
    placed = {name: plan.layouts[ft.tensors[name][0]] for name in ft.index_order}
    total = sum(layout.entries[name].nbytes for name, layout in placed.items())
    index = {
        "metadata": {**ft.index_metadata, "total_size": total},
        "weight_map": {name: layout.name for name, layout in placed.items()},
    }
    # Not msgspec: metadata are FT's, and may hold integers of any length.
    return (json.dumps(index, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def make_report(
    plan: Plan,
    records: Mapping[str, TensorRecord],
    timings: Timings,
    *,
    sidecars: Sequence[str],
    warnings: Sequence[str],
    utilisation: tuple[ResourceUse, ...],
) -> Report:
    """The report of a run whose every tensor has its record."""
    tensors = {name: records[name] for layout in plan.layouts for name in layout.entries}
    for pairing in plan.dropped:
        assert pairing.base is not None
        entry = pairing.base.entry
        tensors[pairing.name] = TensorRecord(
            action="dropped", reason=pairing.reason, shape=entry.shape, dtype=entry.dtype
        )
    return Report(
        version=__version__,
        base=_summary(plan.base),
        ft=_summary(plan.ft),
        settings=plan.settings,
        device=plan.device,
        workers=plan.workers,
        budget=Budget(
            ram_allowed_bytes=plan.ram_allowed_bytes,
            ram_projected_bytes=plan.ram_projected_bytes,
            ram_measured_bytes=budget.peak_bytes(),
            vram_allowed_bytes=plan.vram_allowed_bytes,
            vram_projected_bytes=plan.vram_projected_bytes,
            vram_measured_bytes=budget.device_peak_bytes(plan.gpus),
        ),
        timings=timings,
        utilisation=utilisation,
        sidecars=tuple(map(storable, sidecars)),
        headers={layout.name: layout.header_digest for layout in plan.layouts},
        warnings=tuple(warnings),
        tensors=tensors,
    )


def _summary(checkpoint: Checkpoint) -> CheckpointSummary:
    return CheckpointSummary(
        given=storable(checkpoint.given),
        path=storable(str(checkpoint.folder.resolve())),
        shards=tuple(shard.path.name for shard in checkpoint.shards),
        tensors=len(checkpoint.tensors),
        bytes=checkpoint.total_bytes,
        header_digest=checkpoint.header_digest,
        unindexed=checkpoint.unindexed,
        stray_files=tuple(map(storable, checkpoint.stray_files)),
    )
