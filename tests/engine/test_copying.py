"""Copies of tensors that take several pieces, through the page cache and past it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from streamrepair import api
from streamrepair.checkpoint import osfile
from streamrepair.engine import copying, run
from streamrepair.engine.memory import COPY_BYTES, PIECE_BYTES
from streamrepair.errors import InputError
from tests.builders import Raw
from tests.pairs import read_tensors, shard_bytes, write_split

ROWS, COLS = 1500, 1499
COUNT = ROWS * COLS
assert PIECE_BYTES < COPY_BYTES < 2 * COUNT
NAN = 0x7FC0


def _weights(*, other: bool = False) -> np.ndarray:
    bits = np.random.default_rng(0).integers(0x3C00, 0x3F80, COUNT, np.uint16)
    return bits + 1 if other else bits


def _stored(bits: np.ndarray) -> dict[str, Raw]:
    """The tensor, behind one that keeps it from beginning at a page, and before one that shares its last page."""
    small = ("BF16", (3,), b"\0\0" * 3)
    return {"a": small, "m": ("BF16", (ROWS, COLS), bits.tobytes()), "z": small}


@pytest.fixture(params=[False, True], ids=["through the cache", "past the cache"])
def direct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the run takes itself for one that is large against free memory."""
    monkeypatch.setattr(run, "lets_go", lambda _plan, _free_bytes: request.param)
    return bool(request.param)


@pytest.mark.usefixtures("direct")
def test_what_is_equal_arrives_whole(tmp_path: Path) -> None:
    for side in ("base", "ft"):
        write_split(tmp_path / side, _stored(_weights()), 1)
    report = api.repair(tmp_path / "base", tmp_path / "ft", tmp_path / "out")
    assert report.tensors["m"].action == "copied"
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "ft")


def test_the_device_is_told_to_begin(tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for small tensors, and for what has gone to it already."""
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(osfile, "start_writing", lambda _fd, offset, nbytes: told.append((offset, nbytes)))
    monkeypatch.setattr(copying, "_WRITTEN_OUT_BYTES", 2 * PIECE_BYTES)
    for side in ("base", "ft"):
        write_split(tmp_path / side, _stored(_weights()), 1)
    plan = api.plan(tmp_path / "base", tmp_path / "ft")
    api.repair(tmp_path / "base", tmp_path / "ft", tmp_path / "out")
    out = next(task.out for task in plan.tasks if task.name == "m")
    steps = range(out.start, out.start + out.nbytes, 2 * PIECE_BYTES)
    assert told == [(at, min(2 * PIECE_BYTES, out.start + out.nbytes - at)) for at in steps if not direct]


@pytest.mark.usefixtures("direct")
def test_a_tensor_that_is_passed_through_arrives_whole(tmp_path: Path) -> None:
    write_split(tmp_path / "base", _stored(_weights(other=True)), 1)
    write_split(tmp_path / "ft", _stored(_weights()), 1)
    report = api.repair(tmp_path / "base", tmp_path / "ft", tmp_path / "out", exclude="m")
    assert report.tensors["m"].action == "kept_ft"
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "ft")


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("side", ["base", "ft", "both"])
@pytest.mark.parametrize("index", [0, PIECE_BYTES // 2 - 1, PIECE_BYTES // 2, COUNT - 1])
@pytest.mark.parametrize("excluded", [False, True])
def test_a_nan_is_found_in_any_piece_of_any_side(tmp_path: Path, side: str, index: int, excluded: bool) -> None:
    bad = _weights()
    bad[index] = NAN
    for name in ("base", "ft"):
        write_split(tmp_path / name, _stored(bad if side in (name, "both") else _weights()), 1)
    with pytest.raises(InputError, match=f"tensor m holds NaN or infinity at element {index}"):
        api.repair(tmp_path / "base", tmp_path / "ft", tmp_path / "out", exclude="m" if excluded else None)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("index", [0, 1 << 13, PIECE_BYTES // 2 - 1, PIECE_BYTES // 2, COUNT - 1])
def test_one_bit_makes_a_difference_in_any_piece(tmp_path: Path, index: int) -> None:
    """Δ of a single element has rank one: it is no copy, but nothing of it is noise either."""
    other = _weights()
    other[index] ^= 1
    write_split(tmp_path / "base", _stored(other), 1)
    write_split(tmp_path / "ft", _stored(_weights()), 1)
    report = api.repair(tmp_path / "base", tmp_path / "ft", tmp_path / "out")
    assert report.tensors["m"].action == "kept_ft"
    assert report.tensors["m"].reason.startswith("delta has exactly low rank")
    assert read_tensors(tmp_path / "out") == read_tensors(tmp_path / "ft")
