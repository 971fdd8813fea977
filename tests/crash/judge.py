"""What must be true of OUT after a fault, and again after the same command: one judge for every kind of fault.

Files are read here without the package, but for the journal's record type.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import xxhash

from streamrepair import api
from streamrepair.engine import commit
from streamrepair.report import JournalEntry, Report, TensorRecord
from tests.pairs import Pair, shard_bytes


@contextlib.contextmanager
def every_tensor_committed() -> Iterator[None]:
    """Tensors are committed as soon as they are done: short runs then have commits to be hit between."""
    before, commit._EVERY_S = commit._EVERY_S, 0.0
    try:
        yield
    finally:
        commit._EVERY_S = before


@dataclass(frozen=True)
class Undisturbed:
    """A pair, and what a run without faults makes of it."""

    pair: Pair
    shards: dict[str, bytes]
    """Shards and index, by name."""
    names: frozenset[str]
    """Every file of OUT, state left out."""
    grouped: bool = False
    """Whether tensors are committed together, as in real runs, and not one by one: other moments to be hit at."""

    def repair(self, out: Path) -> Report:
        """The command whose runs are disturbed; one worker, so that its operations come in one order."""
        with contextlib.nullcontext() if self.grouped else every_tensor_committed():
            return api.repair(self.pair.base, self.pair.ft, out, workers=1)


def undisturbed(pair: Pair, out: Path) -> Undisturbed:
    """Make the reference."""
    api.repair(pair.base, pair.ft, out)
    names = frozenset(p.name for p in out.iterdir() if p.name != ".streamrepair")
    return Undisturbed(pair, shard_bytes(out), names)


def judge_fault(reference: Undisturbed, out: Path) -> dict[str, TensorRecord]:
    """Check what a fault left; returns the journalled records.

    A final name has the final bytes; the report is there only if all else is; a record is there only if its bytes are.
    """
    for path in out.glob("*.safetensors"):
        assert path.read_bytes() == reference.shards[path.name], f"{path.name} has wrong bytes under its final name"
    if (out / "streamrepair.json").exists():
        there = {p.name for p in out.iterdir()}
        assert reference.names <= there, f"a report, but no {sorted(reference.names - there)}"
        json.loads((out / "streamrepair.json").read_text())
    records = journalled(out)
    for shard, names in records.items():
        content = _shard(out, shard)
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        for name, record in names.items():
            begin, end = header[name]["data_offsets"]
            digest = "xxh3-128:" + xxhash.xxh3_128_hexdigest(content[start + begin : start + end])
            assert digest == record.digest, f"{name} is recorded, its bytes are not on the disk"
    return {name: record for names in records.values() for name, record in names.items()}


def judge_resumed(reference: Undisturbed, out: Path, finished: dict[str, TensorRecord], report: Report) -> None:
    """Check a result that the same command finished: the undisturbed bytes, `finished` not computed again."""
    assert shard_bytes(out) == reference.shards
    assert {p.name for p in out.iterdir()} - {".streamrepair"} == reference.names
    assert not (out / ".streamrepair" / "partial").exists()
    for name, record in finished.items():
        assert report.tensors[name] == record, f"{name} was finished and was computed again"
    assert not report.warnings


def journalled(out: Path) -> dict[str, dict[str, TensorRecord]]:
    """Shard → name → record, of a journal's lines up to the first that is torn."""
    found: dict[str, dict[str, TensorRecord]] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (out / ".streamrepair" / "journal").read_bytes().split(b"\n")[:-1]:
            digest, _, text = line.partition(b" ")
            if xxhash.xxh3_64_hexdigest(text).encode() != digest:
                break  # a group that was not synced, torn
            if not text.isdigit():  # else a mark
                entry = msgspec.json.decode(text, type=JournalEntry)
                found.setdefault(entry.shard, {})[entry.name] = entry.record
    return found


def _shard(out: Path, name: str) -> bytes:
    partial = out / ".streamrepair" / "partial" / f"{name}.partial"
    assert partial.exists() or (out / name).exists(), f"records of {name}, but no such shard"
    return (partial if partial.exists() else out / name).read_bytes()
