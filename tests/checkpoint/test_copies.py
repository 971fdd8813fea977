"""Matrices that FT stores twice and BASE once come out the same: a loader would untie them otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from streamrepair import api
from streamrepair.checkpoint.copies import candidates, copies
from streamrepair.checkpoint.layout import open_checkpoint
from streamrepair.engine.notices import plan_warnings

Singles = NDArray[np.float32]


def _normal(seed: int, *shape: int) -> Singles:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _tuned(weights: Singles, seed: int) -> Singles:
    rows, cols = weights.shape
    return weights + 0.01 * _normal(seed, rows, cols) + 0.1 * _normal(seed + 1, rows, 2) @ _normal(seed + 2, 2, cols)


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    """FT has the embedding twice, the second time in another shard's place; and what only resembles it."""
    base, ft = tmp_path / "base", tmp_path / "ft"
    base.mkdir()
    ft.mkdir()
    embedding, other = _normal(0, 300, 48), _normal(1, 48, 40)
    save_file({"embed": embedding, "w": other}, base / "model.safetensors")
    tuned = _tuned(embedding, 2)
    nearly = tuned.copy()
    nearly[-1, -1] += 1.0
    alone = {"head": tuned.copy(), "nearly": nearly, "new": _normal(9, 300, 48)}
    save_file({"embed": tuned, "w": _tuned(other, 5), **alone}, ft / "model.safetensors")
    return base, ft


def test_a_copy_is_told_by_all_of_its_bytes(sides: tuple[Path, Path]) -> None:
    base, ft = (open_checkpoint(side, side="FT") for side in sides)
    assert candidates(base, ft) == {name: ["embed"] for name in ("head", "nearly", "new")}
    assert copies(base, ft) == {"head": "embed"}
    assert copies(base, base) == {}


def test_a_copy_comes_out_as_what_it_copies(sides: tuple[Path, Path], tmp_path: Path) -> None:
    base, ft = sides
    out = tmp_path / "out"
    report = api.repair(base, ft, out)
    written = load_file(out / "model.safetensors")
    assert np.array_equal(written["head"], written["embed"])
    assert not np.array_equal(written["head"], load_file(ft / "model.safetensors")["head"])
    assert {name: (record.action, record.paired_with) for name, record in report.tensors.items()} == {
        "head": ("repaired", "embed"), "embed": ("repaired", None), "w": ("repaired", None),
        "nearly": ("kept_ft", None), "new": ("kept_ft", None),
    }  # fmt: skip
    assert any(
        "1 tensor of FT is a copy of another that BASE has, and is treated like it, e.g. head like embed" in warning
        for warning in report.warnings
    )
    found = api.verify(out, deep=True)
    assert found.damage == ()
    assert {check.name for check in found.deep} == {"head", "embed", "w"}


def test_a_copy_of_what_is_left_out_is_left_out(sides: tuple[Path, Path], tmp_path: Path) -> None:
    report = api.repair(*sides, tmp_path / "out", exclude="embed")
    assert report.tensors["head"].action == report.tensors["embed"].action == "kept_ft"
    assert report.tensors["head"].reason == "not in the base checkpoint"


def test_a_copy_that_is_left_out_alone_is_told_of(sides: tuple[Path, Path], tmp_path: Path) -> None:
    report = api.repair(*sides, tmp_path / "out", exclude="head")
    assert (report.tensors["head"].action, report.tensors["embed"].action) == ("kept_ft", "repaired")
    assert any(
        warning.startswith("head is a copy of embed in FT, which is repaired; it stays") for warning in report.warnings
    )


@pytest.mark.parametrize("beside", ["embed.qweight", "nothing"])
def test_a_copy_of_what_is_passed_through_is_passed_through(tmp_path: Path, beside: str) -> None:
    """The scales of a quantised weight, say."""
    weights, codes = _normal(0, 64, 48), np.zeros((64, 64), np.int32)
    for side, seed in (("base", 1), ("ft", 4)):
        (tmp_path / side).mkdir()
        tuned = _tuned(weights, seed)
        alone = {"head.scales": tuned.copy()} if side == "ft" else {}
        save_file({"embed.scales": tuned, beside: codes, **alone}, tmp_path / side / "model.safetensors")
    report = api.repair(tmp_path / "base", tmp_path / "ft", tmp_path / "out")
    assert {report.tensors[name].action for name in ("embed.scales", "head.scales")} == {
        "kept_ft" if beside == "embed.qweight" else "repaired"
    }


@pytest.mark.parametrize("value", [0.0, 0.02])
def test_a_module_that_was_only_begun_is_no_copy(tmp_path: Path, value: float) -> None:
    """Zeros beside zeros tell nothing: BASE's weights in a new gate would be another model."""
    for side in ("base", "ft"):
        (tmp_path / side).mkdir()
    save_file({"x": _normal(0, 64, 48)}, tmp_path / "base" / "model.safetensors")
    flat = np.full((64, 48), value, np.float32)
    save_file({"x": flat, "gate": flat.copy()}, tmp_path / "ft" / "model.safetensors")
    report = api.repair(tmp_path / "base", tmp_path / "ft", tmp_path / "out")
    assert report.tensors["gate"].reason == "not in the base checkpoint"


def test_a_damaged_copy_is_mended(sides: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = api.repair(*sides, out)
    shard = out / "model.safetensors"
    content = bytearray(shard.read_bytes())
    start = open_checkpoint(out, side="OUT").tensors["head"][1].start
    content[start + 7] ^= 1
    whole = shard.read_bytes()
    shard.write_bytes(content)
    assert [damage.where for damage in api.verify(out).damage] == ["head"]
    assert api.verify(out, repair=True).damage == ()
    assert shard.read_bytes() == whole
    assert api.repair(*sides, out).sessions == before.sessions + 1


def test_a_plan_reads_no_weights_and_says_what_may_be_a_copy(sides: tuple[Path, Path]) -> None:
    plan = api.plan(*sides)
    assert {task.name for task in plan.tasks if task.shape is not None} == {"embed", "w"}
    (warning,) = plan_warnings(plan)
    assert warning.endswith("the repair looks whether such are copies, as head may be of embed")
