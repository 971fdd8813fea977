"""Progress where there is no terminal: a line now and then, with what is left at the mean rate of this run."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from streamrepair import api, terminal
from streamrepair.units import format_seconds
from tests.pairs import write_pair


def test_a_line_of_progress_tells_how_long_it_will_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = write_pair(tmp_path, {"w": (64, 48), "v": (64, 48)})
    planned = api.plan(pair.base, pair.ft)
    now = [100.0]
    monkeypatch.setattr(terminal, "_now", lambda: now[0])
    bar = terminal.Bar(quiet=False)
    bar.begin(planned, 2 * 64 * 48)  # half of it was found done: what that took is not known
    assert capsys.readouterr().err == "continuing: 6.14 kB of 12.3 kB were finished before\n"
    now[0] += 31
    bar.advance(64 * 48 // 2)
    assert capsys.readouterr().err.splitlines()[-1] == "7.68 kB of 12.3 kB done, about 1 min 33 s left"
    now[0] += 1
    bar.advance(100)
    assert capsys.readouterr().err == ""


def test_nothing_is_foretold_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = write_pair(tmp_path, {"w": (64, 48)})
    monkeypatch.setattr(terminal, "_SILENT_S", -1.0)
    bar = terminal.Bar(quiet=False)
    bar.begin(api.plan(pair.base, pair.ft), 0)
    bar.advance(0)
    assert capsys.readouterr().err == "0 B of 6.14 kB done\n"


def test_a_bar_that_the_environment_spoils_is_none(tmp_path: Path) -> None:
    """tqdm takes options of its own from there, and gives up on those that it does not understand."""
    pair, (ours, theirs) = write_pair(tmp_path, {"w": (64, 48)}), pty.openpty()
    words = [sys.executable, "-m", "streamrepair", pair.base, pair.ft, tmp_path / "out"]
    done = subprocess.run(words, stderr=theirs, env={**os.environ, "TQDM_NCOLS": "abc"}, check=False)
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 0


def test_times_too_short_to_tell_are_no_powers_of_ten() -> None:
    assert [format_seconds(seconds) for seconds in (0.0, 2e-8, 0.0097, 0.42)] == [
        "0 s",
        "<0.001 s",
        "0.0097 s",
        "0.42 s",
    ]


def test_a_summary_says_over_how_many_sessions_its_times_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = write_pair(tmp_path, {"w": (64, 48)})
    report = api.repair(pair.base, pair.ft, tmp_path / "out", device="cpu", workers=1)
    terminal.print_summary(report, tmp_path / "out")
    assert " s on cpu with 1 worker: read" in capsys.readouterr().out
    terminal.print_summary(msgspec.structs.replace(report, sessions=3), tmp_path / "out")
    assert " s in 3 sessions on cpu with 1 worker: read" in capsys.readouterr().out


UNREAD = """
import os, sys, threading, time
from streamrepair import console, streams
from streamrepair.engine.stop import StopRequest
from streamrepair.terminal import Bar

streams.prepare()
bar = Bar(quiet=False)


def worker():
    for number in range(100_000):
        bar.note(f"worker {number} " + "x" * 80)


stop = StopRequest()
stop.heeded = True
with console.stop_on_signals(stop, quiet=False):
    threading.Thread(target=worker, daemon=True).start()
    time.sleep(0.5)  # it waits for a reader by now
    os.write(1, b"begun\\n")
    while True:
        bar.note("main " + "y" * 80)
        if streams._descriptor(sys.stderr)._hurries:
            os._exit(75)
"""


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_a_signal_is_heard_though_nobody_reads_what_two_threads_say(terminal: bool) -> None:
    """The one waits for a reader, the other for the one: in a lock of C's no signal would be heard."""
    reader, writer = pty.openpty() if terminal else os.pipe()
    try:
        process = subprocess.Popen([sys.executable, "-c", UNREAD], stdout=subprocess.PIPE, stderr=writer)
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        time.sleep(1.0)  # until what is said finds no room
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(timeout=60) == 75
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
    finally:
        os.close(reader)
        os.close(writer)
