"""What an earlier run left that still stands: tensors whose bytes are as recorded, and a result with nothing to add."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from streamrepair.checkpoint import wholefile
from streamrepair.checkpoint.refusals import shown_path
from streamrepair.checkpoint.sidecars import differing, sidecars
from streamrepair.checkpoint.write import ShardFile, digest_file
from streamrepair.engine.plan import Plan
from streamrepair.engine.statement import is_as_written, shard_index, stated_dtype
from streamrepair.engine.stop import StopRequest
from streamrepair.engine.workspace import Workspace
from streamrepair.errors import InputError, OutputError, shown
from streamrepair.report import REPORT_NAME, Report, TensorRecord, decoded, restored

_LISTED = 5


def sound(
    shards: Sequence[ShardFile],
    journalled: Mapping[str, TensorRecord],
    *,
    stop: StopRequest,
    warn: Callable[[str], None],
) -> dict[str, TensorRecord]:
    """The journalled tensors whose bytes are still what their records say; the others are done again.

    Raises:
        InterruptedRunError: a stop was requested meanwhile.
    """
    found: dict[str, TensorRecord] = {}
    for shard in shards:
        damaged = []
        for name in shard.layout.entries:
            stop.check_at_once()
            if name in journalled and _reads_as(shard, name, journalled[name].digest):
                found[name] = journalled[name]
            elif name in journalled or shard.sealed:
                damaged.append(name)
        if damaged and shard.sealed:
            shard.unseal()
        for name in damaged:
            if name in journalled:
                warn(f"{shown(str(shard.path))}: tensor {shown(name)} is damaged and is done again")
    return found


def _reads_as(shard: ShardFile, name: str, digest: str | None) -> bool:
    """Whether a tensor of OUT has its digest; one that cannot be read has not: writing it anew may cure the disk."""
    try:
        return shard.digest(name) == digest
    except OutputError:
        return False


def finished_report(
    plan: Plan, workspace: Workspace, done: Mapping[str, TensorRecord], *, mending: bool
) -> tuple[Report, bytes] | None:
    """The report of an earlier run that this one has nothing to add to, and its text.

    Args:
        mending: sidecars, too, are to be what the report has.
    """
    out = workspace.out
    whole = all(shard.sealed for shard in workspace.shards)
    whole = whole and all((out / name).exists() for name in sidecars(plan.ft)) and _index_is_whole(plan, out)
    if not whole or len(done) < len(plan.tasks):
        return None
    try:
        text = wholefile.read_whole(out / REPORT_NAME)
        report = decoded(text, Report)
    except (InputError, msgspec.MsgspecError):
        return None
    if not is_as_written(text, report) or any(report.tensors.get(name) != record for name, record in done.items()):
        return None
    if mending and any(not _has(out / restored(name), digest) for name, digest in report.sidecar_digests.items()):
        return None
    return report, text


def _has(path: Path, digest: str) -> bool:
    """Whether a file's bytes have a digest; one that cannot be read has none."""
    try:
        return digest_file(path) == digest
    except InputError:
        return False


def other_sidecars(plan: Plan, out: Path) -> Iterator[str]:
    """What a person should know of a finished result's sidecars that are not FT's: changed here, or there since.

    They are left: who changed them here meant it.

    Raises:
        InputError: one of FT's cannot be read.
    """
    if names := differing(plan.ft, out, dtype=stated_dtype(plan)):
        listed = ", ".join(shown_path(out / name) for name in names[:_LISTED])
        yield f"no copies of FT's: {listed}: to have FT's, remove them and run the same command again"


def _index_is_whole(plan: Plan, out: Path) -> bool:
    if plan.ft.index_name is None:
        return True
    try:
        return wholefile.read_whole(out / plan.ft.index_name) == shard_index(plan)
    except InputError:
        return False
