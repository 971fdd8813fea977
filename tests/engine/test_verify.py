"""`verify` names whatever is not as the run left it, and `--deep` recomputes from the inputs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from streamrepair import api
from streamrepair.errors import DamageError, InputError, UsageError
from tests.command import run
from tests.pairs import DEMO, Pair, stored, write_pair, write_split

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
    assert _found(out) == {"model-00002-of-00002.safetensors": "a shard of the result, now missing"}


def test_a_broken_shard_does_not_hide_what_is_wrong_elsewhere(out: Path) -> None:
    """The other shard's tensors are compared all the same, and every fault is listed."""
    first, second = (out / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    os.truncate(first, 5)
    second.write_bytes(second.read_bytes()[:-1] + b"\x33")
    (out / "tokenizer.json").unlink()
    assert list(_found(out)) == [first.name, "tokenizer.json", "c"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "other.safetensors.index.json", "pytorch_model.bin", "x.gguf", "adapter_config.json"]
)
def test_what_loaders_would_pick_up_is_a_stray(out: Path, name: str) -> None:
    """Also one that they would prefer to the result."""
    shutil.copy(out / "model-00001-of-00002.safetensors", out / name)
    assert name in _found(out)
    (out / name).unlink()
    (out / "notes.txt").write_text("mine")
    (out / "optimizer.bin").write_bytes(b"")
    assert _found(out) == {}


def test_a_shard_that_is_a_link_is_damage(out: Path, tmp_path: Path) -> None:
    shard = out / "model-00001-of-00002.safetensors"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    assert _found(out) == {shard.name: "a symbolic link, expected the file that was written"}


def test_a_report_that_leads_elsewhere_is_not_followed(out: Path, tmp_path: Path) -> None:
    shutil.copy(out / "model-00001-of-00002.safetensors", tmp_path / "x.safetensors")
    path = out / "streamrepair.json"
    path.write_text(path.read_text().replace('"model-00001-of-00002.safetensors": ', '"../x.safetensors": '))
    assert "no plain file name" in _found(out)["../x.safetensors"]


def test_a_shard_less_in_result_and_report_alike_is_found(out: Path) -> None:
    """FT's headers are written as they are, so that the report's digest of FT's must be theirs."""
    path = out / "streamrepair.json"
    report = json.loads(path.read_text())
    name = "model-00002-of-00002.safetensors"
    lost = [n for n in report["tensors"] if n in ("b", "c")]
    for where, key in ((report["headers"], name), *((report["tensors"], n) for n in lost)):
        where.pop(key)
    report["ft"]["shards"].remove(name)
    path.write_text(json.dumps(report))
    (out / name).unlink()
    (out / "model.safetensors.index.json").unlink()
    assert _found(out) == {"streamrepair.json": "its headers' digests are not those of FT"}


def test_a_missing_index(out: Path) -> None:
    (out / "model.safetensors.index.json").unlink()
    (what,) = _found(out).values()
    assert "no index" in what


@pytest.mark.parametrize("offset", [7, -60])
def test_a_bit_flipped_in_the_index_is_found(out: Path, pair: Pair, offset: int) -> None:
    """In its metadata, too, of which no tensor tells."""
    path = out / "model.safetensors.index.json"
    content = bytearray(path.read_bytes())
    whole = bytes(content)
    content[offset] ^= 1
    path.write_bytes(content)
    assert "digest" in _found(out)[path.name]
    assert not api.verify(out, repair=True).damage
    assert path.read_bytes() == whole


def test_an_index_that_is_broken_is_not_to_be_downloaded(out: Path) -> None:
    """As that of an input would be."""
    (out / "model.safetensors.index.json").write_text("{")
    assert "broken or cut JSON" in _found(out)[str(out)]
    assert "download" not in _found(out)[str(out)]


def test_a_report_without_a_digest_of_the_index(out: Path) -> None:
    """As earlier versions wrote them."""
    path = out / "streamrepair.json"
    report = json.loads(path.read_text())
    for field in ("index_digest", "report_digest"):
        assert report.pop(field).startswith("xxh3-128:")
    path.write_text(json.dumps(report))
    index = out / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("total_size", "total_sjze"))
    assert _found(out) == {}


@pytest.mark.parametrize("cut", [1, 5000])
def test_a_truncated_shard(out: Path, cut: int) -> None:
    path = out / "model-00001-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - cut)
    (what,) = _found(out).values()
    assert path.name in what
    assert "download" not in what  # as an input would be


def test_a_stray_shard(out: Path) -> None:
    shutil.copy(out / "model-00001-of-00002.safetensors", out / "stray.safetensors")
    assert list(_found(out)) == ["stray.safetensors"]


def test_a_missing_sidecar(out: Path) -> None:
    (out / "tokenizer.json").unlink()
    assert _found(out) == {"tokenizer.json": "copied from FT by the run, now missing"}


@pytest.mark.parametrize("name", ["file:a%41.json", "\udcff.json"])
def test_a_sidecar_whose_name_is_not_text_or_looks_like_its_escape(pair: Pair, tmp_path: Path, name: str) -> None:
    (pair.ft / name).write_text("{}")
    report = api.repair(pair.base, pair.ft, tmp_path / "out")
    assert any(sidecar.startswith("file:") for sidecar in report.sidecars)
    assert _found(tmp_path / "out") == {}
    (tmp_path / "out" / name).unlink()
    assert list(_found(tmp_path / "out").values()) == ["copied from FT by the run, now missing"]


@pytest.mark.parametrize("content", [b"", b"{}  "])
def test_a_sidecar_that_is_not_the_copy_that_was_made(out: Path, content: bytes) -> None:
    (out / "tokenizer.json").write_bytes(content)
    (what,) = _found(out).values()
    assert what.startswith("digest xxh3-128:")
    assert len(api.verify(out, deep=True, sample=1).deep) == 1


def test_a_report_without_digests_of_sidecars(out: Path) -> None:
    """As earlier versions wrote them."""
    path = out / "streamrepair.json"
    report = json.loads(path.read_text())
    assert report.pop("sidecar_digests").keys() == {"config.json", "tokenizer.json"}
    assert report.pop("report_digest")
    path.write_text(json.dumps(report))
    (out / "tokenizer.json").write_bytes(b"")
    assert _found(out) == {}


def _edited(out: Path, change: dict[str, object] | None, name: str = "b") -> None:
    """The report changed in one record, and vouched for by no digest of its own."""
    path = out / "streamrepair.json"
    report = json.loads(path.read_text())
    report["report_digest"] = None
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


@pytest.mark.parametrize("field", ["rank_kept", "threshold", "sigma_hat", "frob_delta_in", "seconds"])
def test_an_edited_number_of_the_report(out: Path, field: str) -> None:
    path = out / "streamrepair.json"
    report = json.loads(path.read_text())
    report["tensors"]["b"][field] += 1
    path.write_text(json.dumps(report, indent=2) + "\n")
    assert _found(out) == {"streamrepair.json": "not as it was written: edited since, or damaged"}


def _jq(text: str, *options: str) -> str:
    if shutil.which("jq") is None:
        pytest.skip("no jq")
    return subprocess.run(["jq", *options, "."], input=text, capture_output=True, text=True, check=True).stdout


def _spelt_otherwise(text: str) -> str:
    """Floats with 17 digits, or none where they are whole; names in escapes."""

    def other(found: re.Match[str]) -> str:
        value = float(found[1])
        return str(int(value)) if value.is_integer() else f"{value:.16e}"

    # A value to a line.
    text = re.sub(r"(?<=[ :])(-?[0-9]+[.e][0-9.e+-]*)(?=,?$)", other, text, flags=re.MULTILINE)
    return text.replace('"tensors"', '"t\\u0065nsors"').replace('"rank_kept"', '"rank\\u005fkept"')


@pytest.mark.parametrize(
    "lay_out",
    [
        lambda text: json.dumps(json.loads(text)),
        lambda text: json.dumps(json.loads(text), indent=8, sort_keys=True),
        lambda text: json.dumps(json.loads(text, object_pairs_hook=lambda pairs: dict(reversed(pairs)))),
        _jq,
        lambda text: _jq(text, "-cS"),
        _spelt_otherwise,
    ],
    ids=["compact", "sorted", "reversed", "jq", "jq sorted", "numbers"],
)
def test_a_report_laid_out_anew_says_what_it_said(pair: Pair, out: Path, lay_out: Callable[[str], str]) -> None:
    path = out / "streamrepair.json"
    before = path.read_text()
    after = lay_out(before)
    assert after != before
    path.write_text(after)
    assert _found(out) == {}
    api.repair(pair.base, pair.ft, out)
    assert path.read_text() == after
    report = json.loads(after)
    report["tensors"]["b"]["rank_kept"] += 1
    path.write_text(lay_out(json.dumps(report, indent=2) + "\n"))
    assert list(_found(out)) == ["streamrepair.json"]


@pytest.mark.parametrize("content", [b"1", b"[1e999]", b'"\xed\xa0\x80"', b'"\xff"', b'{"a": {"b": null}}'])
@pytest.mark.parametrize("before", [b'"format"', b'"action"'])
def test_a_member_that_is_none_of_ours_is_an_edit(out: Path, before: bytes, content: bytes) -> None:
    path = out / "streamrepair.json"
    path.write_bytes(path.read_bytes().replace(before, b'"other": ' + content + b", " + before, 1))
    assert list(_found(out)) == ["streamrepair.json"]


def test_a_member_that_is_left_out_is_an_edit(out: Path) -> None:
    """Though reading makes up for it."""
    path = out / "streamrepair.json"
    report = json.loads(path.read_text())
    assert report["tensors"]["b"].pop("warnings") == []
    path.write_text(json.dumps(report))
    assert list(_found(out)) == ["streamrepair.json"]


def test_a_bit_flipped_in_the_report_is_found_wherever_it_is(out: Path) -> None:
    path = out / "streamrepair.json"
    content = path.read_bytes()
    for at in range(0, content.index(b'"report_digest"'), 41):
        flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        with contextlib.suppress(ValueError):
            if json.loads(flipped) == json.loads(content):
                continue  # the 17th digit of a number that is the nearest to either
        path.write_bytes(flipped)
        try:
            assert api.verify(out).damage, content[at - 20 : at + 20]
        except DamageError:  # no report at all
            continue


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"format": "streamrepair.report/1"}'])
def test_a_result_without_a_report_is_none(out: Path, content: bytes | None) -> None:
    path = out / "streamrepair.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DamageError, match=r"streamrepair\.json: (missing|unreadable).*run the repair again"):
        api.verify(out)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_a_report_that_is_no_text_is_written_again(pair: Pair, out: Path, nested: bool, overwrite: bool) -> None:
    path = out / "streamrepair.json"
    path.write_bytes(b'{"x": ' + b"[" * 100_000 if nested else path.read_bytes().replace(b"xxh3-128", b"\xff", 1))
    with pytest.raises(DamageError, match=r"streamrepair\.json: unreadable"):
        api.verify(out)
    api.repair(pair.base, pair.ft, out, overwrite=overwrite)
    assert not api.verify(out).damage


def test_what_cannot_be_looked_up_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(DamageError, match=r"cannot be looked up \(File name too long\)"):
        api.verify(tmp_path / ("n" * 300))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_result_that_cannot_be_listed_is_damaged(out: Path) -> None:
    out.chmod(0o311)
    try:
        assert "cannot be listed" in api.verify(out).damage[0].what
    finally:
        out.chmod(0o755)


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


@pytest.mark.parametrize("within", [0, 1])
def test_deep_allows_a_rank_what_the_report_leaves_open(pair: Pair, tmp_path: Path, within: int) -> None:
    """`--noise-estimate fast` states an interval for τ, and how many values lie in it."""
    exact = api.repair(pair.base, pair.ft, tmp_path / "exact", include="^b$").tensors["b"]
    out = tmp_path / "out"
    assert exact.rank_kept is not None
    for scale in np.arange(1.0, 3.0, 0.02):  # up to where one value less is kept
        report = api.repair(pair.base, pair.ft, out, scale=float(scale), include="^b$", overwrite=True)
        kept = report.tensors["b"].rank_kept
        if kept != exact.rank_kept:
            break
    assert kept == exact.rank_kept - 1
    _edited(out, {"within_interval": within})
    path = out / "streamrepair.json"
    edited = json.loads(path.read_text())
    edited["settings"]["scale"] = 1.0
    path.write_text(json.dumps(edited))
    assert [d.where for d in api.verify(out, deep=True).damage] == ["b"] * (1 - within)


@pytest.mark.parametrize("dtypes", [("BF16", "BF16"), ("F32", "F32")])
def test_deep_finds_other_bytes_that_the_report_vouches_for(tmp_path: Path, dtypes: tuple[str, str]) -> None:
    """FT's tensor in the place of the repaired one, its digest in the report: only the inputs can tell."""
    pair = write_pair(tmp_path, {"w": (64, 64), "b": (64, 48)}, dtypes=dtypes, shards=(1, 1))
    out = tmp_path / "out"
    api.repair(pair.base, pair.ft, out)
    assert api.verify(out, deep=True).damage == ()
    shutil.copy(pair.ft / "model.safetensors", out / "model.safetensors")
    for damage in api.verify(out).damage:
        _edited(out, {"digest": damage.what.split()[1].rstrip(",")}, damage.where)
    assert api.verify(out).damage == ()
    result = api.verify(out, deep=True)
    assert sorted(d.where for d in result.damage) == ["b", "w"]
    assert all("float64" in d.what for d in result.damage)


@pytest.mark.parametrize("shape", [(300, 300), (128, 127)])
def test_deep_does_not_ask_for_exact_zeros(tmp_path: Path, shape: tuple[int, int]) -> None:
    """Where W_base is zero and Δ has no say, all but the last bits of Δ* are rounding, and any of them is right."""
    rng = np.random.default_rng(0)
    delta = np.zeros(shape)
    changed = rng.permutation(shape[1])[: shape[1] // 2 + 2]
    delta[:, changed] = 0.01 * rng.standard_normal((shape[0], len(changed)))
    base = write_split(tmp_path / "base", {"w": stored(np.zeros(shape), "BF16")}, 1)
    ft = write_split(tmp_path / "ft", {"w": stored(delta, "BF16")}, 1)
    assert api.repair(base, ft, tmp_path / "out").tensors["w"].action == "repaired"
    result = api.verify(tmp_path / "out", deep=True)
    assert result.damage == ()
    assert result.deep[0].correctly_rounded > 0.99


def test_deep_leaves_float16_what_delta_may_be_off_by(tmp_path: Path) -> None:
    """Its unit is an eighth of bfloat16's: an error of 1e-5 of Δ* moves a value in a hundred, with Δ as large as W."""
    rng, n = np.random.default_rng(0), 300
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in "lr")
    delta = (left / np.arange(1.0, n + 1)) @ right.T
    weight = rng.standard_normal((n, n))
    base = write_split(tmp_path / "base", {"w": stored(weight, "F16")}, 1)
    ft = write_split(tmp_path / "ft", {"w": stored(weight + 0.7 * delta / delta.std(), "F16")}, 1)
    api.repair(base, ft, tmp_path / "out")
    result = api.verify(tmp_path / "out", deep=True)
    assert result.damage == ()
    assert result.deep[0].correctly_rounded > 0.97
    assert result.deep[0].delta_error < 1e-4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [1e250, 1e-250])
def test_deep_sees_an_error_whose_square_no_float64_can_hold(tmp_path: Path, size: float) -> None:
    rng = np.random.default_rng(0)
    base, out = size * rng.standard_normal((64, 48)), tmp_path / "out"
    ft = base + size * (np.outer(np.ones(64), np.ones(48)) + 0.1 * rng.standard_normal((64, 48)))
    for folder, weights in ((tmp_path / "base", base), (tmp_path / "ft", ft)):
        write_split(folder, {"b": weights}, 1)
    norm = api.repair(tmp_path / "base", tmp_path / "ft", out).tensors["b"].frob_delta_out
    assert [check.fault for check in api.verify(out, deep=True).deep] == [None]
    path = out / "model.safetensors"
    content = path.read_bytes()
    written = np.frombuffer(content[-ft.nbytes :]).copy()
    written[0] += 1e-3 * (norm or 0.0)
    path.write_bytes(content[: -ft.nbytes] + written.tobytes())
    for damage in api.verify(out).damage:
        _edited(out, {"digest": damage.what.split()[1].rstrip(",")}, damage.where)
    assert "its delta is off by 1.0e-03" in str(api.verify(out, deep=True).deep[0].fault)


def test_deep_states_how_well_a_float32_result_agrees(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {"w": (300, 80), "v": (80, 300)})
    api.repair(pair.base, pair.ft, tmp_path / "out", out_dtype="float32")
    result = api.verify(tmp_path / "out", deep=True)
    assert result.damage == ()
    assert all(check.delta_error < 1e-4 for check in result.deep)


def test_deep_refuses_inputs_that_are_others(out: Path, pair: Pair) -> None:
    for path in pair.ft.glob("*.safetensors"):
        path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"qt"'))
    with pytest.raises(InputError, match=r"FT .*headers' digest is sha256:.*put the checkpoint back"):
        api.verify(out, deep=True)


def test_deep_finds_inputs_that_were_named_from_another_folder(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    api.repair("base/model.safetensors", "ft", "out")
    monkeypatch.chdir("/")
    assert len(api.verify(tmp_path / "out", deep=True).deep) == 3


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
