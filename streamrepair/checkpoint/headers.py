"""Reads and distrusts the header of one safetensors file: eight bytes of length N, N bytes of JSON, then the tensors.

Our own parser, because the safetensors library lets duplicate keys pass and maps the file into memory, where a file
that shrinks kills the process. The JSON is walked member by member rather than decoded whole: nothing nests deeper than
the format allows, duplicates are seen, and memory grows with the number of tensors, never by what a file claims.

`layout` puts several of these together into a checkpoint. No tensor's bytes are read here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from operator import attrgetter
from pathlib import Path

from streamrepair.checkpoint.osfile import opened_input, read_exactly
from streamrepair.errors import InputError, shown

ITEM_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}
"""Bits of one element of every dtype of the format; F4 and F6 share bytes between elements."""

LONGEST_JSON_BYTES = 100_000_000
"""Longest header or index that is read; the Hub's own limits are 25 MB and 10 MiB."""

_LARGEST = 2**63 - 1  # of a dimension, an element count, a bit count: what torch and pread can express
_SPACE = r"[ \t\n\r]*+"
_OPENED = re.compile(rf'\{{{_SPACE}(?:(\}})|(?="))')
_COLON = re.compile(rf"{_SPACE}:{_SPACE}")
_NEXT = re.compile(rf'{_SPACE}(?:(\}})|,{_SPACE}(?="))')
_COMMA = rf"{_SPACE},{_SPACE}"
_NUMBER = r"(?:0|[1-9][0-9]{0,18})"  # no sign, fraction or exponent
# An entry's three members in any order. A group keeps its match from an earlier round, so a member that comes twice
# leaves another's group empty. More than 64 dimensions fit neither torch nor numpy.
_ENTRY = re.compile(
    rf"""\{{{_SPACE}(?:"(?:dtype"{_SPACE}:{_SPACE}"([A-Za-z0-9_]{{0,64}})"
    |shape"{_SPACE}:{_SPACE}\[{_SPACE}((?:{_NUMBER}(?:{_COMMA}{_NUMBER}){{0,63}})?){_SPACE}\]
    |data_offsets"{_SPACE}:{_SPACE}\[{_SPACE}({_NUMBER}){_COMMA}({_NUMBER}){_SPACE}\]
    ){_SPACE}(?:,{_SPACE}(?=")|(?=\}}))){{3}}\}}""".replace("\n    ", "")
)
_NOT_DOWNLOADED = {
    b"version https://git-lfs": "a git-LFS pointer",
    b"<!doctype": "an HTML page",
    b"<html": "an HTML page",
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a shard, as the header describes it."""

    name: str  # hostile until `shown` has escaped it
    dtype: str  # a key of ITEM_BITS
    shape: tuple[int, ...]  # outermost dimension first; () for a scalar
    start: int  # offset of the first byte in the FILE, not in its data section
    nbytes: int  # 0 when a dimension is 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def item_bytes(self) -> int:
        """Bytes of one element, of a dtype whose elements share none."""
        return ITEM_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """A safetensors file whose header was read and whose tensors were found to tile it exactly."""

    path: Path  # as it was named, symlinks unresolved
    file_bytes: int  # size of the whole file when the header was read
    mtime_ns: int  # modification time then
    inode: int  # st_ino, which with `device` tells one file under two names
    device: int  # st_dev
    header_bytes: bytes = field(repr=False)  # the JSON as it lies there, padding included: a writer copies it verbatim
    data_start: int  # offset of the data section: 8 + len(header_bytes)
    metadata: Mapping[str, str]  # `__metadata__`, empty where there is none
    tensors: tuple[TensorEntry, ...] = field(repr=False)  # in the order of their bytes, not always that of the JSON

    @property
    def digest(self) -> str:
        """SHA-256 of the length and the header, in hex."""
        hashed = hashlib.sha256(len(self.header_bytes).to_bytes(8, "little"))
        hashed.update(self.header_bytes)
        return hashed.hexdigest()


def read_header(path: Path) -> ShardHeader:
    """The header of the safetensors file at `path`, checked against the format and the file's size.

    Raises:
        InputError: the file cannot be opened, is no regular file, or breaks the format in any way; FIFOs and devices
            are refused without waiting for them.
    """
    with opened_input(path) as (fd, status):
        header = _header_bytes(fd, status.st_size)
        data_start = 8 + len(header)
        metadata, entries = _parse(header, data_start)
        # Stable, and the same order as the library's: zero-size tensors come before the one that starts where they lie.
        entries.sort(key=attrgetter("start", "nbytes"))
        _check_tiling(entries, data_start, status.st_size)
        when, where = status.st_mtime_ns, (status.st_ino, status.st_dev)
        return ShardHeader(path, status.st_size, when, *where, header, data_start, metadata, tuple(entries))


def refuse_not_downloaded(start_of_file: bytes) -> None:
    """Refuses what commonly lies where a file should, told by its first bytes."""
    start = start_of_file.lstrip().lower()
    for signature, what in _NOT_DOWNLOADED.items():
        if start.startswith(signature):
            raise InputError(f"is {what}, the file itself was not downloaded", "run `git lfs pull` or `hf download`")


def malformed(problem: str) -> InputError:
    """The error for a file that breaks its format."""
    return InputError(problem, "download or export the file again")


def walk_object(text: str, at: int, member: Callable[[str, int], int], *, what: str) -> int:
    """Walks the JSON object that opens at `at`; `member` gets each key and its value's position and returns its end.

    Returns the position after the closing brace. Raises InputError for broken JSON and for a key that occurs twice.
    """
    seen: set[str] = set()
    step = _OPENED.match(text, at)
    while step is not None and step[1] is None:
        key, at = read_string(text, step.end(), what="a key")
        if key in seen:
            raise malformed(f"{what} has the key {shown(key)} twice")
        seen.add(key)
        colon = _COLON.match(text, at)
        if colon is None:
            raise malformed(f"{what} is broken JSON at character {at}: expected a colon")
        at = member(key, colon.end())
        step = _NEXT.match(text, at)
    if step is None:
        raise malformed(f"{what} is broken or cut JSON at character {at}: expected an object's next member or its end")
    return step.end()


def read_string(text: str, at: int, *, what: str) -> tuple[str, int]:
    """The JSON string at `at` and the position after it. Raises InputError where there is none, or half a surrogate."""
    if not text.startswith('"', at):
        raise malformed(f"{what} at character {at} is not a string")
    try:
        value, end = _STRINGS.raw_decode(text, at)
        if not value.isascii():
            value.encode("utf-8")  # \ud800 alone is JSON but no text: it could be neither printed nor written
    except ValueError as error:
        raise malformed(f"{what} at character {at} is not a valid JSON string") from error
    return value, end


_STRINGS = json.JSONDecoder()


def _header_bytes(fd: int, file_bytes: int) -> bytes:
    """The JSON's bytes; its length is held against the cap and the file before anything is allocated."""
    start = read_exactly(fd, min(64, file_bytes), 0)
    refuse_not_downloaded(start)
    if file_bytes < 8:
        raise malformed(f"is {file_bytes} bytes long, a safetensors file has at least 8")
    length = int.from_bytes(start[:8], "little")
    if length > LONGEST_JSON_BYTES:
        raise malformed(f"has a header of {length} bytes, at most {LONGEST_JSON_BYTES} are allowed")
    if length > file_bytes - 8:
        raise malformed(f"has a header of {length} bytes, but only {file_bytes - 8} bytes follow its length")
    if start[8:9] != b"{" or length == 0:
        raise malformed(f"has a header of {length} bytes that does not begin with '{{'")
    return read_exactly(fd, length, 8)


def _parse(header: bytes, data_start: int) -> tuple[dict[str, str], list[TensorEntry]]:
    """Metadata, and the tensors in the order of the JSON."""
    try:
        text = header.decode("utf-8")
    except UnicodeDecodeError as error:
        raise malformed(f"the header is not UTF-8 at its byte {error.start}") from error
    metadata: dict[str, str] = {}
    entries: list[TensorEntry] = []

    def metadata_member(key: str, at: int) -> int:
        metadata[key], end = read_string(text, at, what=f"metadata {shown(key)}")
        return end

    def header_member(key: str, at: int) -> int:
        if key == "__metadata__":
            return walk_object(text, at, metadata_member, what="__metadata__")
        entry, end = _read_entry(key, text, at, data_start)
        entries.append(entry)
        return end

    end = walk_object(text, 0, header_member, what="the header")
    if text[end:].strip(" \t\n\r"):
        raise malformed(f"the header has more than padding after its end at character {end}")
    return metadata, entries


def _read_entry(name: str, text: str, at: int, data_start: int) -> tuple[TensorEntry, int]:
    """The tensor entry at `at`, checked by itself, and the position after it."""
    found = _ENTRY.match(text, at)
    if found is None or None in (groups := found.groups()):
        raise malformed(
            f"tensor {shown(name)}: its entry is {shown(text[at : at + 150])}, expected dtype, shape and data_offsets "
            "once each and no more, shape and data_offsets of whole numbers"
        )
    dtype, sizes, begin, end = groups
    shape = tuple(map(int, sizes.split(","))) if sizes else ()
    start, nbytes = int(begin), int(end) - int(begin)
    if nbytes < 0:
        raise malformed(f"tensor {shown(name)}: data_offsets [{begin}, {end}] run backwards")
    if dtype not in ITEM_BITS:
        raise malformed(f"tensor {shown(name)}: dtype is {shown(dtype)}, expected one of {', '.join(ITEM_BITS)}")
    bits = _bits(name, dtype, shape)
    if bits != nbytes * 8:
        what = f"{dtype} {list(shape)} takes {bits} bits"
        raise malformed(f"tensor {shown(name)}: data_offsets span {nbytes * 8} bits, {what}")
    return TensorEntry(name, dtype, shape, data_start + start, nbytes), found.end()


def _bits(name: str, dtype: str, shape: tuple[int, ...]) -> int:
    bits = ITEM_BITS[dtype]
    for size in shape:
        bits *= size
        # At each step: a zero further on does not excuse an overflow before it (the library multiplies so, too).
        if max(bits, size) > _LARGEST:
            raise malformed(f"tensor {shown(name)}: {dtype} {list(shape)} is more bits than 64 bits can count")
    return bits


def _check_tiling(entries: list[TensorEntry], data_start: int, file_bytes: int) -> None:
    """Tensors in offset order must cover the data section: no hole, no overlap, nothing left over."""
    end = data_start
    for i, entry in enumerate(entries):
        if entry.start != end:
            before = f"tensor {shown(entries[i - 1].name)}" if i else "the header"
            fault = "overlaps it" if entry.start < end else "leaves a hole"
            where = f"starts at byte {entry.start}, {before} ends at {end}"
            raise malformed(f"tensor {shown(entry.name)}: {where}: it {fault}")
        end = entry.start + entry.nbytes
    if end != file_bytes:
        fault = "it was cut" if end > file_bytes else f"{file_bytes - end} bytes trail"
        raise malformed(f"is {file_bytes} bytes long, its last tensor ends at byte {end}: {fault}")
