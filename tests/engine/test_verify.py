"""`verify` names whatever is not as the run left it, and `--deep` recomputes from the inputs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from streamrepair import api
from streamrepair.errors import DamageError, InputError, UsageError
from tests.command import run
from tests.pairs import DEMO, Pair, write_pair

SHAPES = {"a": (64, 40), "b": (40, 64), "v": (40,), "c": (64, 64)}


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return write_pair(tmp_path, SHAPES, shards=(1, 2))


@pytest.fixture
def out(pair: Pair, tmp_path: Path) -> Path:
    api.repair(pair.base, pair.ft, tmp_path / "out")
    return tmp_path / "out"


def _found(out: Path) -> dict[str, str]:
    return {damage.where: damage.what for damage in api.verify(out).damage}


def test_a_whole_result(out: Path) -> None:
    result = api.verify(out)
    assert (result.damage, result.deep, result.tensors) == ((), (), 4)
    assert result.bytes == sum(p.stat().st_size for p in out.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["a", "b", "v", "c"])
def test_a_flipped_bit_is_found_in_whichever_tensor_it_is(out: Path, name: str) -> None:
    for path in out.glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        entry = json.loads(content[8:start]).get(name)
        if entry is not None:
            content[start + entry["data_offsets"][1] - 1] ^= 1
            path.write_bytes(content)
    assert list(_found(out)) == [name]
    assert "digest" in _found(out)[name]


def test_a_bit_flipped_in_a_header_is_found(out: Path) -> None:
    """In the metadata too, which no tensor's digest covers."""
    path = out / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"qt"'))
    assert _found(out) == {path.name: "its header is not the one that was written"}


def test_a_missing_shard(out: Path) -> None:
    (out / "model-00002-of-00002.safetensors").unlink()
    (what,) = _found(out).values()
    assert "model-00002-of-00002.safetensors" in what


def test_a_missing_index(out: Path) -> None:
    (out / "model.safetensors.index.json").unlink()
    (what,) = _found(out).values()
    assert "no index" in what


@pytest.mark.parametrize("cut", [1, 5000])
def test_a_truncated_shard(out: Path, cut: int) -> None:
    path = out / "model-00001-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - cut)
    (what,) = _found(out).values()
    assert path.name in what


def test_a_stray_shard(out: Path) -> None:
    shutil.copy(out / "model-00001-of-00002.safetensors", out / "stray.safetensors")
    assert list(_found(out)) == ["stray.safetensors"]


def test_a_missing_sidecar(out: Path) -> None:
    (out / "tokenizer.json").unlink()
    assert _found(out) == {"tokenizer.json": "copied from FT by the run, now missing"}


def _edited(out: Path, change: dict[str, object] | None, name: str = "b") -> None:
    path = out / "streamrepair.json"
    report = json.loads(path.read_text())
    if change is None:
        del report["tensors"][name]
    else:
        report["tensors"].setdefault(name, dict(report["tensors"]["b"])).update(change)
    path.write_text(json.dumps(report))


@pytest.mark.parametrize(
    ("change", "name", "what"),
    [
        ({"digest": "xxh3-128:00"}, "b", "digest xxh3-128:"),
        ({"digest": None}, "b", "the report has no digest of it"),
        ({"shape": [64, 40]}, "b", r"BF16 [40, 64], the report has BF16 [64, 40]"),
        ({"dtype": "F16"}, "b", r"the report has F16 [40, 64]"),
        ({"action": "dropped"}, "b", "in a shard, but not in the report"),
        (None, "b", "in a shard, but not in the report"),
        ({}, "invented", "in the report, but in no shard"),
    ],
)
def test_an_edited_report(out: Path, change: dict[str, object] | None, name: str, what: str) -> None:
    _edited(out, change, name)
    assert what in _found(out)[name]


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"format": "streamrepair.report/1"}'])
def test_a_result_without_a_report_is_none(out: Path, content: bytes | None) -> None:
    path = out / "streamrepair.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DamageError, match=r"streamrepair\.json: (missing|unreadable).*run the repair again"):
        api.verify(out)


def test_a_report_of_another_format_is_refused(out: Path) -> None:
    path = out / "streamrepair.json"
    path.write_text(path.read_text().replace("streamrepair.report/1", "streamrepair.report/9"))
    with pytest.raises(DamageError, match="report/9"):
        api.verify(out)


def test_deep_agrees_on_the_demo_pair(tmp_path: Path) -> None:
    report = api.repair(DEMO / "base", DEMO / "ft", tmp_path / "out")
    result = api.verify(tmp_path / "out", deep=True, sample=6)
    assert (len(result.deep), result.damage) == (6, ())
    for check in result.deep:
        assert check.rank_kept == check.rank_exact == report.tensors[check.name].rank_kept
        assert check.correctly_rounded > 0.999


def test_deep_checks_as_many_as_asked_and_no_more_than_there_are(out: Path) -> None:
    assert len(api.verify(out, deep=True, sample=2).deep) == 2
    assert {check.name for check in api.verify(out, deep=True, sample=99).deep} == {"a", "b", "c"}


def test_deep_finds_a_rank_that_was_edited(out: Path) -> None:
    _edited(out, {"rank_kept": 1})
    damage = api.verify(out, deep=True).damage
    assert [d.where for d in damage] == ["b"]
    assert damage[0].what.startswith("rank 1, a float64 SVD keeps ")


def test_deep_refuses_inputs_that_are_gone(out: Path, pair: Pair) -> None:
    shutil.rmtree(pair.base)
    with pytest.raises(InputError, match="BASE"):
        api.verify(out, deep=True)


@pytest.mark.parametrize("sample", [0, -1])
def test_a_sample_of_none_is_refused(out: Path, sample: int) -> None:
    with pytest.raises(UsageError, match="--sample"):
        api.verify(out, deep=True, sample=sample)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("bit", "c: digest"),
        ("shard", "model-00002-of-00002.safetensors"),
        ("stray", "stray.safetensors"),
        ("sidecar", "tokenizer.json"),
        ("report", "streamrepair.json: missing"),
    ],
)
def test_the_command_exits_4_naming_what_is_damaged(out: Path, fault: str, named: str) -> None:
    shard = out / "model-00002-of-00002.safetensors"
    match fault:
        case "bit":
            shard.write_bytes(shard.read_bytes()[:-1] + b"\x33")
        case "shard":
            shard.unlink()
        case "stray":
            shutil.copy(shard, out / "stray.safetensors")
        case "sidecar":
            (out / "tokenizer.json").unlink()
        case "report":
            (out / "streamrepair.json").unlink()
    result = run("verify", out, "--json")
    assert result.status == 4
    assert named in result.error
    if fault != "report":
        assert len(json.loads(result.out)["damage"]) == 1


def test_the_command_exits_0_and_its_json_parses(out: Path) -> None:
    result = run("verify", out, "--deep", "--sample", 1, "--json")
    assert (result.status, result.err) == (0, "")
    parsed = json.loads(result.out)
    assert (parsed["damage"], parsed["tensors"], len(parsed["deep"])) == ([], 4, 1)
