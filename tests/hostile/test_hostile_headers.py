"""Every hostile header and index is refused in one printable line that names side and file, and never hangs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from streamrepair.checkpoint.headers import LONGEST_JSON_BYTES
from streamrepair.checkpoint.layout import open_checkpoint
from streamrepair.errors import InputError
from tests.builders import entry, write_file, write_index, write_safetensors, write_sharded

pytestmark = pytest.mark.timeout(30)

T = entry("U8", [4], 0, 4)
DATA = bytes(4)


@pytest.fixture(params=["BASE", "FT"])
def side(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _refusal(path: Path, side: str) -> str:
    """The message with which `path` is refused on `side`, once its form is seen to be right."""
    with pytest.raises(InputError) as caught:
        open_checkpoint(path, side=side)
    message = str(caught.value)
    assert caught.value.exit_status == 3
    assert message.startswith(f"{side}: ")
    assert message.isprintable()
    assert ";" in message  # what to do follows it
    return message


def _with(**changes: object) -> dict[str, object]:
    """A header whose one tensor "t" is sound but for `changes`."""
    return {"t": {**T, **changes}}


FILES: dict[str, tuple[bytes, str]] = {
    **{f"{n} bytes": (b"\2\0\0\0\0\0\0\0"[:n], "at least 8") for n in range(8)},
    "N = 0": (bytes(16), "header of 0 bytes"),
    "N over the cap": ((LONGEST_JSON_BYTES + 1).to_bytes(8, "little") + b"{}", "at most 100000000"),
    "N = 2^63": ((2**63).to_bytes(8, "little") + b"{}", "at most 100000000"),
    "N = 2^64 - 1": (b"\xff" * 8 + b"{}", "at most 100000000"),
    "N past the end": ((3).to_bytes(8, "little") + b"{}", "only 2 bytes follow"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "not downloaded"),
    "HTML page": (b"\n<!DOCTYPE html><html>\xff</html>", "not downloaded"),
    "HTML without doctype": (b"<html lang=en>", "not downloaded"),
}

HEADERS: dict[str, tuple[bytes | str | dict[str, object], str]] = {
    "not UTF-8": (b'{"\xff":1}', "not UTF-8"),
    "not UTF-8, a surrogate": (b'{"\xed\xa0\x80":1}', "not UTF-8"),
    "cut JSON": ('{"t":{"dtype":"U8","shape":[4],', "tensor t"),
    "cut after a member": (json.dumps({"t": T})[:-1], "cut JSON"),
    "no JSON": ("{nonsense}", "cut JSON"),
    "no colon": ('{"t" 1}', "colon"),
    "a trailing comma": (json.dumps({"t": T})[:-1] + ",}", "cut JSON"),
    "100k-deep lists": ('{"t":' + "[" * 100_000 + "]" * 100_000 + "}", "tensor t"),
    "100k-deep objects": ('{"t":' * 100_000 + "1" + "}" * 100_000, "tensor t"),
    "100k-deep shape": ('{"t":{"shape":' + "[" * 100_000, "tensor t"),
    "100k-deep metadata": ('{"__metadata__":{"k":' + "[" * 100_000, "metadata k"),
    "a list": ("[]", "does not begin"),
    "duplicate tensor": (f'{{"t":{json.dumps(T)},"t":{json.dumps(T)}}}', "key t twice"),
    "duplicate tensor, escaped": (f'{{"t":{json.dumps(T)},"\\u0074":{json.dumps(T)}}}', "key t twice"),
    "duplicate metadata": (
        f'{{"__metadata__":{{}},"__metadata__":{{}},"t":{json.dumps(T)}}}',
        "key __metadata__ twice",
    ),
    "duplicate metadata key": (f'{{"__metadata__":{{"k":"1","k":"2"}},"t":{json.dumps(T)}}}', "key k twice"),
    "metadata value no string": ({"__metadata__": {"k": 1}, "t": T}, "metadata k"),
    "metadata no object": ({"__metadata__": "pt", "t": T}, "__metadata__"),
    "metadata null": ({"__metadata__": None, "t": T}, "__metadata__"),
    "leading space": (" " + json.dumps({"t": T}), "does not begin"),
    "byte order mark": ("\ufeff" + json.dumps({"t": T}), "does not begin"),
    "padding that is no space": (json.dumps({"t": T}) + "\0", "more than padding"),
    "a second value": (json.dumps({"t": T}) + "{}", "more than padding"),
    "duplicate key in an entry": ('{"t":{"dtype":"U8","shape":[4],"shape":[4],"data_offsets":[0,4]}}', "tensor t"),
    "three of two keys": ('{"t":{"dtype":"U8","shape":[4],"shape":[4]}}', "tensor t"),
    "extra key in an entry": (_with(strides=[1]), "tensor t"),
    "missing key": ({"t": {"dtype": "U8", "shape": [4]}}, "tensor t"),
    "entry no object": ({"t": 5}, "tensor t"),
    "half a surrogate in a name": (f'{{"\\ud800":{json.dumps(T)}}}', "not a valid JSON string"),
    "a raw control character in a name": (f'{{"a\nb":{json.dumps(T)}}}', "not a valid JSON string"),
    "shape x dtype too long": (_with(dtype="U16"), "span 32 bits"),
    "shape x dtype too short": (_with(shape=[3]), "span 32 bits"),
    "half a byte": (_with(dtype="F4", shape=[7]), "takes 28 bits"),
    "F6 across a byte": (_with(dtype="F6_E2M3", shape=[5]), "takes 30 bits"),
    "product beyond 64 bits": (_with(shape=[2**62, 4]), "64 bits"),
    "product that wraps to the length": (_with(shape=[2**32, 2**32, 4]), "64 bits"),
    "product beyond 64 bits, then zero": (_with(shape=[2**62, 4, 0], data_offsets=[0, 0]), "64 bits"),
    "bit count beyond 64 bits": (_with(dtype="F64", shape=[2**60]), "64 bits"),
    "dimension of 64 bits": (_with(shape=[2**64 + 4]), "tensor t"),
    "dimension of 5000 digits": ('{"t":{"dtype":"U8","shape":[' + "9" * 5000 + '],"data_offsets":[0,4]}}', "tensor t"),
    "negative dimension": (_with(shape=[-4]), "-4"),
    "negative zero": ('{"t":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', "-0"),
    "negative dimensions, right product": (_with(shape=[-2, -2]), "-2"),
    "float dimension": (_with(shape=[4.0]), "4.0"),
    "exponent": ('{"t":{"dtype":"U8","shape":[4e0],"data_offsets":[0,4]}}', "4e0"),
    "bool dimension": (_with(shape=[True, 4]), "true"),
    "string dimension": (_with(shape=["4"]), "tensor t"),
    "NaN dimension": (_with(shape=[float("nan")]), "NaN"),
    "shape no list": (_with(shape=4), "tensor t"),
    "too many dimensions": (_with(shape=[1] * 100 + [4]), "tensor t"),
    "three offsets": (_with(data_offsets=[0, 2, 4]), "tensor t"),
    "negative offset": (_with(data_offsets=[-4, 0]), "-4"),
    "float offset": (_with(data_offsets=[0, 4.0]), "4.0"),
    "unknown dtype": (_with(dtype="F128"), "F128"),
    "dtype in lower case": (_with(dtype="u8"), "dtype is u8"),
    "dtype no string": (_with(dtype=8), "tensor t"),
    "trailing bytes": ({"t": entry("U8", [3], 0, 3)}, "1 bytes trail"),
    "no tensor, trailing bytes": ("{}", "4 bytes trail"),
    "data cut": ({"t": entry("U8", [9], 0, 9)}, "cut"),
    "offsets beyond 64 bits": (_with(data_offsets=[2**64, 2**64 + 4]), "tensor t"),
    "hole": ({"t": entry("U8", [1], 0, 1), "u": entry("U8", [2], 2, 4)}, "tensor u.*hole"),
    "overlap": ({"t": entry("U8", [3], 0, 3), "u": entry("U8", [2], 2, 4)}, "tensor u.*overlaps"),
    "the same bytes twice": ({"t": T, "u": T}, "tensor u.*overlaps"),
    "zero-size tensor inside another": ({"t": T, "u": entry("U8", [0], 2, 2)}, "tensor u.*overlaps"),
    "zero-size tensor past the end": ({"t": T, "u": entry("U8", [0], 5, 5)}, "tensor u.*hole"),
    "reversed offsets": (_with(data_offsets=[4, 0]), "backwards"),
    "nonzero first offset": ({"t": entry("U8", [3], 1, 4)}, "tensor t.*hole"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_safetensors_are_refused(case: str, side: str, tmp_path: Path) -> None:
    content, why = FILES[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    message = _refusal(path, side)
    assert "model.safetensors" in message
    assert why in message


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_headers_are_refused(case: str, side: str, tmp_path: Path) -> None:
    header, why = HEADERS[case]
    with pytest.raises(InputError, match=why):
        open_checkpoint(write_file(tmp_path / "model.safetensors", header, DATA), side=side)
    assert "model.safetensors" in _refusal(tmp_path, side)


def test_the_header_that_the_cases_above_damage_is_sound(tmp_path: Path, side: str) -> None:
    """Else they could be refused for another reason than the one they are about."""
    checkpoint = open_checkpoint(write_file(tmp_path / "model.safetensors", {"t": T}, DATA), side=side)
    assert list(checkpoint.tensors) == ["t"]


@pytest.mark.parametrize("n", [LONGEST_JSON_BYTES, LONGEST_JSON_BYTES + 1, 2**40, 2**63])
def test_a_claimed_length_allocates_nothing(n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most that is asked of the kernel before the claim is held against the file is its first bytes."""
    asked, pread = [], os.pread

    def record(fd: int, nbytes: int, offset: int) -> bytes:
        asked.append(nbytes)
        return pread(fd, nbytes, offset)

    monkeypatch.setattr(os, "pread", record)
    _refusal(write_file(tmp_path / "model.safetensors", "{}", n=n), "BASE")
    assert max(asked) <= 64


@pytest.mark.parametrize(
    "name", ["", "a\0b", "../../x", "/etc/passwd", "\x1b[31mred\x1b[0m", "<b>x</b>", "\u202e", "a" * 9999]
)
def test_hostile_names_are_escaped_wherever_they_are_shown(name: str, side: str, tmp_path: Path) -> None:
    """The tensor is named in one bounded, printable line."""
    message = _refusal(write_file(tmp_path / "model.safetensors", {name: entry("U8", [4], 4, 8)}, DATA), side)
    assert "\x1b" not in message
    assert len(message) < 1000


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["FIFO", "folder"])
@pytest.mark.parametrize("where", ["shard", "single file", "index"])
def test_what_is_no_regular_file_is_refused_without_waiting(
    make: Callable[[Path], None], where: str, side: str, tmp_path: Path
) -> None:
    names = {"shard": "a.safetensors", "single file": "model.safetensors", "index": "model.safetensors.index.json"}
    if where == "shard":
        write_index(tmp_path, {"t": "a.safetensors"})
    make(tmp_path / names[where])
    message = _refusal(tmp_path, side)
    assert names[where] in message
    assert "expected a regular file" in message


def test_a_device_as_a_shard_is_refused(side: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("/dev/zero")
    assert "expected a regular file" in _refusal(tmp_path, side)


SHARD_NAMES = [
    "", ".", "..", "../a.safetensors", "sub/a.safetensors", "/a.safetensors", "C:a.safetensors", "C:\\a.safetensors",
    "\\\\host\\share\\a.safetensors", "..\\a.safetensors", "a\0.safetensors", "a\x1b[31m.safetensors", ".safetensors",
    ".a.safetensors", "a.bin", "a.safetensors.index.json", "a.safetensors/", "a.SAFETENSORS",
]  # fmt: skip


@pytest.mark.parametrize("name", SHARD_NAMES)
def test_shard_names_that_could_leave_the_folder_are_refused(name: str, side: str, tmp_path: Path) -> None:
    """Even where a sound file lies under that name."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for place in (folder, folder / "sub", tmp_path):
        write_safetensors(place / "a.safetensors", {"t": np.zeros(2)})
    write_index(folder, {"t": name})
    message = _refusal(folder, side)
    assert "plain file name" in message
    assert "tensor t" in message


GOOD = '"weight_map":{"t":"a.safetensors"}'
INDICES: dict[str, tuple[bytes | str, str]] = {
    "empty": ("", "broken"),
    "a list": ("[]", "broken"),
    "not UTF-8": (b'{"\xff":1}', "not UTF-8"),
    "cut": ("{" + GOOD, "cut JSON"),
    "two values": ("{" + GOOD + "}{}", "more than one"),
    "no weight_map": ('{"metadata":{}}', "no weight_map"),
    "empty weight_map": ('{"weight_map":{}}', "empty"),
    "weight_map no object": ('{"weight_map":["t"]}', "weight_map"),
    "value no string": ('{"weight_map":{"t":["a.safetensors"]}}', "tensor t.*not a string"),
    "value null": ('{"weight_map":{"t":null}}', "tensor t.*not a string"),
    "duplicate tensor": ('{"weight_map":{"t":"a.safetensors","t":"b.safetensors"}}', "key t twice"),
    "duplicate weight_map": ("{" + GOOD + "," + GOOD + "}", "key weight_map twice"),
    "half a surrogate": ('{"weight_map":{"\\ud800":"a.safetensors"}}', "not a valid JSON string"),
    "metadata no object": ('{"metadata":[1],' + GOOD + "}", "expected an object"),
    "metadata with NaN": ('{"metadata":{"total_size":NaN},' + GOOD + "}", "metadata is broken"),
    "metadata with 5000 digits": ('{"metadata":{"total_size":' + "9" * 5000 + "}," + GOOD + "}", "metadata is broken"),
    "metadata with infinity": ('{"metadata":{"total_size":1e999},' + GOOD + "}", "metadata is broken"),
    "metadata with half a surrogate": ('{"metadata":{"k":"\\ud800"},' + GOOD + "}", "metadata is broken"),
    "metadata 100k deep": ('{"metadata":' + "[" * 100_000 + "]" * 100_000 + "," + GOOD + "}", "too deep"),
    "metadata of megabytes": ('{"metadata":{"k":"' + "x" * 3_000_000 + '"},' + GOOD + "}", "too long"),
    "weight_map 100k deep": ('{"weight_map":{"t":' + "[" * 100_000, "tensor t.*not a string"),
    "LFS pointer": ("version https://git-lfs.github.com/spec/v1\n", "not downloaded"),
    "HTML page": ("<!doctype html>", "not downloaded"),
}


@pytest.mark.parametrize("case", INDICES)
def test_hostile_indices_are_refused(case: str, side: str, tmp_path: Path) -> None:
    content, why = INDICES[case]
    write_safetensors(tmp_path / "a.safetensors", {"t": np.zeros(2)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=why):
        open_checkpoint(index, side=side)
    assert index.name in _refusal(tmp_path, side)


def test_an_index_over_the_cap_is_refused_unread(side: str, tmp_path: Path) -> None:
    """A sparse file: reading it would take 100 MB."""
    index = write_index(tmp_path, {"t": "a.safetensors"})
    os.truncate(index, LONGEST_JSON_BYTES + 1)
    assert "at most 100000000" in _refusal(index, side)


def test_all_missing_shards_are_listed(side: str, tmp_path: Path) -> None:
    """A dangling link, as an unfinished download leaves it in the Hub's cache, is a missing file."""
    folder = write_sharded(tmp_path / "in", [{f"t{i}": np.zeros(1)} for i in range(4)])
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    (folder / names[1]).unlink()
    (folder / names[3]).unlink()
    (folder / names[3]).symlink_to(tmp_path / "nowhere")
    message = _refusal(folder, side)
    assert "2 of its 4 shards are missing" in message
    assert [name in message for name in names] == [False, True, False, True]


def test_the_list_of_missing_shards_is_bounded(side: str, tmp_path: Path) -> None:
    write_index(tmp_path, {f"t{i}": f"{i:03d}.safetensors" for i in range(300)})
    message = _refusal(tmp_path, side)
    assert "300 of its 300 shards are missing" in message
    assert "009.safetensors and 290 more" in message


def test_a_tensor_that_lies_in_another_shard_than_the_index_says_is_refused(side: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"t": np.zeros(1)})
    write_safetensors(tmp_path / "b.safetensors", {"u": np.zeros(1)})
    write_index(tmp_path, {"t": "b.safetensors", "u": "b.safetensors", "v": "a.safetensors"})
    assert "tensor t is not in b.safetensors, where the index puts it; it is in a.safetensors" in _refusal(
        tmp_path, side
    )


def test_a_tensor_that_no_shard_has_is_refused(side: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"t": np.zeros(1)})
    write_index(tmp_path, {"t": "a.safetensors", "v": "a.safetensors"})
    assert "tensor v is not in a.safetensors, where the index puts it; no shard has it" in _refusal(tmp_path, side)


def test_a_tensor_in_two_shards_is_refused(side: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"t": np.zeros(1)})
    write_safetensors(tmp_path / "b.safetensors", {"t": np.ones(1), "u": np.zeros(1)})
    write_index(tmp_path, {"t": "a.safetensors", "u": "b.safetensors"})
    assert "tensor t is in two shards, a.safetensors and b.safetensors" in _refusal(tmp_path, side)


def test_a_damaged_shard_of_an_index_is_named(side: str, tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "in", [{"t": np.zeros(1)}, {"u": np.zeros(1)}])
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "model-00002-of-00002.safetensors: is a git-LFS pointer" in _refusal(folder, side)
