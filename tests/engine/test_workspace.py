"""An OUT that holds something: what was stopped goes on, what is finished stays, others' is refused; a full disk."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from streamrepair import api
from streamrepair.checkpoint import osfile
from streamrepair.engine import commit, task
from streamrepair.engine.stop import StopRequest
from streamrepair.errors import DiskSpaceError, InputError, InterruptedRunError, NumericalError, OutputError
from tests.builders import bf16
from tests.engine.results import Recorder, check_result
from tests.faults import Kernel, fails
from tests.pairs import Pair, read_tensors, shard_bytes, snapshot, write_pair, write_split

SHAPES = {"tall": (300, 80), "wide": (70, 260), "square": (96, 96), "norm": (96,), "thin": (1500, 3)}

pytestmark = pytest.mark.usefixtures("inputs_are_never_written")


@pytest.mark.parametrize("error", [NumericalError("made up"), KeyboardInterrupt(), ZeroDivisionError()])
def test_a_failure_in_the_middle_keeps_finished_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """And the next run of the same command redoes only the others."""
    pair = write_pair(tmp_path, {f"w{i}": (64, 64 + i) for i in range(6)}, shards=(1, 2))
    whole = tmp_path / "whole"
    api.repair(pair.base, pair.ft, whole, workers=1)
    started: list[str] = []
    repair = task._repair

    def failing(job: task.Job) -> object:
        started.append(job.task.name)
        if len(started) == 4:
            raise error
        return repair(job)

    monkeypatch.setattr(task, "_repair", failing)
    with pytest.raises(type(error)):
        api.repair(pair.base, pair.ft, tmp_path / "out", workers=1)
    monkeypatch.setattr(task, "_repair", lambda job: (started.append(job.task.name), repair(job))[1])
    first, started[:] = started[:3], []
    report = api.repair(pair.base, pair.ft, tmp_path / "out", workers=1)
    assert sorted(started) == sorted(set(report.tensors) - set(first))
    assert shard_bytes(tmp_path / "out") == shard_bytes(whole)


def test_a_keyboard_interrupt_of_the_caller_keeps_what_was_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a notebook: no handler, the exception is raised wherever the calling thread is."""
    pair = write_pair(tmp_path, {f"w{i}": (64, 64 + i) for i in range(6)})

    class Interrupting(Recorder):
        def warn(self, message: str) -> None:
            raise KeyboardInterrupt(message)

    # The caller's thread meets the low rank of the last tensor as a warning.
    flat = bf16(np.ones((64, 64)))
    for folder, content in ((pair.base, bf16(np.zeros((64, 64)))), (pair.ft, flat)):
        tensors = read_tensors(folder)
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        write_split(folder, {**tensors, "z": content}, 1)
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        api.repair(pair.base, pair.ft, tmp_path / "out", workers=1, watcher=Interrupting())
    assert threading.active_count() == threads
    watcher = Recorder()
    api.repair(pair.base, pair.ft, tmp_path / "out", workers=1, watcher=watcher)
    assert watcher.found_bytes > 0
    assert api.verify(tmp_path / "out").damage == ()


def test_a_stop_request_ends_the_run_and_the_next_call_goes_on(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {f"w{i}": (64, 64 + i) for i in range(8)})
    stop = StopRequest()

    class Stopping(Recorder):
        def advance(self, done_bytes: int) -> None:
            super().advance(done_bytes)
            if self.done_bytes > self.total_bytes / 3 and not stop.requested:
                stop.request("enough")
                time.sleep(0.5)  # the run looks a few times a second

    with pytest.raises(InterruptedRunError, match="enough"):
        api.repair(pair.base, pair.ft, tmp_path / "out", workers=1, stop=stop, watcher=Stopping())
    watcher = Recorder()
    api.repair(pair.base, pair.ft, tmp_path / "out", workers=1, watcher=watcher)
    assert 0 < watcher.found_bytes < watcher.total_bytes
    assert watcher.found_bytes + watcher.done_bytes == watcher.total_bytes


def test_a_finished_out_is_left_as_it_is(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, SHAPES)
    out = tmp_path / "out"
    first = api.repair(pair.base, pair.ft, out)
    before = snapshot(out)
    watcher = Recorder()
    second = api.repair(pair.base, pair.ft, out, watcher=watcher, report=tmp_path / "copy.json", ram="1GB", workers=1)
    changed = {name for name, found in snapshot(out).items() if found != before.get(name)}
    assert changed <= {".streamrepair/lock"}
    assert (second, watcher.notes) == (first, ["nothing to do: the result is whole"])
    assert (tmp_path / "copy.json").read_bytes() == (out / "streamrepair.json").read_bytes()


def test_a_missing_sidecar_or_report_is_written_again(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, SHAPES)
    out = tmp_path / "out"
    first = api.repair(pair.base, pair.ft, out)
    shards = shard_bytes(out)
    for name in ("tokenizer.json", "model.safetensors.index.json", "streamrepair.json"):
        (out / name).unlink()
        watcher = Recorder()
        report = api.repair(pair.base, pair.ft, out, watcher=watcher)
        assert watcher.found_bytes == watcher.total_bytes
        assert (report.timings.bytes_written, shard_bytes(out)) == (first.timings.bytes_written, shards)
        assert (out / name).exists()


def test_a_sidecar_that_is_not_fts_any_more_is_told_of(tmp_path: Path) -> None:
    """FT's tokenizer was mended, or OUT's emptied: the result was called whole and no more said."""
    pair = write_pair(tmp_path, {"w": (64, 64)}, shards=(1, 1))
    out = tmp_path / "out"

    def told() -> list[str]:
        watcher = Recorder()
        api.repair(pair.base, pair.ft, out, watcher=watcher, out_dtype="float32")
        return watcher.warnings

    assert told() == []
    assert told() == [], "config.json has another dtype than FT's, as it must"
    (pair.ft / "tokenizer.json").write_text("mended")
    (out / "config.json").write_text("")
    config, tokenizer = out / "config.json", out / "tokenizer.json"
    assert told() == [
        f"no copies of FT's: {config}, {tokenizer}: to have FT's, remove them and run the same command again"
    ]
    tokenizer.unlink()
    config.unlink()
    assert told() == []
    assert tokenizer.read_text() == "mended"


def test_overwrite_begins_anew_and_takes_the_earlier_runs_files_only(tmp_path: Path) -> None:
    pair = write_pair(tmp_path / "one", {"w": (64, 64), "v": (50, 64)}, shards=(1, 2))
    other = write_pair(tmp_path / "two", {"w": (64, 64)}, shards=(1, 1), seed=1)
    (pair.ft / "added_tokens.json").write_text("{}")
    out = tmp_path / "out"
    api.repair(pair.base, pair.ft, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds a run that differs.*BASE file.*--overwrite"):
        api.repair(other.base, other.ft, out)
    report = api.repair(other.base, other.ft, out, overwrite=True)
    assert {p.name for p in out.iterdir()} == {
        "model.safetensors", "config.json", "tokenizer.json", "notes.txt", "streamrepair.json", ".streamrepair",
    }  # fmt: skip
    check_result(other, out, report)
    assert api.verify(out).damage == ()


def test_overwrite_does_not_touch_weights_of_others(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {"w": (64, 64)})
    out = tmp_path / "out"
    out.mkdir()
    (out / "adapter_model.safetensors").write_bytes(b"precious")
    before = snapshot(out)
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"not empty|adapter_model"):
            api.repair(pair.base, pair.ft, out, overwrite=overwrite)
        assert snapshot(out) == before


def test_overwrite_goes_on_with_an_unfinished_run_of_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch system repeats the whole command line; it would otherwise begin anew for ever."""
    pair = write_pair(tmp_path, {f"w{i}": (64, 64) for i in range(5)})
    out = tmp_path / "out"
    api.repair(pair.base, pair.ft, out, overwrite=True)
    expected = shard_bytes(out)
    monkeypatch.setattr(commit, "_EVERY_S", 0.0)
    monkeypatch.setattr(osfile, "os", Kernel(("replace",), fails(2, 5)))
    with pytest.raises(OutputError):
        api.repair(pair.base, pair.ft, out, overwrite=True, workers=1)
    monkeypatch.undo()
    watcher = Recorder()
    api.repair(pair.base, pair.ft, out, overwrite=True, watcher=watcher)
    assert watcher.found_bytes > 0
    assert shard_bytes(out) == expected


def _repaired(tmp_path: Path) -> tuple[Pair, Path, dict[str, bytes]]:
    """A pair of four matrices, its finished result in two shards, and their bytes."""
    pair = write_pair(tmp_path, {f"w{i}": (64, 64) for i in range(4)}, shards=(1, 2))
    out = tmp_path / "out"
    api.repair(pair.base, pair.ft, out)
    expected = shard_bytes(out)
    return pair, out, expected


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_damaged_tensor_of_a_sealed_shard_is_redone_alone(tmp_path: Path, overwrite: bool) -> None:
    """Without --overwrite only that tensor; with it everything, as it says."""
    pair, out, expected = _repaired(tmp_path)
    victim = out / "model-00002-of-00002.safetensors"
    victim.write_bytes(expected[victim.name][:-1] + bytes([expected[victim.name][-1] ^ 4]))
    assert [d.where for d in api.verify(out).damage] == ["w3"]
    watcher = Recorder()
    report = api.repair(pair.base, pair.ft, out, overwrite=overwrite, watcher=watcher)
    assert shard_bytes(out) == expected
    assert watcher.done_bytes == (watcher.total_bytes if overwrite else 64 * 64 * 2)
    assert len(report.warnings) == (0 if overwrite else 1)
    assert overwrite or "tensor w3 is damaged and is done again" in report.warnings[0]
    assert api.verify(out).damage == ()


@pytest.mark.parametrize("damage", ["cut", "header", "gone"])
def test_a_shard_that_was_cut_or_lost_is_written_again(tmp_path: Path, damage: str) -> None:
    pair, out, expected = _repaired(tmp_path)
    victim = out / "model-00001-of-00002.safetensors"
    content = expected[victim.name]
    if damage == "gone":
        victim.unlink()
    else:
        victim.write_bytes(content[:-100] if damage == "cut" else content[:20] + b"!" + content[21:])
    api.repair(pair.base, pair.ft, out)
    assert shard_bytes(out) == expected


@pytest.mark.parametrize("where", ["equal", "inside", "around", "shard linked"])
@pytest.mark.parametrize("side", ["base", "ft"])
def test_an_out_that_overlaps_an_input_is_refused(tmp_path: Path, side: str, where: str) -> None:
    pair = write_pair(tmp_path / "in", {"w": (64, 64)}, shards=(1, 1))
    folder: Path = getattr(pair, side)
    out = {"equal": folder, "inside": folder / "sub" / "out", "around": tmp_path / "in"}.get(where, tmp_path / "out")
    if where == "shard linked":
        out.mkdir()
        (out / "model.safetensors").hardlink_to(folder / "model.safetensors")
    before = snapshot(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(InputError, match="name another"):
            api.repair(pair.base, pair.ft, out, overwrite=overwrite)
    assert snapshot(tmp_path) == before


def test_out_may_lie_beside_inputs_that_are_named_as_files(tmp_path: Path) -> None:
    """`streamrepair base.safetensors ft.safetensors out` in one folder; but not in that folder itself."""
    pair = write_pair(tmp_path / "in", {"w": (64, 64)}, shards=(1, 1))
    base, ft = ((getattr(pair, s) / "model.safetensors").rename(tmp_path / f"{s}.safetensors") for s in ("base", "ft"))
    report = api.repair(base, ft, tmp_path / "out")
    assert report.tensors["w"].action == "repaired"
    assert (tmp_path / "out" / "ft.safetensors").exists()
    with pytest.raises(InputError, match="name another folder"):
        api.repair(base, ft, tmp_path, overwrite=True)
    with pytest.raises(InputError, match="name another place"):
        api.repair(base, ft, tmp_path / "out2", report=ft)


def test_an_out_that_is_a_file_or_a_link_is_refused(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {"w": (64, 64)})
    (tmp_path / "file").write_text("mine")
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    said = {"file": "file is not a folder", "link": "link is a link: .* leads to, .*target$", "nowhere": "not a folder"}
    for name, what in said.items():
        for overwrite in (False, True):
            with pytest.raises(InputError, match=what):
                api.repair(pair.base, pair.ft, tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_is_too_small_is_met_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = write_pair(tmp_path, {"w": (64, 64)})
    monkeypatch.setattr(osfile, "free_bytes", lambda _: 1000)
    with pytest.raises(DiskSpaceError, match=r"needs .* 1 kB are free"):
        api.repair(pair.base, pair.ft, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_by_little_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not "needs 7.02 MB, 7.02 MB are free"."""
    pair = write_pair(tmp_path, {"w": (64, 64)})
    (pair.ft / "vocab.json").write_bytes(bytes(3_004_000))
    monkeypatch.setattr(osfile, "free_bytes", lambda _: 7_016_000)
    with pytest.raises(DiskSpaceError, match=r"needs 7\.0(19|2)\d* MB, 7\.016 MB are free"):
        api.repair(pair.base, pair.ft, tmp_path / "out")


def test_a_disk_need_hold_only_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small result fits a small disk; sidecars count at their size."""
    pair = write_pair(tmp_path, {"w": (64, 64)})
    (pair.ft / "vocab.json").write_bytes(bytes(3_000_000))
    monkeypatch.setattr(osfile, "free_bytes", lambda _: 6_000_000)
    with pytest.raises(DiskSpaceError, match=r"needs 7\.0. MB, 6 MB are free"):
        api.repair(pair.base, pair.ft, tmp_path / "out")
    monkeypatch.setattr(osfile, "free_bytes", lambda _: 7_200_000)
    api.repair(pair.base, pair.ft, tmp_path / "out")
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert 3_000_000 < written < 7_200_000
