"""Hostile inputs before the whole command, on BASE's side and on FT's: refused with no OUT, or survived."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from streamrepair import api
from streamrepair.errors import InputError
from tests.builders import write_file, write_index
from tests.command import run
from tests.hostile.test_hostile_headers import DATA, FILES, HEADERS, INDICES, SHARD_NAMES
from tests.pairs import Pair, read_tensors, snapshot, stored, values, write_pair, write_split

SIDES = pytest.mark.parametrize("side", ["base", "ft"])


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return write_pair(tmp_path / "in", {"w": (64, 48), "v": (48,)}, shards=(1, 1))


def _refused(pair: Pair, side: str, out: Path) -> None:
    """One printable line that names the side, nothing written, inputs as they were."""
    before = snapshot(pair.base), snapshot(pair.ft)
    with pytest.raises(InputError) as caught:
        api.repair(pair.base, pair.ft, out)
    assert str(caught.value).startswith(f"{side.upper()}: ")
    assert str(caught.value).isprintable()
    assert not out.exists()
    assert (snapshot(pair.base), snapshot(pair.ft)) == before


@SIDES
def test_no_hostile_file_header_index_or_name_makes_an_out(pair: Pair, tmp_path: Path, side: str) -> None:
    """All cases of the parsers' tests, one after the other."""
    folder: Path = getattr(pair, side)
    shard, index, sound = folder / "model.safetensors", folder / "model.safetensors.index.json", b""
    sound = shard.read_bytes()
    for content, _ in FILES.values():
        shard.write_bytes(content)
        _refused(pair, side, tmp_path / "out")
    for header, _ in HEADERS.values():
        write_file(shard, header, DATA)
        _refused(pair, side, tmp_path / "out")
    shard.unlink()
    (folder / "a.safetensors").write_bytes(sound)
    for text, _ in INDICES.values():
        index.write_bytes(text.encode() if isinstance(text, str) else text)
        _refused(pair, side, tmp_path / "out")
    for name in SHARD_NAMES:
        write_index(folder, {"w": name, "v": "a.safetensors"})
        _refused(pair, side, tmp_path / "out")


@SIDES
@pytest.mark.parametrize("kind", ["FIFO", "folder", "device"])
def test_what_is_no_file_makes_no_out_and_does_not_hang(pair: Pair, tmp_path: Path, side: str, kind: str) -> None:
    path: Path = getattr(pair, side) / "model.safetensors"
    path.unlink()
    {"FIFO": os.mkfifo, "folder": os.mkdir, "device": lambda p: p.symlink_to("/dev/zero")}[kind](path)
    with pytest.raises(InputError, match="expected a regular file"):
        api.repair(pair.base, pair.ft, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@SIDES
def test_links_into_a_cache_are_followed(pair: Pair, tmp_path: Path, side: str) -> None:
    """As the Hub's cache has them, sidecars too; OUT gets files and no links."""
    folder: Path = getattr(pair, side)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    api.repair(pair.base, pair.ft, tmp_path / "out")
    assert api.verify(tmp_path / "out", deep=True).damage == ()
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


@SIDES
def test_stray_and_consolidated_files_are_ignored_and_told_of(pair: Pair, tmp_path: Path, side: str) -> None:
    folder: Path = getattr(pair, side)
    (folder / "consolidated.safetensors").write_bytes(b"nothing of the kind")
    report = api.repair(pair.base, pair.ft, tmp_path / "out")
    assert report.warnings == (f"{side.upper()}: ignored weight files consolidated.safetensors",)
    assert not (tmp_path / "out" / "consolidated.safetensors").exists()


rng = np.random.default_rng(0)
W = rng.standard_normal((64, 48))
LONG = rng.standard_normal((1, 2048))
DELTAS: dict[str, tuple[np.ndarray, np.ndarray, str]] = {
    "constant": (W, np.full(W.shape, 0.25), "kept_ft"),
    "rank 1": (W, np.outer(rng.integers(-4, 5, 64), rng.integers(-4, 5, 48)) * 1.0, "kept_ft"),
    "1 x n": (LONG, 0.1 * rng.standard_normal(LONG.shape), "repaired"),
    "n x 1": (LONG.T, 0.1 * rng.standard_normal(LONG.T.shape), "repaired"),
    "2 x 2": (W[:2, :2], np.ones((2, 2)), "kept_ft"),
    "zero": (W, np.zeros(W.shape), "copied"),
    "one entry": (W, np.eye(64, 48, 3) * (np.arange(64) == 5)[:, None], "kept_ft"),
    "tiny": (np.zeros(W.shape), 1e-30 * rng.standard_normal(W.shape), "repaired"),
    "huge": (W, 1e30 * rng.standard_normal(W.shape), "repaired"),
    "denormal": (np.zeros(W.shape), 1e-42 * rng.standard_normal(W.shape), "any"),
}


@pytest.mark.parametrize("case", DELTAS)
def test_deltas_that_are_no_random_matrix(tmp_path: Path, case: str) -> None:
    """In float64, where W + Δ keeps any of them: finite, whole, and what docs/durability.md says is done with it."""
    weight, delta, action = DELTAS[case]
    base = write_split(tmp_path / "base", {"w": stored(weight, "F64"), "x": stored(W, "F64")}, 1)
    ft = write_split(tmp_path / "ft", {"w": stored(weight + delta, "F64"), "x": stored(W + 0.1, "F64")}, 1)
    report = api.repair(base, ft, tmp_path / "out")
    found = report.tensors["w"].action
    assert action in (found, "any"), report.tensors["w"]
    assert np.isfinite(values(read_tensors(tmp_path / "out")["w"])).all()
    assert api.verify(tmp_path / "out").damage == ()
    if found != "repaired":
        assert read_tensors(tmp_path / "out")["w"] == read_tensors(ft)["w"]


@pytest.mark.skipif(sys.getfilesystemencoding() != "utf-8", reason="else other bytes are the odd ones")
def test_paths_that_are_not_utf8(pair: Pair, tmp_path: Path) -> None:
    """Read, written, shown escaped, and in the report, which must be UTF-8."""
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    base, ft = (Path(getattr(pair, side)).rename(odd / side) for side in ("base", "ft"))
    (ft / os.fsdecode(b"vocab\xff.json")).write_text("{}")
    commands = [[base, ft, odd / "out"], ["verify", odd / "out", "--deep"], ["plan", base, ft]]
    for words in commands * 2:
        result = run(*words)
        assert result.status == 0, result.err
    json.loads((odd / "out" / "streamrepair.json").read_bytes().decode("utf-8"))
    shard = odd / "out" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x33")
    assert run("verify", odd / "out", "--repair").status == 0
    refused = run(base, ft, odd / "out", "--scale", 2)
    assert refused.status == 3
    assert "caf" in refused.error
    assert refused.error.isprintable()
