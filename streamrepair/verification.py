"""`verify`: whether OUT is whole and is what its report says it is.

Every shard is looked at by itself, so that one that is broken does not hide what is wrong with the others. `deep` holds
numbers against the inputs, `mend` puts right what is found here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import msgspec

from streamrepair.checkpoint import osfile, wholefile
from streamrepair.checkpoint.headers import ShardHeader, read_header
from streamrepair.checkpoint.layout import Checkpoint, joined_digest, open_checkpoint
from streamrepair.checkpoint.write import digest_file, digest_range
from streamrepair.engine.statement import is_as_written
from streamrepair.errors import DamageError, InputError, shown
from streamrepair.report import REPORT_FORMAT, REPORT_NAME, Report, TensorRecord, decoded, restored

_READERS = 2
_LOADED = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "*.gguf", "adapter_config.json")
"""Files of OUT's own folder that some loader takes for weights, or for a reason to look for some."""


STRAY = "a weights file that is not part of the result; loaders may pick it up"
"""What nothing of ours can put right."""


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
    """Share of output values that are the float64 result rounded to nearest, or within 1e-5 of rms(Δ*) of it."""
    largest_ulp: float
    """Largest distance from the float64 result, in units in the last place of the larger of value and correction."""
    delta_error: float
    """‖W_out − W_exact‖_F beyond what rounding to the output's dtype may do, over ‖Δ*‖_F; 0 if there is none."""
    fault: str | None = None
    """What disagrees; None if the two agree."""


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What `verify` found."""

    format: str = "streamrepair.verified/1"
    tensors: int
    bytes: int
    seconds: float
    damage: tuple[Damage, ...]
    """Empty if OUT is whole."""
    deep: tuple[DeepCheck, ...] = ()
    mended: tuple[Damage, ...] = ()
    """What was found first and has been put right since, with --repair."""


def verify(out: Path, *, deep: bool = False, sample: int = 5) -> Verified:
    """Check structure, completeness and digests of OUT; with `deep`, recompute `sample` tensors in float64.

    Raises:
        DamageError: OUT holds no finished result at all.
        InputError: with `deep`, BASE or FT cannot be read or has changed.
    """
    began = time.perf_counter()
    report, as_written = read_report(out)
    shards, damage = _shards(out, report)
    damage += [] if as_written else [Damage(REPORT_NAME, "not as it was written: edited since, or damaged")]
    damage += [*_structure(report, shards), *_records(report), *_beside(out, report)]
    checkpoint = None if damage else _indexed(out, damage)
    damage += [*_digests(report, shards), *_index_digest(out, report), *_sidecar_digests(out, report)]
    checks: tuple[DeepCheck, ...] = ()
    if deep and checkpoint is not None:
        from streamrepair.deep import recompute

        checks = recompute(report, checkpoint, sample)
        damage += [Damage(check.name, check.fault) for check in checks if check.fault is not None]
    return Verified(
        tensors=sum(len(shard.tensors) for shard in shards),
        bytes=sum(shard.file_bytes for shard in shards),
        seconds=time.perf_counter() - began,
        damage=tuple(damage),
        deep=checks,
    )


def read_report(out: Path) -> tuple[Report, bool]:
    """OUT's report, and whether it is what the run wrote.

    Raises:
        DamageError: there is none, or it is not one.
    """
    path = out / REPORT_NAME
    try:
        if not path.exists():
            raise DamageError(
                f"{shown(str(path))}: missing: OUT is not a result, or its run has not finished: run the repair again"
            )
        text = wholefile.read_whole(path)
        report = decoded(text, Report)
    except OSError as error:
        raise DamageError(
            f"{shown(str(path))}: cannot be looked up ({error.strerror}): check OUT's name and mode"
        ) from error
    except (InputError, msgspec.MsgspecError) as error:
        raise DamageError(f"{shown(str(path))}: unreadable ({error}): run the repair again") from error
    if report.format != REPORT_FORMAT:
        raise DamageError(f"{shown(str(path))}: format {shown(report.format)}, expected {REPORT_FORMAT}")
    return report, is_as_written(text, report)


def _shards(out: Path, report: Report) -> tuple[list[ShardHeader], list[Damage]]:
    """The headers of the result's shards, and what is wrong with those that cannot be read."""
    found: list[ShardHeader] = []
    damage: list[Damage] = []
    for name in sorted(report.headers):
        path = out / name
        if Path(name).name != name:
            damage.append(Damage(name, "no plain file name, though the report has it for a shard"))
        elif not path.exists():
            damage.append(Damage(name, "a shard of the result, now missing"))
        elif path.is_symlink():
            damage.append(Damage(name, "a symbolic link, expected the file that was written"))
        else:
            try:
                found.append(read_header(path))
            except InputError as error:
                damage.append(Damage(name, error.finding))  # without advice for an input
    return found, damage


def _structure(report: Report, shards: list[ShardHeader]) -> Iterator[Damage]:
    """Headers against the report; tensors of shards that could not be read are not named one by one."""
    expected = {name: record for name, record in report.tensors.items() if record.action != "dropped"}
    written = {entry.name: entry for shard in shards for entry in shard.tensors}
    for shard in shards:
        if shard.digest != report.headers[shard.path.name]:
            yield Damage(shard.path.name, "its header is not the one that was written")
    if len(shards) == len(report.headers):
        for name in sorted(expected.keys() - written.keys()):
            yield Damage(name, "in the report, but in no shard")
    for name in sorted(written.keys() - expected.keys()):
        yield Damage(name, "in a shard, but not in the report")
    for name in sorted(expected.keys() & written.keys()):
        record, entry = expected[name], written[name]
        if (record.shape, record.dtype) != (entry.shape, entry.dtype):
            yield Damage(name, f"{entry.dtype} {list(entry.shape)}, the report has {record.dtype} {list(record.shape)}")


def _records(report: Report) -> Iterator[Damage]:
    """Whether the report agrees with itself, and lists what FT had."""
    if report.headers.keys() != set(report.ft.shards):
        yield Damage(REPORT_NAME, "its list of shards is not that of FT")
    elif report.settings.out_dtype == "same" and report.ft.header_digest != joined_digest(
        report.headers[name] for name in report.ft.shards
    ):
        # FT's headers are written byte for byte: their digests are FT's, or the tensor set is not FT's.
        yield Damage(REPORT_NAME, "its headers' digests are not those of FT")
    for name, record in report.tensors.items():
        if record.action != "dropped" and (what := _record_fault(record)):
            yield Damage(name, f"the report {what}")


def _record_fault(record: TensorRecord) -> str | None:
    if record.digest is None:
        return "has no digest of it"
    if record.action != "repaired":
        return None
    kept, total = record.rank_kept, record.rank_total
    if kept is None or total is None or total != min(record.shape, default=0) or not 0 <= kept <= total:
        return f"has a rank of {kept} of {total} for shape {list(record.shape)}"
    return None


def _beside(out: Path, report: Report) -> Iterator[Damage]:
    indices = []
    try:
        names = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    except OSError as error:
        yield Damage(str(out), f"cannot be listed ({error.strerror}): check its mode")
        return
    for name in names:
        if name.endswith(".safetensors.index.json"):
            indices.append(name)
        elif name not in report.headers and any(fnmatchcase(name, pattern) for pattern in _LOADED):
            yield Damage(name, STRAY)
    if len(report.headers) > 1 and not indices:
        yield Damage("*.safetensors.index.json", f"there is no index of the {len(report.headers)} shards")
    for name in indices[1:]:
        yield Damage(name, f"an index beside {indices[0]}, of which one is not part of the result")
    for sidecar in report.sidecars:
        if not (out / restored(sidecar)).is_file():
            yield Damage(sidecar, "copied from FT by the run, now missing")


def _indexed(out: Path, damage: list[Damage]) -> Checkpoint | None:
    """OUT as loaders see it; None, and the reason among the damage, if they could not read it."""
    try:
        return open_checkpoint(str(out), side="OUT")
    except InputError as error:
        damage.append(Damage(str(out), error.finding))  # without advice for an input
        return None


def _digests(report: Report, shards: list[ShardHeader]) -> list[Damage]:
    """Tensors whose bytes differ from the report's digests; tensors are read side by side, at disk speed."""
    jobs = [
        (shard, entry.name, entry.start, entry.nbytes)
        for shard in shards
        for entry in shard.tensors
        if entry.name in report.tensors and report.tensors[entry.name].digest is not None
    ]

    def check(job: tuple[ShardHeader, str, int, int]) -> list[Damage]:
        shard, name, start, nbytes = job

        def digest() -> str:
            with osfile.opened_input(shard.path) as (fd, _):
                return digest_range(fd, start, nbytes, shard.path)

        return list(_differing(name, report.tensors[name].digest, digest))

    with ThreadPoolExecutor(_READERS) as pool:
        return [damage for found in pool.map(check, jobs) for damage in found]


def _index_digest(out: Path, report: Report) -> Iterator[Damage]:
    """Its metadata, too, which nothing else covers."""
    indices = list(out.glob("*.safetensors.index.json"))
    if report.index_digest is not None and len(indices) == 1:
        yield from _differing(indices[0].name, report.index_digest, partial(digest_file, indices[0]))


def _sidecar_digests(out: Path, report: Report) -> Iterator[Damage]:
    for name, expected in report.sidecar_digests.items():
        path = out / restored(name)
        if path.is_file():
            yield from _differing(name, expected, partial(digest_file, path))


def _differing(where: str, expected: str | None, digest: Callable[[], str]) -> Iterator[Damage]:
    """What is wrong with bytes whose digest is to be the report's."""
    try:
        found = digest()
    except InputError as error:
        yield Damage(where, error.finding)  # without advice for an input
        return
    if found != expected:
        yield Damage(where, f"digest {found}, the report has {expected}")
