"""An output shard: FT's header to the byte, reserved at once, and its final name only when all of it is right."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from streamrepair.checkpoint import osfile
from streamrepair.checkpoint.headers import read_header
from streamrepair.checkpoint.write import ShardFile, ShardLayout, layout_like
from streamrepair.errors import DamageError, DiskSpaceError, OutputError
from tests.builders import bf16, entry, write_file, write_safetensors
from tests.faults import Kernel, fails
from tests.pairs import read_tensors

TENSORS = {
    "z": bf16(np.arange(6).reshape(2, 3)),
    "a": np.arange(4, dtype=np.float16),
    "empty": np.zeros((0, 5), np.float32),
    "wide": np.arange(3, dtype=np.float64),
    "ids": np.arange(3, dtype=np.int64),
    "fp8": ("F8_E4M3", (2, 2), b"\x01\x02\x03\x04"),
    "fp4": ("F4", (4,), b"\xab\xcd"),
    "scalar": np.float32(7),
}


def _open(layout: ShardLayout, tmp_path: Path) -> ShardFile:
    for name in ("out", "work"):
        (tmp_path / name).mkdir(exist_ok=True)
    shard = ShardFile(layout, out=tmp_path / "out", work=tmp_path / "work")
    shard.open()
    return shard


def _filled(tmp_path: Path) -> tuple[ShardFile, dict[str, str], Path]:
    """A shard with all its tensors written, last one first; their digests; the file it was modelled on."""
    source = write_safetensors(tmp_path / "model-00001-of-00001.safetensors", TENSORS, {"format": "pt"})
    header = read_header(source)
    shard = _open(layout_like(header, "same"), tmp_path)
    content = source.read_bytes()
    for tensor in reversed(header.tensors):
        shard.write(tensor.start, memoryview(content[tensor.start : tensor.start + tensor.nbytes]))
    return shard, {name: shard.digest(name) for name in TENSORS}, source


def test_the_same_tensors_make_the_same_file(tmp_path: Path) -> None:
    shard, digests, source = _filled(tmp_path)
    shard.seal(digests)
    assert shard.final.read_bytes() == source.read_bytes()
    assert list((tmp_path / "work").iterdir()) == []


def test_an_unusual_header_is_kept_byte_for_byte(tmp_path: Path) -> None:
    """Unsorted members, spaces, escapes, no padding: offsets, order and metadata stay FT's by identity."""
    header = (
        '{"b":  {"data_offsets": [4,8], "shape": [1],"dtype":"F32"}, "__metadata__":{"k\\u00e4":"v","format":"pt"},'
        '"a" : {"dtype":"F32","shape":[1],"data_offsets":[0,4]} }'
    )
    source = write_file(tmp_path / "x.safetensors", header, bytes(range(8)))
    layout = layout_like(read_header(source), "same")
    assert layout.prefix == source.read_bytes()[: 8 + len(header)]
    assert layout.header_digest == read_header(source).digest
    assert (layout.file_bytes, layout.entries["b"].start) == (source.stat().st_size, 8 + len(header) + 4)


def test_a_growing_shard_is_reserved_in_full_and_has_no_final_name(tmp_path: Path) -> None:
    source = write_safetensors(tmp_path / "model.safetensors", {"w": np.zeros((256, 1024), np.float32)})
    shard = _open(layout_like(read_header(source), "same"), tmp_path)
    assert list((tmp_path / "out").iterdir()) == []
    status = shard.partial.stat()
    assert status.st_size == source.stat().st_size
    assert status.st_blocks * 512 >= status.st_size
    assert not shard.partial.name.endswith(".safetensors")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0o000, 0o666)])
def test_a_shards_mode_is_what_the_umask_allows(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        shard, digests, _ = _filled(tmp_path)
        shard.seal(digests)
    finally:
        os.umask(before)
    assert stat.S_IMODE(shard.final.stat().st_mode) == mode


def test_float32_output_widens_halves_and_leaves_all_else(tmp_path: Path) -> None:
    source = write_safetensors(tmp_path / "m.safetensors", TENSORS, {"format": "pt", "note": "ä"})
    layout = layout_like(read_header(source), "float32")
    assert {name: e.dtype for name, e in layout.entries.items()} == {
        "z": "F32", "a": "F32", "empty": "F32", "wide": "F64", "ids": "I64", "fp8": "F8_E4M3", "fp4": "F4",
        "scalar": "F32",
    }  # fmt: skip
    (tmp_path / "written").mkdir()
    data = bytes(layout.file_bytes - len(layout.prefix))
    written = tmp_path / "written" / "m.safetensors"
    written.write_bytes(layout.prefix + data)
    found = read_header(written)
    assert {e.name: e for e in found.tensors} == layout.entries
    assert [e.name for e in found.tensors] == [e.name for e in read_header(source).tensors]
    assert (found.metadata, found.data_start % 8) == ({"format": "pt", "note": "ä"}, 0)
    assert {name: shape for name, (_, shape, _) in read_tensors(written.parent).items()} == {
        name: np.shape(t) if not isinstance(t, tuple) else t[1] for name, t in TENSORS.items()
    }


def test_the_safetensors_library_reads_a_float32_layout(tmp_path: Path) -> None:
    source = write_safetensors(tmp_path / "m.safetensors", {"z": TENSORS["z"], "a": TENSORS["a"]})
    layout = layout_like(read_header(source), "float32")
    path = tmp_path / "n.safetensors"
    path.write_bytes(layout.prefix + np.arange(10, dtype=np.float32).tobytes())
    with safe_open(path, "numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("z"), np.arange(6, dtype=np.float32).reshape(2, 3))
        np.testing.assert_array_equal(file.get_tensor("a"), np.arange(6, 10, dtype=np.float32))


@pytest.mark.parametrize("place", [0, 20, -1])
def test_a_byte_that_reads_back_wrong_is_never_given_a_name(tmp_path: Path, place: int) -> None:
    """In the length, in the header, in a tensor."""
    shard, digests, _ = _filled(tmp_path)
    content = bytearray(shard.partial.read_bytes())
    content[place] ^= 1
    shard.partial.write_bytes(content)
    with pytest.raises(DamageError, match=r"tensor ids|scalar|header does not read back|tensor"):
        shard.seal(digests)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_shard_whose_sync_or_rename_fails_keeps_its_partial_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    shard, digests, _ = _filled(tmp_path)
    monkeypatch.setattr(osfile, "os", Kernel((call,), fails(1, errno.EIO)))
    with pytest.raises(OutputError):
        shard.seal(digests)
    assert (list((tmp_path / "out").iterdir()), shard.partial.exists()) == ([], True)


def test_a_full_disk_is_met_when_the_space_is_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_safetensors(tmp_path / "m.safetensors", TENSORS)
    monkeypatch.setattr(osfile, "os", Kernel(("posix_fallocate",), fails(1, errno.ENOSPC)))
    with pytest.raises(DiskSpaceError):
        _open(layout_like(read_header(source), "same"), tmp_path)


def test_a_sealed_shard_is_found_again_and_its_name_can_be_taken_back(tmp_path: Path) -> None:
    shard, digests, _ = _filled(tmp_path)
    shard.seal(digests)
    again = ShardFile(shard.layout, out=tmp_path / "out", work=tmp_path / "work")
    assert again.open()
    assert again.sealed
    assert {name: again.digest(name) for name in TENSORS} == digests
    again.unseal()
    assert (again.final.exists(), again.partial.exists()) == (False, True)
    again.seal(digests)
    assert again.final.exists()


@pytest.mark.parametrize("damage", ["header", "cut", "longer"])
def test_a_sealed_shard_of_wrong_length_or_header_loses_its_name(tmp_path: Path, damage: str) -> None:
    shard, digests, source = _filled(tmp_path)
    shard.seal(digests)
    content = shard.final.read_bytes()
    spoilt = {"header": content[:30] + b"?" + content[31:], "cut": content[:-3], "longer": content + b"x"}[damage]
    shard.final.write_bytes(spoilt)
    again = ShardFile(shard.layout, out=tmp_path / "out", work=tmp_path / "work")
    assert not again.open()
    assert (again.sealed, again.final.exists()) == (False, False)
    right = {name for name in TENSORS if again.digest(name) == digests[name]}
    assert right == (set(TENSORS) - {"scalar"} if damage == "cut" else set(TENSORS))
    last = again.layout.entries["scalar"]
    again.write(last.start, memoryview(source.read_bytes()[last.start :]))
    again.seal(digests)
    assert again.final.read_bytes() == source.read_bytes()


def test_a_digest_of_a_range_past_the_end_is_refused(tmp_path: Path) -> None:
    shard, _, _ = _filled(tmp_path)
    os.truncate(shard.partial, shard.layout.file_bytes - 1)
    last = max(shard.layout.entries.values(), key=lambda e: e.start)
    with pytest.raises(OutputError, match="ends at byte"):
        shard.digest(last.name)


def test_entry_offsets_of_the_builder_agree_with_the_layout(tmp_path: Path) -> None:
    source = write_file(tmp_path / "m.safetensors", {"a": entry("U8", (4,), 0, 4)}, b"abcd")
    layout = layout_like(read_header(source), "float32")
    assert layout.file_bytes - layout.entries["a"].nbytes == layout.entries["a"].start
