"""What a person is told of a plan."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from streamrepair import api
from streamrepair.checkpoint import sidecars
from streamrepair.engine.notices import plan_warnings
from streamrepair.errors import InputError
from streamrepair.units import format_bytes
from tests.builders import Raw, bf16
from tests.faults import Kernel, fails
from tests.pairs import write_pair, write_split

SIDE = (64, 64)


def _told(base: Path, ft: Path, **options: object) -> list[str]:
    return plan_warnings(api.plan(base, ft, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_told_of(tmp_path: Path, option: str) -> None:
    """A slip of the pen would make FT's copy of what was to be repaired, or repair what was to be left."""
    pair = write_pair(tmp_path, {"w.q": SIDE, "w.k": SIDE})
    assert _told(pair.base, pair.ft, **{option: r"w\.x"}) == [rf"--{option} w\.x matches no tensor of FT"]
    assert _told(pair.base, pair.ft, **{option: r"w\.q"}) == []


QUANTISED: Raw = ("F8_E4M3", (128, 128), bytes(128 * 128))


def test_a_checkpoint_most_of_which_cannot_be_repaired_is_told_of(tmp_path: Path) -> None:
    matrix = bf16(np.eye(64))
    base = write_split(tmp_path / "base", {"q": QUANTISED, "w": matrix}, 1)
    ft = write_split(tmp_path / "ft", {"q": QUANTISED, "w": matrix}, 1)
    reason = "e.g. q [128, 128], dtype F8_E4M3 (base) is not a plain floating-point weight"
    assert _told(base, ft) == [f"most of FT is kept as it is: {reason}"]
    assert _told(base, ft, exclude="w") == [f"no tensor is repaired; FT is kept as it is: {reason}"]
    assert _told(base, ft, include="w") == [], "what was not asked for is not missed"


def test_fused_experts_are_told_of(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {"experts": (4, 64, 64), "w": SIDE})
    assert _told(pair.base, pair.ft) == ["most of FT is kept as it is: e.g. experts [4, 64, 64], 3-D, not a matrix"]


def test_one_of_something_is_said_so(tmp_path: Path) -> None:
    w = bf16(np.eye(64))
    base = write_split(tmp_path / "base", {"w": w, "gone": w, "resized": w, "thin": bf16(np.ones((600, 2)))}, 1)
    ft = {"w": w, "new": bf16(np.eye(66)), "resized": bf16(np.eye(65)), "thin": bf16(np.ones((600, 2)))}
    assert _told(base, write_split(tmp_path / "ft", ft, 1)) == [
        "1 tensor of BASE is not in FT and is dropped, e.g. gone",
        "1 tensor of FT is not in BASE and is kept, e.g. new",
        "1 matrix has a side shorter than 8, of which the law of large matrices says little; --exclude passes them "
        "through, e.g. thin [600, 2]",
        "1 tensor differs in shape and is kept, e.g. resized",
    ]


def test_another_prefix_is_told_of(tmp_path: Path) -> None:
    """A head alone is shared, and a run would make a copy of FT that passes for a repair."""
    w = bf16(np.eye(64))
    base = write_split(tmp_path / "base", {"lm_head.weight": w, "model.layers.0.q.weight": w}, 1)
    ft = write_split(tmp_path / "ft", {"lm_head.weight": w, "model.language_model.layers.0.q.weight": w}, 1)
    assert _told(base, ft)[1] == (
        "1 tensor of FT is not in BASE and is kept, e.g. model.language_model.layers.0.q.weight; BASE has "
        "model.layers.0.q.weight, and only equal names are paired"
    )


def test_models_of_two_types_are_told_of(tmp_path: Path) -> None:
    """Their tensors may have the same names and shapes, and the result would be BASE with little of FT."""
    pair = write_pair(tmp_path, {"w": SIDE}, shards=(1, 1))
    (pair.ft / "config.json").write_text('{"model_type": "other"}')
    said = "BASE is a model of type none, FT of type other, by their config.json: was FT tuned from BASE?"
    assert _told(pair.base, pair.ft) == [said]
    for unsaid in ("{}", '{"model_type": 1}', "[]", "{", "[" * 100_000):
        (pair.ft / "config.json").write_text(unsaid)
        assert _told(pair.base, pair.ft) == []


def test_a_program_that_holds_much_itself_is_told_of(tmp_path: Path) -> None:
    """One that has imported torch holds 200 MB, which no projection from headers knows."""
    pair = write_pair(tmp_path, {"w": SIDE}, shards=(1, 1))
    held = np.ones(20_000_000)
    ram = api.plan(pair.base, pair.ft).ram_projected_bytes + 1_000_000
    (said,) = api.repair(pair.base, pair.ft, tmp_path / "little", ram=ram).warnings
    assert said.startswith("the program held ")
    assert said.endswith(f" are used, --ram allows {format_bytes(ram)}")
    assert api.repair(pair.base, pair.ft, tmp_path / "much", ram="16GB").warnings == ()
    del held


def test_what_is_named_as_a_sidecar_and_is_no_file_is_told_of(tmp_path: Path) -> None:
    """In a half-downloaded snapshot of the Hub's cache the tokenizer is a link that leads nowhere."""
    pair = write_pair(tmp_path, {"w": SIDE}, shards=(1, 1))
    (pair.ft / "tokenizer.json").unlink()
    (pair.ft / "tokenizer.json").symlink_to("../blobs/4d7a")
    (pair.ft / "vocab.json").symlink_to("vocab.json")
    (tmp_path / "shared").mkdir()
    (pair.ft / "templates").symlink_to(tmp_path / "shared")
    (pair.ft / "original").symlink_to(tmp_path / "shared")  # needed by nobody, as it would not be without the link
    said = (
        "FT: left out beside the weights, no regular files or readable folders three deep at most: "
        "templates/, tokenizer.json, vocab.json"
    )
    assert _told(pair.base, pair.ft) == [said]
    assert api.repair(pair.base, pair.ft, tmp_path / "out").warnings == (said,)


def test_a_folder_beside_the_weights_that_cannot_be_listed_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lost+found on a volume of its own: a plan failed on it. FT's own folder has to be readable."""
    pair = write_pair(tmp_path, {"w": SIDE}, shards=(1, 1))
    (pair.ft / "lost+found").mkdir()
    planned = api.plan(pair.base, pair.ft)
    monkeypatch.setattr(sidecars, "os", Kernel(("scandir",), fails(2, errno.EACCES)))
    said = "FT: left out beside the weights, no regular files or readable folders three deep at most: lost+found/"
    assert plan_warnings(planned) == [said]
    monkeypatch.setattr(sidecars, "os", Kernel(("scandir",), fails(1, errno.EACCES)))
    with pytest.raises(InputError, match="cannot be listed"):
        plan_warnings(planned)


def test_what_is_not_copied_beside_the_weights_is_told_of(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {"w": SIDE}, shards=(1, 1))
    (pair.ft / "2_Dense").mkdir()
    for name in ("2_Dense/model.safetensors", *(f"voice{i}.npy" for i in range(6))):
        (pair.ft / name).write_bytes(b"")
    few = "voice0.npy, voice1.npy, voice2.npy, voice3.npy, voice4.npy"
    said = (
        "FT: weights in folders beside these are neither repaired nor copied, e.g. 2_Dense/model.safetensors: "
        "name such folders by themselves",
        f"FT: not copied beside the weights: {few} and 1 more: copy what loading needs",
    )
    assert tuple(_told(pair.base, pair.ft)) == said
    assert api.repair(pair.base, pair.ft, tmp_path / "out").warnings == said


def test_a_tokenizer_that_only_base_has_is_told_of(tmp_path: Path) -> None:
    """Trainers save none unless they are given it: OUT would not load, and nobody would know before."""
    pair = write_pair(tmp_path, {"w": SIDE}, shards=(1, 1))
    (pair.ft / "tokenizer.json").unlink()
    (pair.ft / "images").mkdir()
    (pair.ft / "images" / "tokenizer.json").write_text("{}")
    said = "FT has no tokenizer beside its weights, and OUT will have none; BASE has tokenizer.json"
    assert _told(pair.base, pair.ft) == [said]
    (pair.ft / "tokenizer.model.v3").write_text("")
    assert _told(pair.base, pair.ft) == []
    (pair.ft / "config.json").rename(pair.ft / "other.json")
    said = "FT has no config.json beside its weights, and OUT will have none; BASE has config.json"
    assert _told(pair.base, pair.ft) == [said]
    weights = pair.ft / "model.safetensors"
    assert len(_told(pair.base, weights)) == 2, "named as a file, without a config.json, it has no neighbours at all"
    (pair.base / "config.json").unlink()
    assert _told(pair.base / "model.safetensors", weights) == []
