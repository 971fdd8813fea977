"""Killed, stopped or failed at any moment, the same command goes on, redoes nothing, and ends in the same bytes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from streamrepair import api
from streamrepair.checkpoint import osfile
from streamrepair.checkpoint.journal import Journal
from streamrepair.engine import task
from streamrepair.engine.job import Job
from streamrepair.errors import DamageError, InputError, LockedError, OutputError
from streamrepair.report import JournalEntry, TensorRecord
from streamrepair.streams import ENDING
from tests.command import finish, run, start, start_held
from tests.faults import Kernel
from tests.pairs import Pair, shard_bytes, snapshot, write_pair

SMALL = {"a": (48, 40), "b": (40, 48), "v": (40,), "c": (64, 32), "d": (33, 70)}
MANY = {f"layers.{i}.weight": (420 + i, 400) for i in range(40)}


@pytest.fixture
def small(tmp_path: Path) -> Pair:
    return write_pair(tmp_path, SMALL, shards=(1, 2))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Matrices enough that a run takes a second or two."""
    return write_pair(tmp_path_factory.mktemp("many"), MANY, shards=(1, 3))


@pytest.fixture(scope="module")
def undisturbed(many: Pair) -> dict[str, bytes]:
    out = many.base.parent / "undisturbed"
    api.repair(many.base, many.ft, out)
    return shard_bytes(out)


def _journalled(out: Path) -> dict[str, TensorRecord]:
    """The records of a journal, but for a torn tail."""
    found: dict[str, TensorRecord] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (out / ".streamrepair" / "journal").read_bytes().splitlines():
            with contextlib.suppress(msgspec.MsgspecError):
                entry = msgspec.json.decode(line.partition(b" ")[2], type=JournalEntry)
                found[entry.name] = entry.record
    return found


def _check_loadable_names(out: Path, expected: dict[str, bytes]) -> None:
    """At no moment may a file have a final name that is not the final file."""
    for path in out.glob("*.safetensors"):
        assert path.read_bytes() == expected[path.name]


@pytest.mark.slow
def test_kill_at_random_moments(many: Pair, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """The same command again and again, killed each time a while after its first new tensor, until it gets through.

    No process gets past nine tensors, so that four of them cannot be through, whatever the machine.
    """
    out, moments = tmp_path / "out", random.Random(1)
    kept: dict[str, TensorRecord] = {}
    for _ in range(4):
        process = start_held(many.base, many.ft, out, "--workers", 2, after=9, until=tmp_path / "never")
        before = len(kept)
        _wait(lambda: len(_journalled(out)) > before)  # noqa: B023 – it is called here and now
        time.sleep(moments.uniform(0.0, 0.2))
        process.kill()
        process.communicate()
        now = _journalled(out)
        assert {name: now[name] for name in kept} == kept
        _check_loadable_names(out, undisturbed)
        kept = now
    assert 4 <= len(kept) <= 36, "the moments were meant to lie in the work"
    result = finish(start(many.base, many.ft, out, "--workers", 2))
    assert result.status == 0
    assert "continuing: " in result.err
    assert shard_bytes(out) == undisturbed
    records = api.verify(out)
    assert (records.damage, records.tensors) == ((), len(MANY))
    report = json.loads((out / "streamrepair.json").read_text())["tensors"]
    for name, record in kept.items():
        assert report[name]["seconds"] == record.seconds, "a tensor that was finished was computed again"


def _wait(condition: Callable[[], object], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_failed_sync_is_not_repeated(small: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may have dropped the pages and call the next sync a success: what was pending must not count."""
    syncs = 0

    def fault(count: int, name: str) -> None:
        nonlocal syncs
        syncs += (out / ".streamrepair" / "journal").exists()
        if syncs == 2:  # the first is of the folder of partial shards, this one of a shard with finished tensors
            raise OSError(errno.EIO, "made up")

    out = tmp_path / "out"
    monkeypatch.setattr(osfile, "os", Kernel(("fsync",), fault))
    with pytest.raises(OutputError, match="partial: could not be synced"):
        api.repair(small.base, small.ft, out)
    assert syncs == 2
    assert _journalled(out) == {}


def _interrupted(pair: Pair, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ended at the last matrix but one of its plan."""
    repair = task._repair
    names = [t.name for t in api.plan(pair.base, pair.ft, workers=1).tasks if t.shape]

    def failing(job: Job) -> object:
        if job.task.name == names[-2]:
            raise OutputError("made up")
        return repair(job)

    with monkeypatch.context() as patch:
        patch.setattr(task, "_repair", failing)
        with pytest.raises(OutputError):
            api.repair(pair.base, pair.ft, out, workers=1)
    assert 2 <= len(_journalled(out)) < len(SMALL)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": 1.5}, "--scale was 1.0, is 1.5"),
        ({"sigma": "tail"}, "--sigma was median, is tail"),
        ({"exclude": "a"}, "--exclude was not given, is a"),
        ({"backend": "full"}, "--backend was auto, is full"),
        ({"on_nonfinite": "copy-ft"}, "--on-nonfinite was refuse, is copy-ft"),
        ({"out_dtype": "float32"}, "--out-dtype was same, is float32"),
    ],
)
def test_other_settings_are_refused_naming_the_change(
    small: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], words: str
) -> None:
    out = tmp_path / "out"
    _interrupted(small, out, monkeypatch)
    before = snapshot(out)
    with pytest.raises(InputError) as caught:
        api.repair(small.base, small.ft, out, **options)  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert snapshot(out).keys() == before.keys()
    assert all(found == before[name] for name, found in snapshot(out).items() if not name.endswith("lock"))
    api.repair(small.base, small.ft, out)


@pytest.mark.parametrize("side", ["base", "ft"])
@pytest.mark.parametrize("change", ["content", "touched", "replaced"])
def test_changed_inputs_are_refused_naming_the_file(
    small: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str, change: str
) -> None:
    out = tmp_path / "out"
    _interrupted(small, out, monkeypatch)
    victim = sorted(getattr(small, side).glob("*.safetensors"))[-1]
    if change == "touched":
        os.utime(victim, ns=(0, 0))
    elif change == "content":
        with victim.open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x11")
    else:
        content = victim.read_bytes()
        victim.unlink()
        victim.write_bytes(content)
    with pytest.raises(InputError, match=rf"{side.upper()} file .*{victim.name} was .*--overwrite"):
        api.repair(small.base, small.ft, out)
    api.repair(small.base, small.ft, out, overwrite=True)
    assert api.verify(out).damage == ()


@pytest.mark.parametrize("change", ["modified", "replaced", "truncated", "gone"])
def test_an_input_that_changes_during_the_run_is_refused(small: Pair, tmp_path: Path, change: str) -> None:
    """At the latest before anything of it counts."""
    victim = small.base / "model.safetensors"

    class Meddler(api.Silent):
        def begin(self, plan: object, done_bytes: int) -> None:  # noqa: ARG002
            content = victim.read_bytes()
            if change == "modified":
                with victim.open("r+b") as file:
                    file.seek(-1, 2)
                    file.write(b"\x11")
            elif change == "truncated":
                os.truncate(victim, len(content) - 2000)
            else:
                victim.unlink()
                if change == "replaced":
                    victim.write_bytes(content)

    with pytest.raises(InputError, match=r"model\.safetensors: .*(changed|gone|cannot be)"):
        api.repair(small.base, small.ft, tmp_path / "out", watcher=Meddler())
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert _journalled(tmp_path / "out") == {}


def test_a_torn_journal_loses_one_tensor_and_a_damaged_one_is_refused(
    small: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    _interrupted(small, out, monkeypatch)
    journal = out / ".streamrepair" / "journal"
    content, done = journal.read_bytes(), _journalled(out)
    journal.write_bytes(content[:-5])
    api.repair(small.base, small.ft, out)
    assert len(done) >= 2
    assert api.verify(out).damage == ()
    journal.write_bytes(content[:20] + b"?" + content[21:])
    with pytest.raises(InputError, match=r"journal: line 1 of .* damaged"):
        api.repair(small.base, small.ft, out)
    api.repair(small.base, small.ft, out, overwrite=True)
    assert api.verify(out).damage == ()


def test_a_finished_tensor_that_was_damaged_meanwhile_is_redone(
    small: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.repair(small.base, small.ft, tmp_path / "whole")
    out = tmp_path / "out"
    _interrupted(small, out, monkeypatch)
    done = _journalled(out)
    for path in [*(out / ".streamrepair" / "partial").iterdir(), *out.glob("*.safetensors")]:
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        path.write_bytes(content[:start] + b"\xff" * (len(content) - start))
    report = api.repair(small.base, small.ft, out)
    assert shard_bytes(out) == shard_bytes(tmp_path / "whole")
    assert len(report.warnings) == len(done)
    assert all("is damaged and is done again" in warning for warning in report.warnings)


def test_another_version_does_not_go_on(small: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    _interrupted(small, out, monkeypatch)
    path = out / ".streamrepair" / "run.json"
    path.write_text(path.read_text().replace('"version": "', '"version": "0.0.0-'))
    with pytest.raises(InputError, match=r"streamrepair was 0\.0\.0-"):
        api.repair(small.base, small.ft, out)
    for content in (b"{", b'{"version": "\xff"}'):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"run\.json: unreadable"):
            api.repair(small.base, small.ft, out)


def test_bytes_that_do_not_read_back_are_never_sealed(
    small: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that answers with other bytes than it was given: the digests were taken from memory."""

    class Forgetful:
        def __getattr__(self, name: str) -> object:
            return getattr(os, name)

        def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
            return os.pwrite(fd, bytes(len(data)) if len(data) == 64 * 32 * 2 else data, offset)

    monkeypatch.setattr(osfile, "os", Forgetful())
    with pytest.raises(DamageError, match="tensor c reads back with digest"):
        api.repair(small.base, small.ft, tmp_path / "out", workers=1)
    monkeypatch.undo()
    api.repair(small.base, small.ft, tmp_path / "out")
    assert api.verify(tmp_path / "out").damage == ()


HOLDER = (
    "import fcntl, os, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
    "print(f'pid {os.getpid()} on here', file=file, flush=True); print('held', flush=True); time.sleep(60)"
)


def test_a_live_lock_refuses_and_a_dead_one_does_not(small: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".streamrepair").mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out / ".streamrepair" / "lock")], stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        with pytest.raises(LockedError, match=rf"held by another run \(pid {holder.pid} on here\)"):
            api.repair(small.base, small.ft, out)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    report = api.repair(small.base, small.ft, out)
    assert report.tensors["a"].action == "repaired"


@pytest.mark.slow
def test_a_second_run_is_refused_while_the_first_is_alive(
    many: Pair, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = start_held(many.base, many.ft, out, "--workers", 1, after=2, until=tmp_path / "go on")
    _wait(lambda: _journalled(out))
    second = run(many.base, many.ft, out)
    (tmp_path / "go on").touch()
    assert second.status == 11
    assert f"held by another run (pid {first.pid} on " in second.error
    assert finish(first).status == 0
    assert shard_bytes(out) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("number", ENDING)
def test_a_signal_ends_the_run_with_75_and_the_same_command_goes_on(
    many: Pair, undisturbed: dict[str, bytes], tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    process = start_held(many.base, many.ft, out, "--workers", 1, after=5, until=tmp_path / "never")
    _wait(lambda: len(_journalled(out)) >= 2)
    process.send_signal(number)
    result = finish(process)
    done = _journalled(out)
    assert result.status == 75
    assert f"interrupted by {number.name}" in result.error
    assert 2 <= len(done) < len(MANY)
    _check_loadable_names(out, undisturbed)
    report = api.repair(many.base, many.ft, out)
    assert shard_bytes(out) == undisturbed
    assert {name: report.tensors[name] for name in done} == done


SLOW = (
    "import pathlib, sys, time; from streamrepair.engine import task; repair = task._repair; "
    "task._repair = lambda job: (pathlib.Path(sys.argv[-1] + '.there').touch(), time.sleep(600), repair(job))[2]; "
    "from streamrepair.cli import main; sys.exit(main())"
)


@pytest.mark.slow
def test_a_second_signal_ends_the_run_at_once(small: Pair, tmp_path: Path) -> None:
    """While a worker is where it cannot be reached for ten minutes; and the next run is none the worse."""
    out = tmp_path / "out"
    words = [sys.executable, "-c", SLOW, str(small.base), str(small.ft), str(out)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait((tmp_path / "out.there").exists)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    result = finish(process)
    assert result.status == 75
    assert "at once" in result.error
    assert api.repair(small.base, small.ft, out).tensors["a"].action == "repaired"


@pytest.mark.parametrize("options", [{"ram": "2GB"}, {"workers": 3}, {"device": "cpu"}, {"watcher": api.Silent()}])
def test_means_may_change_between_runs(
    small: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    """Memory, workers, a quieter command: no number depends on them."""
    api.repair(small.base, small.ft, tmp_path / "whole")
    _interrupted(small, tmp_path / "out", monkeypatch)
    done = _journalled(tmp_path / "out")
    report = api.repair(small.base, small.ft, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert {name: report.tensors[name] for name in done} == done
    assert report.warnings == ()
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")


@pytest.mark.parametrize(("field", "other"), [("device", "cuda"), ("processor", "Haswell")])
def test_another_device_goes_on_with_a_warning(
    small: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, other: str
) -> None:
    """As if the run had begun on a GPU, or on another node; one that did not say where it began is taken as it is."""
    monkeypatch.setenv("OPENBLAS_CORETYPE", "SkylakeX")
    out, here = tmp_path / "out", {"device": "cpu", "processor": "SkylakeX"}[field]
    _interrupted(small, out, monkeypatch)
    path = out / ".streamrepair" / "run.json"
    assert f'"{field}": "{here}"' in path.read_text()
    path.write_text(path.read_text().replace(f'"{field}": "{here}"', f'"{field}": "{other}"'))
    done = _journalled(out)
    (warning,) = api.repair(small.base, small.ft, out).warnings
    assert warning.startswith(
        f"{len(done)} tensors were finished on {other}, the rest is done on {here}: values may differ"
    )
    (again,) = api.repair(small.base, small.ft, out).warnings
    assert again == warning, "a finished result keeps what was said of it"


def test_records_of_other_tensors_and_texts_in_the_journal_do_no_harm(
    small: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sound line of a tensor that is not there is left alone; one that is no record is refused."""
    out = tmp_path / "out"
    _interrupted(small, out, monkeypatch)
    path = out / ".streamrepair" / "journal"
    for text, refused in ((b'{"name":"x","shard":"y","record":%s}', False), (b'{"name":1}', True), (b"nonsense", True)):
        record = msgspec.json.encode(next(iter(_journalled(out).values())))
        journal = Journal(path)
        journal.open()
        journal.append([text % record if b"%s" in text else text])
        journal.close()
        if refused:
            with pytest.raises(InputError, match=r"journal: a record is not understood .*--overwrite"):
                api.repair(small.base, small.ft, out)
        else:
            assert "x" not in api.repair(small.base, small.ft, out).tensors
    api.repair(small.base, small.ft, out, overwrite=True)
    assert api.verify(out).damage == ()
