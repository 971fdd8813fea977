"""The records that cross a file: the report `streamrepair.json`, the journal's lines, and a run's fingerprint.

docs/formats.md describes the report for those who read it.

Field names shared with dghard's report mean the same here. All numbers are checked to be finite before they are
written: JSON has no NaN.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Literal, TypeVar, get_args, get_type_hints
from urllib.parse import quote_from_bytes, unquote_to_bytes

import msgspec

from streamrepair.errors import NumericalError, UsageError, shown

REPORT_FORMAT = "streamrepair.report/1"
REPORT_NAME = "streamrepair.json"
STATE = ".streamrepair"
"""Folder in OUT of what a run needs to be continued."""

_LARGEST_SCALE = 1e100  # its square, times that of a noise level, is still a number
_MTIME_NS = re.compile(r", mtime (-?\d+),")  # in what `identity` says

Action = Literal["repaired", "copied", "kept_ft", "dropped"]
Record = TypeVar("Record")


def storable(path: str) -> str:
    """A path as it stands in a file; one that is not UTF-8, or begins like it, as a file: URI of its bytes."""
    try:
        path.encode()
        plain = not path.startswith("file:")
    except UnicodeEncodeError:
        plain = False
    return path if plain else "file:" + quote_from_bytes(os.fsencode(path))


def restored(text: str) -> str:
    """The path that `storable` made the text of."""
    return os.fsdecode(unquote_to_bytes(text.removeprefix("file:"))) if text.startswith("file:") else text


def decoded(content: bytes, kind: type[Record]) -> Record:
    """The record that JSON holds.

    Raises:
        msgspec.MsgspecError: it holds none, whichever way it is broken: msgspec lets text that is no UTF-8 and deep
            nesting through as errors of Python's own.
    """
    try:
        return msgspec.json.decode(content, type=kind)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error


class TensorRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What was done with one tensor."""

    action: Action
    """repaired; copied (Δ = 0); kept_ft (passed through from FT); dropped (only BASE has it)."""
    reason: str
    """Why it is not repaired; "" if it is."""
    shape: tuple[int, ...]
    dtype: str
    """Dtype in the output (in BASE for a dropped one)."""
    rank_total: int | None = None
    """Singular values of Δ: its shorter side."""
    rank_kept: int | None = None
    """Those of them above τ."""
    sigma_hat: float | None = None
    """Noise level in the fused scale σ·√max(m, n)."""
    threshold: float | None = None
    """τ."""
    frob_delta_in: float | None = None
    """‖Δ‖_F."""
    frob_delta_out: float | None = None
    """‖Δ*‖_F, before rounding."""
    rounding_loss: float | None = None
    """‖round(W_base + Δ*) − (W_base + Δ*)‖_F / ‖Δ*‖_F: what the output dtype cannot hold of the delta."""
    nearest_sigma_gap: float | None = None
    """Smallest |s/τ − 1|; null where there is no τ."""
    undecidable: int | None = None
    """Singular values so near τ that rounding decides their side."""
    threshold_interval: tuple[float, float] | None = None
    """Of τ, with `--noise-estimate fast` where the noise level was estimated and not computed; else null."""
    within_interval: int | None = None
    """Singular values in that interval: the kept rank may be off by as many."""
    backend: str | None = None
    """What decided, and in which precision: gram-float32, randomized-float64, rows, row-space, full, …"""
    climbed: tuple[str, ...] = ()
    """Why cheaper backends were left."""
    seconds: float = 0.0
    """Of its work, reading and writing included; of a batch's decision its share."""
    digest: str | None = None
    """XXH3-128 of the tensor's bytes in the output, as "xxh3-128:…"; null for a dropped one."""
    warnings: tuple[str, ...] = ()
    """What was said of it while it was done."""
    paired_with: str | None = None
    """BASE's tensor, where its name is another: FT's is a copy of FT's tensor of that name."""

    def check_finite(self, name: str) -> None:
        """Refuse to let NaN or infinity into a file.

        Raises:
            NumericalError: a field is not finite.
        """
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if isinstance(value, float) and not math.isfinite(value):
                raise NumericalError(f"tensor {shown(name)}: {field} is {value}, expected a finite number")


class JournalEntry(msgspec.Struct, frozen=True):
    """A line of the journal."""

    name: str
    shard: str
    record: TensorRecord


class CheckpointSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One input, as it was read."""

    given: str
    path: str
    """Both as `storable` writes them."""
    shards: tuple[str, ...]
    tensors: int
    bytes: int
    header_digest: str
    """SHA-256 over the header digests of all shards, as "sha256:…"."""
    unindexed: tuple[str, ...] = ()
    """Tensors in shards that the index does not list: ignored when read, carried along when written."""
    stray_files: tuple[str, ...] = ()
    """Other weight files in the folder: ignored."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The options that decide the numbers."""

    sigma: Literal["median", "tail"] = "median"
    scale: float = 1.0
    include: str | None = None
    exclude: str | None = None
    out_dtype: Literal["same", "float32"] = "same"
    backend: Literal["auto", "full", "gram", "randomized"] = "auto"
    noise_estimate: Literal["exact", "fast"] = "exact"
    on_nonfinite: Literal["refuse", "copy-ft"] = "refuse"

    def check(self) -> None:
        """Refuse values that mean nothing: whoever calls from Python may pass any.

        Raises:
            UsageError: an option has no meaning.
        """
        for name, kind in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), get_args(kind)
            option = f"--{name.replace('_', '-')}"
            if isinstance(value, str) and type(value) is not str:  # NumPy's, which JSON cannot hold
                raise UsageError(f"{option} is {shown(repr(value))}, expected a plain str")
            if kind is float:
                number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
                if not 0.0 < number <= _LARGEST_SCALE:
                    more = f" of at most {_LARGEST_SCALE:g}" if number > 0.0 else ""
                    raise UsageError(f"{option} is {shown(repr(value))}, expected a positive number{more}")
            elif str in choices:
                if not isinstance(value, str | None):
                    raise UsageError(f"{option} is {shown(repr(value))}, expected a regular expression as text")
            elif value not in choices:
                raise UsageError(f"{option} is {shown(repr(value))}, expected {' or '.join(map(str, choices))}")


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """Memory allowed, projected and measured, in bytes; VRAM figures are per GPU, null without one.

    Measured is the highest of all sessions; allowed and projected are the last one's.
    """

    ram_allowed_bytes: int
    ram_projected_bytes: int
    ram_measured_bytes: int
    vram_allowed_bytes: int | None = None
    vram_projected_bytes: int | None = None
    vram_measured_bytes: int | None = None


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds and bytes of all sessions; read, decompose and write are summed over workers, and may exceed `wall_s`."""

    wall_s: float
    read_s: float
    decompose_s: float
    write_s: float
    bytes_read: int
    bytes_written: int
    cpu_s: float = 0.0
    """Processor seconds of the whole process: over `wall_s` times the processors, the share that was busy."""


class ResourceUse(msgspec.Struct, frozen=True, kw_only=True):
    """One worker's wall time ("cpu 0", "cuda:1"), or that in which any file was read, written or synced ("files")."""

    name: str
    busy_s: float
    """Computing, for others too; for files, at work."""
    waiting_s: dict[str, float]
    """Waiting for what: read, write (its own writes, and a disk that is behind), memory."""
    idle_s: float
    """Without a task: before the first, after the last."""


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """What one start of the command did for a result."""

    timings: Timings
    ram_measured_bytes: int
    vram_measured_bytes: int | None = None
    warnings: tuple[str, ...] = ()
    """Of no tensor that it did: damage that it found."""
    utilisation: tuple[ResourceUse, ...] = ()
    """Each worker, then the files."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The whole of `streamrepair.json`."""

    format: str = REPORT_FORMAT
    version: str
    base: CheckpointSummary
    ft: CheckpointSummary
    settings: Settings
    device: str
    workers: int
    budget: Budget
    timings: Timings
    sessions: int = 1
    """How often the command was started for this result; more than once after an interruption or damage.

    A start that ended before its first commit is not counted.
    """
    utilisation: tuple[ResourceUse, ...] = ()
    """Each worker, then the files, over all sessions; one that had fewer workers counts for those that it had."""
    sidecars: tuple[str, ...]
    """Files copied from FT beside the weights."""
    sidecar_digests: dict[str, str] = {}
    """File → XXH3-128 of the copy, as "xxh3-128:…"; none in reports of earlier versions."""
    headers: dict[str, str]
    """Shard → SHA-256 of its header in OUT, the length before it included: hexadecimal digits without a prefix."""
    index_digest: str | None = None
    """XXH3-128 of the index, as "xxh3-128:…"; null without one, and in reports of earlier versions."""
    warnings: tuple[str, ...]
    tensors: dict[str, TensorRecord]
    report_digest: str | None = None
    """XXH3-128 of all else that the file says, however it is laid out, as "xxh3-128:…".

    It comes last, and is null in reports of earlier versions.
    """


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True):
    """What a run must find unchanged to go on with an earlier one's work."""

    version: str
    base: dict[str, str]
    """Shard path → size, mtime and header digest."""
    ft: dict[str, str]
    settings: Settings
    device: str = ""
    """Where the run began to compute; another one may go on, with a warning. "" in runs that did not note it."""
    processor: str = ""
    """Of what kind the processor was, likewise: BLAS adds up differently on another."""

    def elsewhere(self, other: Fingerprint) -> list[tuple[str, str]]:
        """Where `other` computed, and where this does, if that differs as far as `other` noted it."""
        places = ((other.device, self.device), (other.processor, self.processor))
        return [(before, now) for before, now in places if before not in ("", now)]

    def differences(self, other: Fingerprint) -> list[str]:
        """What changed from `other` to this, in words; empty if nothing did."""
        found = []
        if self.version != other.version:
            found.append(f"streamrepair was {other.version}, is {self.version}")
        for field in self.settings.__struct_fields__:
            before, now = getattr(other.settings, field), getattr(self.settings, field)
            if before != now:
                before, now = ("not given" if value is None else value for value in (before, now))
                found.append(f"--{field.replace('_', '-')} was {before}, is {now}")
        for side, before_files, now_files in (("BASE", other.base, self.base), ("FT", other.ft, self.ft)):
            if _times_tell(before_files) and _by_name(before_files) == _by_name(now_files):
                continue  # moved, or mounted elsewhere
            changed = sorted(
                p for p in before_files.keys() | now_files.keys() if before_files.get(p) != now_files.get(p)
            )
            for p in changed[:3]:
                before, now = (files.get(p, "none of its files") for files in (before_files, now_files))
                found.append(f"{side} file {shown(p)} was {before}, is {now}")
            if len(changed) > 3:
                found.append(f"and {len(changed) - 3} more files of {side}")
        return found


def identity(*, file_bytes: int, mtime_ns: int, header_digest: str) -> str:
    """What tells a file from others of its name, in words."""
    return f"{file_bytes} bytes, mtime {mtime_ns}, header {header_digest[:16]}"


def _times_tell(files: Mapping[str, str]) -> bool:
    """Whether files have times that others of their name, size and header hardly have: no whole seconds.

    In images, in archives and on coarse file systems a checkpoint and another of its architecture may have the same.
    """
    found = [_MTIME_NS.search(text) for text in files.values()]
    return all(time is not None and int(time[1]) % 10**9 != 0 for time in found)


def _by_name(files: Mapping[str, str]) -> list[tuple[str, str]]:
    """Names without folders, and identities."""
    return sorted((path.rpartition("/")[2], text) for path, text in files.items())
