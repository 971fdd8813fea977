"""The report of a run that was interrupted tells of all of it, not of its last session only."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import numpy as np
import pytest

from streamrepair import api
from streamrepair.checkpoint import osfile
from streamrepair.engine import commit
from streamrepair.engine.accounts import Accounts, most_bytes, summed, summed_uses
from streamrepair.engine.lanes import lane_names
from streamrepair.engine.statement import statement_bytes
from streamrepair.errors import OutputError
from streamrepair.report import ResourceUse, Session, Timings
from tests.faults import Kernel, fails, none
from tests.pairs import Pair, matrices, read_tensors, shard_bytes, stored, write_split


def _pair(tmp_path: Path) -> Pair:
    """Four matrices; the first to be done is of exactly low rank, which is warned of."""
    rng = np.random.default_rng(0)
    base, ft = {}, {}
    for name in ("w1", "w2", "w3"):
        before, after = matrices(rng, (64, 48))
        base[name], ft[name] = stored(before, "F32"), stored(after, "F32")
    base["low"] = rng.integers(-8, 8, (90, 80)).astype(np.float32)
    ft["low"] = base["low"] + np.outer(rng.integers(-4, 4, 90), rng.integers(-4, 4, 80)).astype(np.float32)
    return Pair(write_split(tmp_path / "base", base, 1), write_split(tmp_path / "ft", ft, 1))


def _interrupted(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run into `out` whose disk fails half-way, every tensor being committed at once."""
    monkeypatch.setattr(commit, "_EVERY_S", 0.0)
    kernel = Kernel(("pwrite",), none)
    monkeypatch.setattr(osfile, "os", kernel)
    api.repair(pair.base, pair.ft, tmp_path / "counted", workers=1)
    monkeypatch.setattr(osfile, "os", Kernel(("pwrite",), fails(len(kernel.calls) * 2 // 3, 5)))
    with pytest.raises(OutputError):
        api.repair(pair.base, pair.ft, tmp_path / "out", workers=1)
    monkeypatch.undo()


def test_times_bytes_and_warnings_are_those_of_all_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = _pair(tmp_path)
    whole = api.repair(pair.base, pair.ft, tmp_path / "whole", workers=1)
    assert whole.sessions == 1
    assert len(whole.warnings) == 1
    assert "low" in whole.warnings[0]
    out = tmp_path / "out"
    _interrupted(pair, tmp_path, monkeypatch)
    assert (out / ".streamrepair" / "sessions").stat().st_size > 0, "the first session was meant to finish something"
    report = api.repair(pair.base, pair.ft, out, workers=1)
    assert shard_bytes(out) == shard_bytes(tmp_path / "whole")
    assert report.sessions == 2
    assert report.warnings == whole.warnings
    least = sum(len(content) for _, _, content in read_tensors(out).values())
    assert report.timings.bytes_written >= least
    assert report.timings.bytes_read >= whole.timings.bytes_read - 2 * (1 << 14)
    assert report.timings.decompose_s > 0
    assert [use.name for use in report.utilisation] == ["cpu 0", "files"]
    for use in report.utilisation:  # of both sessions, as the times beside them
        assert use.busy_s + use.idle_s + sum(use.waiting_s.values()) == pytest.approx(report.timings.wall_s, abs=2e-3)
    again = api.repair(pair.base, pair.ft, out)
    assert again == report


def _session(seconds: float, peak: int) -> Session:
    timings = Timings(
        wall_s=seconds, read_s=2 * seconds, decompose_s=0.0, write_s=1.0, bytes_read=peak + 1, bytes_written=7
    )
    return Session(timings=timings, ram_measured_bytes=peak, warnings=(f"w{peak}",))


def test_of_each_session_the_last_line_counts(tmp_path: Path) -> None:
    for first, last in ((1.0, 2.0), (3.0, 5.0)):
        accounts = Accounts(tmp_path / "sessions")
        accounts.open()
        accounts.record(_session(first, 10))
        accounts.record(_session(last, 20))
        accounts.close()
    accounts = Accounts(tmp_path / "sessions")
    accounts.open()
    assert accounts.sessions == [_session(2.0, 20), _session(5.0, 20)]
    assert summed(accounts.sessions) == Timings(
        wall_s=7.0, read_s=14.0, decompose_s=0.0, write_s=2.0, bytes_read=42, bytes_written=14
    )
    accounts.close()


def test_what_is_said_to_be_written_down_holds_the_accounts(tmp_path: Path) -> None:
    """With many workers they are more than the records: every commit tells of every worker."""
    pair = _pair(tmp_path)
    planned = api.plan(pair.base, pair.ft)
    many = dataclasses.replace(planned, lanes=("cpu",) * 64)
    waits = dict.fromkeys(("read", "write", "memory"), 123456.1234)
    uses = [_use(name, 123456.1234, waits, 123456.1234) for name in (*lane_names(many.lanes), "files")]
    accounts = Accounts(tmp_path / "sessions")
    accounts.open()
    commits = len(planned.tasks) + 2
    for _ in range(commits):
        session = _session(123456.1234, 10**12)
        accounts.record(msgspec.structs.replace(session, vram_measured_bytes=10**11, utilisation=tuple(uses)))
    accounts.close()
    size = (tmp_path / "sessions").stat().st_size
    assert size < most_bytes(64, commits) < 1.5 * size
    assert statement_bytes(many) - statement_bytes(planned) == most_bytes(64, commits) - most_bytes(
        planned.workers, commits
    )


def _use(name: str, busy_s: float, waiting_s: dict[str, float], idle_s: float) -> ResourceUse:
    return ResourceUse(name=name, busy_s=busy_s, waiting_s=waiting_s, idle_s=idle_s)


def test_workers_of_all_sessions_are_summed_by_name() -> None:
    def session(*uses: tuple[str, float, dict[str, float], float]) -> Session:
        return msgspec.structs.replace(_session(1.0, 1), utilisation=tuple(_use(*use) for use in uses))

    first = session(("cpu 0", 1.0, {"read": 2.0}, 3.0), ("files", 1.5, {}, 4.5))
    second = session(("cpu 0", 1.0, {"read": 0.5}, 0.5), ("cpu 1", 1.0, {"read": 0.0}, 1.0), ("files", 1.0, {}, 1.0))
    assert summed_uses([first, second]) == (
        _use("cpu 0", 2.0, {"read": 2.5}, 3.5),
        _use("cpu 1", 1.0, {"read": 0.0}, 1.0),
        _use("files", 2.5, {}, 5.5),
    )


@pytest.mark.parametrize("content", [b"x\ny\n", b"0123456789abcdef {}\n0123456789abcdef {}\n"])
def test_damaged_accounts_cost_the_accounts_only(tmp_path: Path, content: bytes) -> None:
    pair = _pair(tmp_path)
    expected = api.repair(pair.base, pair.ft, tmp_path / "out", workers=1)
    shards = shard_bytes(tmp_path / "out")
    (tmp_path / "out" / ".streamrepair" / "sessions").write_bytes(content)
    (tmp_path / "out" / "streamrepair.json").unlink()
    report = api.repair(pair.base, pair.ft, tmp_path / "out", workers=1)
    assert (report.sessions, report.timings.bytes_written) == (1, 0)
    assert (report.tensors, report.warnings) == (expected.tensors, expected.warnings)
    assert shard_bytes(tmp_path / "out") == shards
