"""`verify --repair` does damaged tensors again and nothing else, and what it cannot put right stays reported."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from streamrepair import api
from streamrepair.engine import task
from streamrepair.errors import BudgetError, DamageError, InputError, OutputError
from tests.command import run
from tests.pairs import Pair, shard_bytes, snapshot, write_pair

SHAPES = {"a": (64, 40), "b": (40, 64), "v": (40,), "c": (64, 64)}
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return write_pair(tmp_path, SHAPES, shards=(1, 2))


@pytest.fixture
def out(pair: Pair, tmp_path: Path) -> Path:
    api.repair(pair.base, pair.ft, tmp_path / "out", scale=1.1)
    return tmp_path / "out"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of tensors that are worked on from now on."""
    names: list[str] = []
    run_task = task.run_task

    def noted(work: task.Task, *rest: object) -> object:
        names.append(work.name)
        return run_task(work, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("streamrepair.engine.task.run_task", noted)
    return names


def _flip(path: Path, name: str) -> None:
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + json.loads(content[8:start])[name]["data_offsets"][1] - 1] ^= 4
    path.write_bytes(content)


def test_a_whole_result_is_left_as_it_is(out: Path) -> None:
    before = snapshot(out)
    result = api.verify(out, repair=True)
    assert (result.damage, result.mended) == ((), ())
    assert snapshot(out) == before


def test_only_the_damaged_tensor_is_done_again(out: Path, started: list[str]) -> None:
    """With the settings of the report, which are not the default ones."""
    expected = shard_bytes(out)
    _flip(out / SECOND, "c")
    result = api.verify(out, repair=True)
    assert (result.damage, [d.where for d in result.mended], started) == ((), ["c"], ["c"])
    assert shard_bytes(out) == expected
    assert json.loads((out / "streamrepair.json").read_text())["settings"]["scale"] == 1.1


@pytest.mark.parametrize(
    ("damage", "redone"), [("cut", {"v"}), ("header", set()), ("gone", {"a", "v"}), ("all of it", {"a", "v"})]
)
def test_a_shard_that_is_broken_or_lost_is_written_again(
    out: Path, started: list[str], damage: str, redone: set[str]
) -> None:
    """A cut costs the tensors it hits, a header none, a shard that is gone its own; the other shard nothing."""
    expected, path = shard_bytes(out), out / FIRST
    match damage:
        case "cut":
            os.truncate(path, path.stat().st_size - 10)
        case "header":
            path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"qt"'))
        case "gone":
            path.unlink()
        case "all of it":
            path.write_bytes(b"\xff" * path.stat().st_size)
    result = api.verify(out, repair=True)
    assert result.damage == ()
    assert [d.where for d in result.mended] == [FIRST]
    assert shard_bytes(out) == expected
    assert set(started) == redone


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors.index.json"])
def test_what_lies_beside_the_weights_is_written_again(out: Path, started: list[str], name: str) -> None:
    content = (out / name).read_bytes()
    (out / name).unlink()
    assert api.verify(out, repair=True).damage == ()
    assert ((out / name).read_bytes(), started) == (content, [])


@pytest.mark.parametrize("content", [b"", b"{", b"{} "])
def test_a_damaged_sidecar_is_copied_again(out: Path, pair: Pair, started: list[str], content: bytes) -> None:
    """Even if FT's is damaged likewise: then it is what FT has, and the report says so."""
    tokenizer = out / "tokenizer.json"
    expected = tokenizer.read_bytes()
    for source in (expected, content):
        (pair.ft / "tokenizer.json").write_bytes(source)
        tokenizer.write_bytes(content)
        result = api.verify(out, repair=True)
        assert (result.damage, [d.where for d in result.mended]) == ((), ["tokenizer.json"])
        assert (tokenizer.read_bytes(), started) == (source, [])


@pytest.mark.parametrize("content", [b"{", b'{"weight_map": {}}', b""])
@pytest.mark.parametrize("by", ["verify --repair", "repair"])
def test_a_damaged_index_is_written_again(out: Path, pair: Pair, started: list[str], content: bytes, by: str) -> None:
    """It was taken for whole because it was there: the repair had nothing to do, and verify never ceased to object."""
    index = out / "model.safetensors.index.json"
    expected = index.read_bytes()
    index.write_bytes(content)
    if by == "repair":
        api.repair(pair.base, pair.ft, out, scale=1.1)
        assert api.verify(out).damage == ()
    else:
        assert api.verify(out, repair=True).damage == ()
    assert (index.read_bytes(), started) == (expected, [])


def test_what_repair_cannot_put_right_is_not_sent_there(out: Path) -> None:
    (out / "extra.safetensors").write_bytes(b"")
    for more in ([], ["--repair"]):
        result = run("verify", out, *more)
        assert result.status == 4
        assert result.error.endswith("loaders may pick it up: remove what is not the result's")


def test_a_fifo_in_a_shards_place_is_named_and_does_no_harm(out: Path) -> None:
    expected = shard_bytes(out)
    (out / FIRST).unlink()
    os.mkfifo(out / FIRST)
    for _ in range(2):
        with pytest.raises(OutputError, match=f"{FIRST}: is a FIFO, device or socket: remove it and run"):
            api.verify(out, repair=True)
    (out / FIRST).unlink()
    assert api.verify(out, repair=True).damage == ()
    assert shard_bytes(out) == expected


@pytest.mark.parametrize("state", ["damaged", "gone", "half"])
def test_a_lost_journal_costs_nothing_while_the_report_stands(out: Path, started: list[str], state: str) -> None:
    """The report has the same records."""
    journal, expected = out / ".streamrepair" / "journal", shard_bytes(out)
    content = journal.read_bytes()
    journal.unlink()
    if state == "damaged":
        journal.write_bytes(content[:20] + b"?" + content[21:])
    elif state == "half":
        journal.write_bytes(content[: len(content) // 2])
    _flip(out / FIRST, "a")
    assert api.verify(out, repair=True).damage == ()
    assert (started, shard_bytes(out)) == (["a"], expected)


def test_a_lost_fingerprint_is_refused(out: Path) -> None:
    """Nothing would tell whether the inputs are those of the other tensors."""
    shutil.rmtree(out / ".streamrepair")
    _flip(out / FIRST, "a")
    before = snapshot(out)
    with pytest.raises(DamageError, match=r"run\.json: missing.*--overwrite"):
        api.verify(out, repair=True)
    assert snapshot(out) == before


def test_inputs_that_were_moved_are_those_of_the_run(out: Path, pair: Pair, tmp_path: Path, started: list[str]) -> None:
    """To another scratch folder, or mounted elsewhere: sizes, times and headers tell them from others."""
    whole = shard_bytes(out)
    _flip(out / FIRST, "a")
    (out / "streamrepair.json").unlink()
    (tmp_path / "moved").mkdir()
    base, ft = (side.rename(tmp_path / "moved" / side.name) for side in (pair.base, pair.ft))
    api.repair(base, ft, out, scale=1.1)
    assert started == ["a"]
    assert shard_bytes(out) == whole
    assert api.verify(out, repair=True).damage == ()


@pytest.mark.parametrize("side", ["base", "ft"])
def test_another_checkpoint_with_times_of_whole_seconds_is_not_taken_for_the_runs(
    out: Path, pair: Pair, tmp_path: Path, side: str
) -> None:
    """In images and archives all files have one and the same."""
    mine: Path = getattr(pair, side)
    other = shutil.copytree(mine, tmp_path / "other" / side)
    for path in (*mine.iterdir(), *other.iterdir()):
        os.utime(path, (1, 1))
    api.repair(pair.base, pair.ft, tmp_path / "new", scale=1.1)
    with pytest.raises(InputError, match="is none of its files"):
        api.repair(*((other, pair.ft) if side == "base" else (pair.base, other)), tmp_path / "new", scale=1.1)


def test_changed_inputs_are_refused(out: Path, pair: Pair) -> None:
    _flip(out / FIRST, "a")
    damaged = shard_bytes(out)
    os.utime(pair.base / "model.safetensors", ns=(0, 0))
    with pytest.raises(InputError, match=r"BASE file .* was .*mtime"):
        api.verify(out, repair=True)
    shutil.rmtree(pair.base)
    with pytest.raises(InputError, match="BASE: "):
        api.verify(out, repair=True)
    assert shard_bytes(out) == damaged


def test_options_are_those_of_a_run(out: Path) -> None:
    _flip(out / FIRST, "a")
    with pytest.raises(BudgetError):
        api.verify(out, repair=True, ram="1MB")
    assert api.verify(out, repair=True, ram="2GB", workers=1, device="cpu", deep=True).deep


def test_the_command_mends_and_exits_0(out: Path) -> None:
    _flip(out / FIRST, "a")
    found = run("verify", out)
    assert found.status == 4
    assert "1 fault: a: digest" in found.error
    assert found.error.endswith("do it again with verify --repair")
    result = run("verify", out, "--repair", "--json")
    assert result.status == 0
    parsed = json.loads(result.out)
    assert (parsed["damage"], [d["where"] for d in parsed["mended"]]) == ([], ["a"])
    assert "tensor a is damaged and is done again" in result.err
    assert run("verify", out, "--repair").out.count("whole") == 1


def test_a_stray_file_stays_and_is_4(out: Path) -> None:
    """It is not the run's to remove."""
    shutil.copy(out / FIRST, out / "stray.safetensors")
    _flip(out / FIRST, "a")
    result = run("verify", out, "--repair")
    assert result.status == 4
    assert "1 fault: stray.safetensors: a weights file that is not part of the result" in result.error
    assert (out / "stray.safetensors").exists()


def test_the_one_line_lists_a_few_faults_and_stdout_all(out: Path) -> None:
    for number in range(9):
        (out / f"stray{number}.safetensors").write_bytes(b"")
    result = run("verify", out)
    assert result.status == 4
    assert "9 faults: stray0.safetensors" in result.error
    assert "; and 4 more: " in result.error
    assert result.out.count("loaders may pick it up") == 9


@pytest.mark.parametrize("journal", [True, False])
def test_an_edited_report_is_written_again_and_what_it_says_counts_for_nothing(
    out: Path, started: list[str], journal: bool
) -> None:
    """From the journal; without one, the tensors are done again: their records are in no other place."""
    path = out / "streamrepair.json"
    before = json.loads(path.read_text())["tensors"]
    report = json.loads(path.read_text())
    report["tensors"]["b"]["rank_kept"] += 1
    path.write_text(json.dumps(report, indent=2) + "\n")
    if not journal:
        (out / ".streamrepair" / "journal").unlink()
    result = api.verify(out, repair=True)
    assert ([d.where for d in result.mended], result.damage) == (["streamrepair.json"], ())
    assert sorted(started) == ([] if journal else sorted(before))
    after = json.loads(path.read_text())["tensors"]
    assert [after[name] | {"seconds": 0} for name in after] == [before[name] | {"seconds": 0} for name in after]


def test_the_same_command_writes_an_edited_report_again(pair: Pair, out: Path, started: list[str]) -> None:
    path = out / "streamrepair.json"
    path.write_text(path.read_text().replace('"workers": ', '"workers": 1'))
    assert api.verify(out).damage
    api.repair(pair.base, pair.ft, out, scale=1.1)
    assert (api.verify(out).damage, started) == ((), [])


def test_a_link_or_a_folder_in_place_of_a_shard_is_to_be_removed(out: Path) -> None:
    path = out / FIRST
    path.rename(out.parent / "elsewhere")
    for put in (lambda: path.symlink_to(out.parent / "elsewhere"), path.mkdir):
        put()
        with pytest.raises(OutputError, match=f"{FIRST}: could not be opened .* remove what is there and run the same"):
            api.verify(out, repair=True)
        path.rmdir() if path.is_dir() else path.unlink()
    assert api.verify(out, repair=True).damage == ()
