"""Workers wait for a disk that does not keep up, and for nothing else."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from streamrepair import api
from streamrepair.checkpoint import osfile
from streamrepair.engine import backlog, commit, task
from streamrepair.engine.backlog import Backlog
from streamrepair.engine.stop import StopRequest
from streamrepair.errors import InterruptedRunError, OutputError
from tests.faults import Kernel
from tests.pairs import Pair, shard_bytes, write_pair

NBYTES = 64 * 48 * 2


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """Twelve matrices; every one is committed at once, and at most two of them may wait for that."""
    monkeypatch.setattr(commit, "_EVERY_S", 0.0)
    monkeypatch.setattr(backlog, "LEAST_BYTES", 2 * NBYTES)
    monkeypatch.setattr(backlog, "_SHARE", 0.0)
    return write_pair(tmp_path, {f"w{i}": (64, 48) for i in range(12)}, shards=(1, 1))


def _first_commit(done: list[str], begun: threading.Event, go_on: threading.Event, error: int = 0) -> Kernel:
    """A disk whose first sync after a tensor is done takes until it is told to go on."""

    def fault(_number: int, _name: str) -> None:
        if done and not begun.is_set():
            begun.set()
            assert go_on.wait(20)
            if error:
                raise OSError(error, "the disk is gone")

    return Kernel(("fsync", "fdatasync"), fault)


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of tensors as they are done."""
    done: list[str] = []
    real = task._repair

    def counting(job: task.Job) -> object:
        result = real(job)
        done.append(job.task.name)
        return result

    monkeypatch.setattr(task, "_repair", counting)
    return done


def test_no_more_is_left_unsynced_than_may_be(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api.repair(pair.base, pair.ft, tmp_path / "plain", workers=2)
    done, begun, go_on = _counted(monkeypatch), threading.Event(), threading.Event()
    monkeypatch.setattr(osfile, "os", _first_commit(done, begun, go_on))
    seen: list[int] = []

    def watch() -> None:
        assert begun.wait(20)
        threading.Event().wait(1.0)  # time enough for all twelve
        seen.append(len(done))
        go_on.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    report = api.repair(pair.base, pair.ft, tmp_path / "out", workers=2)
    watcher.join()
    assert 2 < seen[0] <= 2 + 2, "past the limit each worker had one task in hand"
    assert len(done) == 12
    waited = sum(use.waiting_s.get("write", 0.0) for use in report.utilisation)
    assert waited > 1.0
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "plain")


def test_a_sync_that_fails_ends_workers_that_wait_for_it(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, begun, go_on = _counted(monkeypatch), threading.Event(), threading.Event()
    monkeypatch.setattr(osfile, "os", _first_commit(done, begun, go_on, error=5))
    threading.Timer(1.0, go_on.set).start()
    with pytest.raises(OutputError, match="the disk is gone"):
        api.repair(pair.base, pair.ft, tmp_path / "out", workers=2)
    assert not [t for t in threading.enumerate() if t.name.startswith("cpu ")]


class Waits:
    """Counts the workers that have to wait."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self) -> None:
        self.number += 1


def test_nobody_waits_once_the_run_is_to_stop() -> None:
    """Nor starts anything: that is the executor's part."""
    stop, waits = StopRequest(), Waits()
    held = Backlog(stop, free_bytes=0)
    held.wrote(backlog.LEAST_BYTES)
    held.wait(waits)  # as much as may be
    held.wrote(1)
    stop.abandon()
    with pytest.raises(InterruptedRunError):
        held.wait(waits)
    stop.request("SIGTERM")
    held.wait(waits)
    assert waits.number == 0
    later = Backlog(StopRequest(), free_bytes=0)
    later.wrote(backlog.LEAST_BYTES + 1)
    threading.Timer(0.5, later.synced, (1,)).start()
    later.wait(waits)
    assert waits.number == 1, "once, however often it looks"


@pytest.mark.parametrize(
    ("free_bytes", "limit_bytes"), [(1 << 33, 1 << 31), (30_000_000_000, 3_000_000_000), (1 << 40, 1 << 32)]
)
def test_the_limit_is_what_a_disk_does_in_seconds_however_much_memory_is_free(
    free_bytes: int, limit_bytes: int
) -> None:
    assert limit_bytes > commit._EVERY_BYTES, "or nobody would commit what all wait for"
    held, waits = Backlog(StopRequest(), free_bytes=free_bytes), Waits()
    held.wrote(limit_bytes)
    held.wait(waits)
    assert waits.number == 0
    held.wrote(1)
    threading.Timer(0.05, held.synced, (1,)).start()
    held.wait(waits)
    assert waits.number == 1
