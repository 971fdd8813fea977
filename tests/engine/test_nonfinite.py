"""NaN and infinity in the inputs: a refusal that leaves nothing, or tensors that are passed through."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from streamrepair import api
from streamrepair.checkpoint import osfile
from streamrepair.errors import InputError, OutputError
from tests.builders import bf16
from tests.faults import Kernel, fails
from tests.pairs import Pair, read_tensors, snapshot, spoil, write_pair, write_split

BAD = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])


@BAD
@pytest.mark.parametrize("side", ["base", "ft"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_an_input_that_is_not_finite_leaves_no_out(tmp_path: Path, side: str, dtype: str, value: float) -> None:
    pair = write_pair(tmp_path, {"a": (64, 64), "w": (300, 40)}, dtypes=(dtype, dtype))
    spoil(getattr(pair, side), "w", 7, value)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=rf"{side}/.*safetensors: tensor w holds NaN or infinity at element 7,"):
        api.repair(pair.base, pair.ft, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert snapshot(tmp_path) == before
    report = api.repair(pair.base, pair.ft, tmp_path / "out", on_nonfinite="copy-ft")
    assert {name: r.action for name, r in report.tensors.items()} == {"a": "repaired", "w": "kept_ft"}
    assert any("tensor w holds NaN" in warning for warning in report.warnings)
    assert read_tensors(tmp_path / "out")["w"] == read_tensors(pair.ft)["w"]


def test_a_vector_that_is_not_finite_is_refused_too(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {"w": (64, 64), "v": (64,)})
    spoil(pair.ft, "v", 63, math.nan)
    with pytest.raises(InputError, match="tensor v holds NaN or infinity at element 63"):
        api.repair(pair.base, pair.ft, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["v", "grown", "left", "gone", "f8"])
def test_what_is_not_used_of_base_is_refused_if_it_is_not_finite(tmp_path: Path, name: str) -> None:
    """BASE's side of a vector, of a tensor of another shape, of an excluded one, and of one that FT lacks.

    FP8 is no plain number and is not looked into. Where such tensors are passed through, FT's side is all that counts.
    """
    rng = np.random.default_rng(0)
    ft = {"w": bf16(rng.standard_normal((64, 64))), "v": bf16(np.ones(70)), "grown": bf16(np.ones((80, 64)))}
    ft |= {"left": bf16(rng.standard_normal((64, 64))), "f8": ("F8_E4M3", (64, 64), b"\x38" * 4096)}
    base = ft | {"grown": bf16(np.ones((70, 64))), "gone": bf16(np.ones((70, 70)))}
    if name == "f8":
        base["f8"] = ("F8_E4M3", (64, 64), b"\x7f" * 4096)
    pair = Pair(write_split(tmp_path / "base", base, 1), write_split(tmp_path / "ft", ft, 1))
    planned = api.plan(pair.base, pair.ft, exclude="left")
    sound = api.repair(pair.base, pair.ft, tmp_path / "sound", exclude="left")
    assert sound.timings.bytes_read == pytest.approx(planned.read_bytes, abs=2 << 14)
    if name == "f8":
        return
    spoil(pair.base, name, 69, math.inf)
    with pytest.raises(
        InputError, match=rf"base/model\.safetensors: tensor {name} holds NaN or infinity at element 69"
    ):
        api.repair(pair.base, pair.ft, tmp_path / "out", exclude="left")
    assert not (tmp_path / "out").exists()
    report = api.repair(pair.base, pair.ft, tmp_path / "out", exclude="left", on_nonfinite="copy-ft")
    assert read_tensors(tmp_path / "out") == read_tensors(tmp_path / "sound")
    assert report.timings.bytes_read < sound.timings.bytes_read


def test_a_refusal_leaves_what_was_in_out_before(tmp_path: Path) -> None:
    """An empty folder stays; with --overwrite other files stay, and only the earlier result is gone."""
    pair = write_pair(tmp_path, {"w": (64, 64)}, shards=(1, 1))
    out = tmp_path / "out"
    api.repair(pair.base, pair.ft, out)
    (out / "notes.txt").write_text("mine")
    (out / "sub").mkdir()
    (out / "sub" / "kept.bin").write_bytes(b"mine")
    (tmp_path / "empty").mkdir()
    spoil(pair.ft, "w", 0, math.nan)
    with pytest.raises(InputError, match="NaN"):
        api.repair(pair.base, pair.ft, tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []
    with pytest.raises(InputError, match="NaN"):
        api.repair(pair.base, pair.ft, out, overwrite=True)
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*")) == ["notes.txt", "sub", "sub/kept.bin"]


def test_an_interrupted_run_that_ends_in_a_refusal_takes_out_away_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = write_pair(tmp_path, {"w": (64, 64), "a": (60, 60)}, shards=(1, 1))
    spoil(pair.ft, "a", 0, math.nan)
    monkeypatch.setattr(osfile, "os", Kernel(("pwrite",), fails(4, 5)))
    with pytest.raises(OutputError):
        api.repair(pair.base, pair.ft, tmp_path / "out", workers=1)
    assert (tmp_path / "out").exists()
    monkeypatch.undo()
    with pytest.raises(InputError, match="NaN"):
        api.repair(pair.base, pair.ft, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
