"""`verify`: whether OUT is whole and is what its report says it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from streamrepair.checkpoint import osfile
from streamrepair.checkpoint.headers import ShardHeader
from streamrepair.checkpoint.layout import Checkpoint, open_checkpoint
from streamrepair.checkpoint.write import digest_range
from streamrepair.errors import DamageError, InputError, shown
from streamrepair.report import REPORT_FORMAT, REPORT_NAME, Report

_READERS = 2


class Damage(msgspec.Struct, frozen=True):
    """One thing that is not as it should be."""

    where: str
    """Tensor or file."""
    what: str


class DeepCheck(msgspec.Struct, frozen=True, kw_only=True):
    """A repaired tensor against a float64 SVD of its delta."""

    name: str
    rank_kept: int
    rank_exact: int
    correctly_rounded: float
    """Share of output values that are the float64 result rounded to nearest."""
    largest_ulp: float
    """Largest distance from the float64 result, in units in the last place of the larger of value and correction."""


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What `verify` found."""

    tensors: int
    bytes: int
    seconds: float
    damage: tuple[Damage, ...]
    """Empty if OUT is whole."""
    deep: tuple[DeepCheck, ...] = ()


def verify(out: Path, *, deep: bool = False, sample: int = 5) -> Verified:
    """Check structure, completeness and digests of OUT; with `deep`, recompute `sample` tensors in float64.

    Raises:
        DamageError: OUT holds no finished result at all.
        InputError: with `deep`, BASE or FT cannot be read or has changed.
    """
    began = time.perf_counter()
    report = read_report(out)
    try:
        checkpoint = open_checkpoint(str(out), side="OUT")
    except InputError as error:
        return Verified(tensors=0, bytes=0, seconds=time.perf_counter() - began, damage=(Damage(str(out), str(error)),))
    damage = [*_structure(out, report, checkpoint), *_digests(report, checkpoint)]
    checks: tuple[DeepCheck, ...] = ()
    if deep:
        from streamrepair.deep import recompute

        checks = recompute(report, checkpoint, sample)
        damage += [
            Damage(check.name, f"rank {check.rank_kept}, a float64 SVD keeps {check.rank_exact}")
            for check in checks
            if check.rank_kept != check.rank_exact
        ]
    return Verified(
        tensors=len(checkpoint.tensors),
        bytes=checkpoint.total_bytes,
        seconds=time.perf_counter() - began,
        damage=tuple(damage),
        deep=checks,
    )


def read_report(out: Path) -> Report:
    """OUT's report.

    Raises:
        DamageError: there is none, or it is not one.
    """
    path = out / REPORT_NAME
    try:
        if not path.exists():
            raise DamageError(
                f"{shown(str(path))}: missing: OUT is not a result, or its run has not finished: run the repair again"
            )
        report = msgspec.json.decode(osfile.read_whole(path), type=Report)
    except (InputError, msgspec.MsgspecError) as error:
        raise DamageError(f"{shown(str(path))}: unreadable ({error}): run the repair again with --overwrite") from error
    if report.format != REPORT_FORMAT:
        raise DamageError(f"{shown(str(path))}: format {shown(report.format)}, expected {REPORT_FORMAT}")
    return report


def _structure(out: Path, report: Report, checkpoint: Checkpoint) -> Iterator[Damage]:
    expected = {name: record for name, record in report.tensors.items() if record.action != "dropped"}
    written = {entry.name: entry for shard in checkpoint.shards for entry in shard.tensors}
    headers = {shard.path.name: shard.digest for shard in checkpoint.shards}
    for name in sorted(report.headers.keys() - headers.keys()):
        yield Damage(name, "a shard of the result, now missing")
    for name in sorted(headers):
        if headers[name] != report.headers.get(name):
            yield Damage(name, "its header is not the one that was written")
    for name in sorted(expected.keys() - written.keys()):
        yield Damage(name, "in the report, but in no shard")
    for name in sorted(written.keys() - expected.keys()):
        yield Damage(name, "in a shard, but not in the report")
    for name in sorted(expected.keys() & written.keys()):
        record, entry = expected[name], written[name]
        if (record.shape, record.dtype) != (entry.shape, entry.dtype):
            yield Damage(name, f"{entry.dtype} {list(entry.shape)}, the report has {record.dtype} {list(record.shape)}")
        if record.digest is None:
            yield Damage(name, "the report has no digest of it")
    for stray in checkpoint.stray_files:
        yield Damage(stray, "a weights file that is not part of the result; loaders may pick it up")
    for sidecar in report.sidecars:
        if not (out / sidecar).is_file():
            yield Damage(sidecar, "copied from FT by the run, now missing")


def _digests(report: Report, checkpoint: Checkpoint) -> list[Damage]:
    """Tensors whose bytes differ from the report's digests; shards are read in parallel pieces at disk speed."""
    jobs = [
        (shard, entry.name, entry.start, entry.nbytes)
        for shard in checkpoint.shards
        for entry in shard.tensors
        if entry.name in report.tensors and report.tensors[entry.name].digest is not None
    ]

    def check(job: tuple[ShardHeader, str, int, int]) -> Damage | None:
        shard, name, start, nbytes = job
        fd = osfile.open_input(shard.path)
        try:
            found = digest_range(fd, start, nbytes, shard.path)
        except InputError as error:
            return Damage(name, str(error))
        finally:
            osfile.close(fd)
        expected = report.tensors[name].digest
        return None if found == expected else Damage(name, f"digest {found}, the report has {expected}")

    with ThreadPoolExecutor(_READERS) as pool:
        return [damage for damage in pool.map(check, jobs) if damage is not None]
