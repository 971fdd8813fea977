"""What a plan and a run state in files: the fingerprint, the index, the report. Does no work."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import msgspec

from streamrepair.checkpoint.layout import Checkpoint
from streamrepair.checkpoint.write import digest_of, digest_text, new_digest
from streamrepair.engine import limits
from streamrepair.engine.accounts import most_bytes, summed, summed_uses
from streamrepair.engine.notices import plan_warnings
from streamrepair.engine.plan import Plan
from streamrepair.report import (
    Budget,
    CheckpointSummary,
    Fingerprint,
    Report,
    Session,
    TensorRecord,
    decoded,
    identity,
    storable,
)
from streamrepair.version import __version__

_RECORD_BYTES = 4000
"""Of one tensor in journal and report; about 1000 in each where nothing was climbed."""


def fingerprint(plan: Plan) -> Fingerprint:
    """What must be unchanged for another run to continue this one."""
    return Fingerprint(
        version=__version__,
        base=_identities(plan.base),
        ft=_identities(plan.ft),
        settings=plan.settings,
        device=",".join(sorted({device.partition(":")[0] for device in plan.devices})),
        processor=os.environ.get("OPENBLAS_CORETYPE") or limits.cpu_model(),
    )


def _identities(checkpoint: Checkpoint) -> dict[str, str]:
    shards = {storable(str(shard.path.resolve())): shard for shard in checkpoint.shards}
    return {
        path: identity(file_bytes=shard.file_bytes, mtime_ns=shard.mtime_ns, header_digest=shard.digest)
        for path, shard in shards.items()
    }


def shard_index(plan: Plan) -> bytes:
    """The result's index: FT's, with the bytes counted anew."""
    ft = plan.ft
    placed = {name: plan.layouts[shard] for name, (shard, _) in ft.tensors.items()}
    total = sum(layout.entries[name].nbytes for name, layout in placed.items())
    index = {
        "metadata": {**ft.index_metadata, "total_size": total},
        "weight_map": {name: layout.name for name, layout in placed.items()},
    }
    # Not msgspec: metadata are FT's, and may hold integers of any length.
    return (json.dumps(index, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def stated_dtype(plan: Plan) -> str | None:
    """What the result's config.json is to state as the weights' dtype; None for what FT's states."""
    return "float32" if plan.settings.out_dtype == "float32" else None


def statement_bytes(plan: Plan) -> int:
    """At most so many bytes are index, journal, accounts and report, the latter's temporary copy included."""
    names = sum(len(shard.header_bytes) for shard in (*plan.base.shards, *plan.ft.shards))
    records = _RECORD_BYTES * plan.tensors
    # A commit has at least one tensor, but for those at the end.
    return 4 * names + records + most_bytes(len(plan.lanes), len(plan.tasks) + 2)


def make_report(
    plan: Plan,
    records: Mapping[str, TensorRecord],
    sessions: list[Session],
    *,
    sidecars: Mapping[str, str],
) -> Report:
    """The report of a run whose every tensor has its record; `sealed` gives it its digest.

    Args:
        sessions: all that led to this result, the present one last. sidecars: digest of each.
    """
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
            ram_measured_bytes=max(session.ram_measured_bytes for session in sessions),
            vram_allowed_bytes=plan.vram_allowed_bytes,
            vram_projected_bytes=plan.vram_projected_bytes,
            vram_measured_bytes=max((s.vram_measured_bytes or 0 for s in sessions), default=0) or None,
        ),
        timings=summed(sessions),
        sessions=len(sessions),
        utilisation=summed_uses(sessions),
        sidecars=tuple(map(storable, sidecars)),
        sidecar_digests={storable(name): digest for name, digest in sidecars.items()},
        headers={layout.name: layout.header_digest for layout in plan.layouts},
        index_digest=None if plan.ft.index_name is None else digest_of(shard_index(plan)),
        warnings=(
            *plan_warnings(plan),
            *(message for session in sessions for message in session.warnings),
            *(message for record in tensors.values() for message in record.warnings),
        ),
        tensors=tensors,
    )


def sealed(report: Report) -> tuple[Report, bytes]:
    """A report with its digest, and as it stands in its file."""
    assert report.report_digest is None
    text = msgspec.json.format(msgspec.json.encode(report)) + b"\n"
    at = text.rindex(b"null")  # its place: encoding the report anew would hold the text twice
    digest = _content_digest(text)
    return msgspec.structs.replace(report, report_digest=digest), text[:at] + f'"{digest}"\n}}\n'.encode()


def is_as_written(text: bytes, report: Report) -> bool:
    """Whether the text that a report was read from says what the run wrote; of one without a digest nobody knows."""
    if report.report_digest is None:
        return True
    try:
        return _content_digest(text) == report.report_digest
    except (ValueError, RecursionError, msgspec.MsgspecError):  # no UTF-8 in a member that is none of ours
        return False


def _content_digest(text: bytes) -> str:
    """Digest of what a report's text says but for `report_digest`, whatever its layout, order and spelling of numbers.

    Of the JSON and not of the record, so that a member that another version has counts too. Tensors are taken one by
    one: all of them decoded would be several times the text.
    """
    members = decoded(text, dict[str, msgspec.Raw])
    tensors = decoded(members.pop("tensors"), dict[str, msgspec.Raw])
    members.pop("report_digest")
    hashed = new_digest()
    for under, values in (((), members), (("tensors",), tensors)):
        for name in sorted(values):
            value = json.loads(bytes(values[name]), parse_int=float)  # jq writes 1.0 as 1
            hashed.update(msgspec.json.encode((*under, name, value), order="sorted"))
    return digest_text(hashed)


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
