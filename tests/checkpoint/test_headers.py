"""The header parser on sound files, held against the safetensors library, and on damaged ones."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from streamrepair.checkpoint.headers import ITEM_BITS, TensorEntry, read_header
from streamrepair.errors import InputError
from tests.builders import bf16, entry, raw, write_file, write_safetensors

SAMPLE = {
    "w.bf16": bf16([[1.5, -2.0, 3.25], [0.0, 1.0, 7.0]]),
    "w.f32": np.arange(6, dtype=np.float32).reshape(3, 2),
    "w.f16": np.arange(5, dtype=np.float16),
    "ids": np.array([[1, -2], [3, 4]], dtype=np.int64),
    "mask": np.array([True, False, True]),
    "scalar": np.float32(2.5).reshape(()),
    "empty": np.zeros((0, 7), dtype=np.float32),
    "über/模型 😀": np.ones(3, dtype=np.uint8),
}


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    return write_safetensors(tmp_path / "sample.safetensors", SAMPLE, {"format": "pt", "by": "tests"})


def _library_reading(path: Path) -> dict[str, tuple[str, list[int], bytes]] | None:
    """What the safetensors library finds in the file, or None where it refuses."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            return {name: (s.get_dtype(), s.get_shape(), _library_bytes(file, name)) for name, s in slices.items()}
    except (SafetensorError, OSError):
        return None


def _library_bytes(file: safe_open, name: str) -> bytes:
    import torch

    tensor = file.get_tensor(name).contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _refusal(path: Path) -> str | None:
    """The message with which a file is refused, or None."""
    try:
        read_header(path)
    except InputError as error:
        return str(error)
    return None


def _our_reading(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    content = path.read_bytes()
    tensors = read_header(path).tensors
    return {t.name: (t.dtype, list(t.shape), content[t.start : t.start + t.nbytes]) for t in tensors}


def test_reads_a_sound_file_as_the_safetensors_library_does(sample: Path) -> None:
    """Names, order, dtypes, shapes and every tensor's bytes agree."""
    ours, theirs = _our_reading(sample), _library_reading(sample)
    assert theirs is not None
    assert list(ours.items()) == list(theirs.items())
    assert ours == {name: (d, list(s), b) for name, (d, s, b) in ((n, raw(t)) for n, t in SAMPLE.items())}


def test_a_file_that_the_library_wrote_reads_back(tmp_path: Path) -> None:
    """The library sorts by dtype and pads, which the builders here do not."""
    from safetensors.numpy import save_file

    arrays = {f"t{i}": np.arange(i, dtype=np.float32 if i % 2 else np.int64) for i in range(9)}
    save_file(arrays, tmp_path / "theirs.safetensors", {"k": "v"})
    header = read_header(tmp_path / "theirs.safetensors")
    assert header.metadata == {"k": "v"}
    assert {t.name: t.numel for t in header.tensors} == {name: a.size for name, a in arrays.items()}


def test_the_file_itself_is_described(sample: Path) -> None:
    """Size, times, identity, raw header and digest: what a writer copies and a resumed run compares."""
    header, status, content = read_header(sample), sample.stat(), sample.read_bytes()
    assert (header.path, header.file_bytes, header.mtime_ns) == (sample, status.st_size, status.st_mtime_ns)
    assert (header.inode, header.device) == (status.st_ino, status.st_dev)
    assert header.metadata == {"format": "pt", "by": "tests"}
    assert content[8 : header.data_start] == header.header_bytes
    assert header.header_bytes.endswith(b" ")
    assert header.digest == hashlib.sha256(content[: header.data_start]).hexdigest()
    assert pickle.loads(pickle.dumps(header)) == header


def test_entries_count_their_elements() -> None:
    assert TensorEntry("t", "F32", (2, 3, 5), 8, 120).numel == 30
    assert TensorEntry("t", "F32", (), 8, 4).numel == 1


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    """The JSON's order is not binding: old writers sorted it by name."""
    header = {"a": entry("U8", [2], 3, 5), "b": entry("U8", [0], 3, 3), "c": entry("U8", [3], 0, 3)}
    read = read_header(write_file(tmp_path / "f", header, b"cccaa"))
    assert [(t.name, t.start - read.data_start) for t in read.tensors] == [("c", 0), ("b", 3), ("a", 3)]


@pytest.mark.parametrize("keys", [("shape", "data_offsets", "dtype"), ("data_offsets", "dtype", "shape")])
def test_an_entrys_members_come_in_any_order_with_any_white_space(tmp_path: Path, keys: tuple[str, ...]) -> None:
    described = {key: entry("U8", [1, 2], 0, 2)[key] for key in keys}
    text = json.dumps({"__metadata__": {}, "t": described}, indent=3).replace("\n", "\r\n\t")
    assert read_header(write_file(tmp_path / "f", text, b"ab")).tensors[0].shape == (1, 2)


def test_white_space_of_any_kind_after_the_header_is_padding(tmp_path: Path) -> None:
    """A header that an editor or `jq` wrote ends with a newline; the library reads it."""
    path = write_file(tmp_path / "f", json.dumps({"t": entry("U8", [2], 0, 2)}) + " \r\n\t\n", b"ab")
    assert read_header(path).tensors[0].shape == (2,)
    with safe_open(path, framework="np") as file:
        assert list(file.keys()) == ["t"]


@pytest.mark.parametrize("dtype", ITEM_BITS)
def test_every_dtype_is_accepted_at_its_size(tmp_path: Path, dtype: str) -> None:
    """Eight elements of b bits are b bytes, the sub-byte dtypes included."""
    path = write_file(tmp_path / "f", {"t": entry(dtype, [2, 4], 0, ITEM_BITS[dtype])}, bytes(ITEM_BITS[dtype]))
    assert read_header(path).tensors[0].nbytes == ITEM_BITS[dtype]
    with safe_open(path, framework="np") as file:  # the library knows the dtype and agrees about the size
        assert file.get_slice("t").get_dtype() == dtype


def test_a_file_without_tensors_has_none(tmp_path: Path) -> None:
    assert read_header(write_file(tmp_path / "f", "{}")).tensors == ()


def test_hostile_names_are_kept_as_they_are(tmp_path: Path) -> None:
    """Names are only labels: the reader neither resolves nor alters them."""
    names = ["", "\0", "../../etc/passwd", "\x1b[31mred", "<script>", 'quo"te\\', "a{b}c", "\u202eevil"]
    tensors = {name: np.full(1, i, dtype=np.uint8) for i, name in enumerate(names)}
    assert [t.name for t in read_header(write_safetensors(tmp_path / "f", tensors)).tensors] == names


def test_symlinks_are_followed(sample: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.safetensors"
    link.symlink_to(sample)
    assert read_header(link).inode == sample.stat().st_ino


def test_short_reads_are_continued(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that gives seven bytes at a time yields the same header."""
    whole, pread = read_header(sample), os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: pread(fd, min(n, 7), at))
    assert read_header(sample) == whole


def test_a_file_that_shrinks_while_it_is_read_is_refused(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: pread(fd, min(n, 7), at) if at < 50 else b"")
    with pytest.raises(InputError, match="shrank"):
        read_header(sample)


def test_a_failing_disk_is_an_input_error_that_names_the_file(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, nbytes: int, offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(InputError, match=r"sample\.safetensors: .*Input/output error"):
        read_header(sample)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_mutated_header_is_refused_or_read_as_the_library_reads_it(
    sample: Path, changes: list[tuple[float, int]]
) -> None:
    """Nothing but InputError ever leaves the parser, and what it accepts the library accepts and agrees with."""
    content = bytearray(sample.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    for place, value in changes:
        content[int(place * end)] = value
    mutant = sample.with_name("mutant.safetensors")
    mutant.write_bytes(content)
    refusal = _refusal(mutant)
    if refusal is None:
        assert _our_reading(mutant) == _library_reading(mutant)
    else:
        assert refusal.isprintable()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
_ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*ITEM_BITS, "F128", ""]) | _JSON,
        "shape": st.lists(st.integers(-1, 3), max_size=3) | _JSON,
        "data_offsets": st.tuples(st.integers(0, 4), st.integers(0, 9)) | _JSON,
    }
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), _ENTRIES | _JSON, max_size=3),
    size=st.integers(0, 9),
)
def test_any_json_is_refused_or_read_as_the_library_reads_it(
    tmp_path: Path, header: dict[str, object], size: int
) -> None:
    """Well-formed JSON of the wrong or the right shape: the same two outcomes."""
    path = write_file(tmp_path / "any.safetensors", header, bytes(size))
    refusal = _refusal(path)
    if refusal is not None:
        assert refusal.isprintable()
        return
    found = read_header(path)
    with safe_open(path, framework="np") as file:
        assert [t.name for t in found.tensors] == file.offset_keys()
        assert all(file.get_slice(t.name).get_shape() == list(t.shape) for t in found.tensors)


def _many(count: int) -> Iterator[str]:
    for i in range(count):
        yield f'"layers.{i}.weight":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}'


def _write_many(path: Path, count: int) -> Path:
    return write_file(path, "{" + ",".join(_many(count)) + "}", bytes(count))


_MEASURED = """
import re, sys, time
from pathlib import Path
from streamrepair.checkpoint.headers import read_header
start_s = time.process_time()
count = len(read_header(Path(sys.argv[1])).tensors)
took_s = time.process_time() - start_s
print(count, took_s, re.search(r"VmHWM:\\s*([0-9]+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
def test_a_million_tensors_take_bounded_time_and_memory(tmp_path: Path) -> None:
    """In a process of their own: 8.7 s and 0.5 GB were measured on two slow shared cores, the bounds leave room."""
    path = _write_many(tmp_path / "big", 1_000_000)
    done = subprocess.run([sys.executable, "-c", _MEASURED, str(path)], capture_output=True, text=True, check=True)
    count, took_s, peak_kib = done.stdout.split()
    assert int(count) == 1_000_000
    assert float(took_s) < 30
    assert int(peak_kib) * 1024 < 1_500_000_000


def _process_s(path: Path) -> float:
    start_s = time.process_time()
    read_header(path)
    return time.process_time() - start_s


def test_time_grows_linearly_with_the_number_of_tensors(tmp_path: Path) -> None:
    """Ten times the tensors take no more than thirty times as long: no step compares each tensor with all others."""
    paths = [_write_many(tmp_path / str(count), count) for count in (2_000, 20_000)]
    took_s = [min(_process_s(path) for _ in range(3)) for path in paths]
    assert took_s[1] < 30 * max(took_s[0], 0.01)
