"""Status 75 in time: whatever the run is doing when it is asked to stop, and with what it had finished kept."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamrepair import api
from streamrepair.checkpoint.write import ShardFile
from streamrepair.engine import local, stop
from streamrepair.engine.plan import Plan
from streamrepair.engine.stop import StopRequest
from streamrepair.errors import InterruptedRunError
from streamrepair.streams import ENDING
from tests.command import Result, finish
from tests.crash.judge import journalled
from tests.pairs import Pair, shard_bytes, tensor_bytes, write_pair

SHAPES = {"a": (48, 40), "b": (40, 48), "v": (40,), "c": (64, 32), "d": (33, 70)}
COMMAND = "import sys; from streamrepair.cli import main; sys.exit(main())"
FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
SMALL_LIMITS = "from streamrepair.engine import stop; stop.GRACE_S, stop.LIMIT_S = {}, {}; "
AT_D = (
    "import pathlib, sys, time; from streamrepair.engine import commit, task; commit._EVERY_S = 0.0; "
    "repair = task._repair; "
    "task._repair = lambda job: (job.task.name == 'd' and there(job), repair(job))[1]\n"
    "def there(job):\n"
    "    pathlib.Path(sys.argv[-1] + '.there').touch()\n"
    "    while True:\n"
    "        time.sleep({})\n"
    "        {}\n"
)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return write_pair(tmp_path, SHAPES, shards=(1, 2))


def _stopped(code: str, pair: Pair, out: Path, number: int = signal.SIGTERM, *, finished: int = 1) -> Result:
    """How a command ends that gets one signal once it is where its code says and has finished so many tensors."""
    words = [sys.executable, "-c", code, "--workers", "2", str(pair.base), str(pair.ft), str(out)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not Path(f"{out}.there").exists() or sum(map(len, journalled(out).values())) < finished:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(number)
    return finish(process)


def _goes_on(pair: Pair, out: Path) -> None:
    """The same command keeps what was finished and ends in the bytes of an undisturbed run."""
    whole = out.with_name("whole")
    api.repair(pair.base, pair.ft, whole)
    kept = {name: record for names in journalled(out).values() for name, record in names.items()}
    assert "d" not in kept
    assert len(kept) >= 1
    report = api.repair(pair.base, pair.ft, out)
    assert shard_bytes(out) == shard_bytes(whole)
    assert {name: report.tensors[name] for name in kept} == kept


@pytest.mark.slow
@pytest.mark.parametrize("number", ENDING)
def test_a_worker_that_cannot_be_reached_is_left_behind(pair: Pair, tmp_path: Path, number: signal.Signals) -> None:
    """Ten minutes in one call, as in LAPACK; the run ends at its limit, which is made short here."""
    out = tmp_path / "out"
    code = SMALL_LIMITS.format(0.2, 0.6) + AT_D.format(600, "pass") + COMMAND
    result = _stopped(code, pair, out, number)
    assert result.status == 75
    assert f"interrupted by {number.name}; finished work is kept" in result.error
    _goes_on(pair, out)


@pytest.mark.slow
def test_a_large_matrix_is_abandoned_between_panels(pair: Pair, tmp_path: Path) -> None:
    """Work without end that looks up now and then, as between panels; the limit of the run is out of reach here."""
    out = tmp_path / "out"
    code = SMALL_LIMITS.format(0.2, 600) + AT_D.format(0.01, "job.around.check_stop()") + COMMAND
    assert _stopped(code, pair, out).status == 75
    _goes_on(pair, out)


def test_the_limits_leave_time_to_end_within_thirty_seconds() -> None:
    """Batch systems kill after that."""
    assert stop.GRACE_S < stop.LIMIT_S
    assert stop.LIMIT_S + local._PARTING_S <= 27


BEFORE = (
    "import pathlib, sys, time; from streamrepair import api\n"
    "def endless(*_, **__):\n"
    "    pathlib.Path(sys.argv[-1] + '.there').touch()\n"
    "    time.sleep(600)\n"
    "api.open_checkpoint = endless\n"
)


@pytest.mark.slow
def test_a_signal_before_the_run_ends_the_command_at_once(pair: Pair, tmp_path: Path) -> None:
    """While a checkpoint is fetched, say: there is nothing to be left in order."""
    result = _stopped(BEFORE + COMMAND, pair, tmp_path / "out", finished=0)
    assert result.status == 75
    assert result.error == "error: interrupted by SIGTERM before any work: the same command begins again"
    assert not (tmp_path / "out").exists()


class Stopping(api.Silent):
    """A watcher that asks for a stop once all bytes are done, before anything is sealed."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop, self._left_bytes = stop, 0

    def begin(self, plan: Plan, done_bytes: int) -> None:
        """Remember what there is to do."""
        self._left_bytes = sum(task.out.nbytes for task in plan.tasks) - done_bytes

    def advance(self, done_bytes: int) -> None:
        """Count down."""
        self._left_bytes -= done_bytes
        if self._left_bytes == 0:
            self._stop.request("enough")


def test_no_shard_is_sealed_once_a_stop_is_requested(pair: Pair, tmp_path: Path) -> None:
    """Reading gigabytes back could take longer than there is time; all tensors are kept all the same."""
    out, request = tmp_path / "out", StopRequest()
    with pytest.raises(InterruptedRunError):
        api.repair(pair.base, pair.ft, out, workers=1, stop=request, watcher=Stopping(request))
    assert not list(out.glob("*.safetensors*"))
    assert not (out / "streamrepair.json").exists()
    kept = {name for names in journalled(out).values() for name in names}
    report = api.repair(pair.base, pair.ft, out)
    assert kept == set(report.tensors)
    assert report.timings.bytes_written == tensor_bytes(out)


@pytest.fixture
def after_two_digests(monkeypatch: pytest.MonkeyPatch) -> Iterator[StopRequest]:
    """A stop request that comes while the second tensor is read back."""
    request, digest, calls = StopRequest(), ShardFile.digest, 0

    def counted(shard: ShardFile, name: str) -> str:
        nonlocal calls
        calls += 1
        if calls == 2:
            request.request("enough")
        return digest(shard, name)

    monkeypatch.setattr(ShardFile, "digest", counted)
    return request


def test_reading_back_before_sealing_stops_on_request(
    pair: Pair, tmp_path: Path, after_two_digests: StopRequest
) -> None:
    """Between tensors; the shard keeps its partial name."""
    out = tmp_path / "out"
    with pytest.raises(InterruptedRunError):
        api.repair(pair.base, pair.ft, out, workers=1, stop=after_two_digests)
    assert not list(out.glob("*00001-of-00002.safetensors"))
    assert api.repair(pair.base, pair.ft, out).timings.bytes_written == tensor_bytes(out)
    assert api.verify(out).damage == ()


def test_reading_back_of_an_earlier_runs_work_stops_on_request(
    pair: Pair, tmp_path: Path, after_two_digests: StopRequest
) -> None:
    """Else a large result that is continued could not be stopped for minutes."""
    out, first = tmp_path / "out", StopRequest()
    with pytest.raises(InterruptedRunError):
        api.repair(pair.base, pair.ft, out, workers=1, stop=first, watcher=Stopping(first))
    before = journalled(out)
    with pytest.raises(InterruptedRunError):
        api.repair(pair.base, pair.ft, out, workers=1, stop=after_two_digests)
    assert journalled(out) == before
    assert api.repair(pair.base, pair.ft, out).timings.bytes_written == tensor_bytes(out)


@pytest.mark.slow
def test_a_signal_after_the_run_does_not_deny_its_work(pair: Pair, tmp_path: Path) -> None:
    """While nobody reads the report on standard output, say: OUT is whole by then."""
    unread = "from streamrepair import terminal; terminal.print_json = lambda _: endless(); "
    code = unread + BEFORE.replace("api.open_checkpoint = endless", "sys.argv.insert(1, '--json')") + COMMAND
    result = _stopped(code, pair, tmp_path / "out", finished=0)
    assert result.status == 75
    assert result.error == "error: interrupted by SIGTERM after the work: the same command tells of it again"
    assert api.verify(tmp_path / "out").damage == ()


IGNORED = (
    "import os, signal, sys\n"
    "from streamrepair.engine import task\n"
    "from streamrepair.entry import main\n"
    "repair = task._repair\n"
    "def sent(job):\n"
    "    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):\n"
    "        os.kill(os.getpid(), number)\n"
    "    return repair(job)\n"
    "task._repair = sent\n"
    "class Sender:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        name == 'cyclopts' and os.kill(os.getpid(), signal.SIGINT)\n"
    "sys.meta_path.insert(0, Sender())\n"
    "main()\n"
)


def test_a_signal_that_is_ignored_at_the_start_stays_ignored(pair: Pair, tmp_path: Path) -> None:
    """As SIGINT is in a script's background, SIGHUP under nohup, SIGUSR1 where a batch system wants it so."""
    command = [sys.executable, "-c", IGNORED, str(pair.base), str(pair.ft), str(tmp_path / "out"), "--quiet"]
    words = ["sh", "-c", "trap '' INT TERM USR1 HUP; exec \"$@\"", "sh", *command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    words[2], words[-2] = "trap '' INT USR1 HUP; exec \"$@\"", str(tmp_path / "out2")
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 75
    assert "error: interrupted by SIGTERM; finished work is kept" in done.stderr


AT_THE_END = (
    "import os, signal, sys\n"
    "class Sender:\n"
    "    def __del__(self, kill=os.kill, own=os.getpid(), number=signal.{}):\n"
    "        kill(own, number)\n"
    "sys.modules['sender'] = Sender()\n"
    "from streamrepair.entry import main\n"
    "sys.exit(main())\n"
)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_no_signal_kills_a_command_that_is_done(pair: Pair, name: str) -> None:
    """At its end the interpreter takes handlers away some time before it is gone."""
    words = [sys.executable, "-c", AT_THE_END.format(name), "plan", str(pair.base), str(pair.ft)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "projected" in done.stdout


@pytest.mark.slow
def test_a_signal_during_verify_claims_nothing_of_its_work(tmp_path: Path) -> None:
    code = BEFORE.replace("api.open_checkpoint", "api.verify") + "from streamrepair.entry import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "verify", str(tmp_path / "out")], stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "out.there").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == "error: interrupted by SIGTERM: the same command begins again\n"
    assert process.returncode == 75


SENT = (
    "import os, signal, sys, time\n"
    "from streamrepair import api, terminal\n"
    "from streamrepair.engine import task\n"
    "from streamrepair.cli import main\n"
    "def sent(*_, **__):\n"
    "    os.kill(os.getpid(), signal.SIGTERM)\n"
    "    {}\n"
    "    time.sleep(600)\n"
    "{} = sent\n"
    "sys.exit(main())\n"
)
LOADING = (
    "import os, signal, sys\n"
    "class Sender:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        name == 'cyclopts' and os.kill(os.getpid(), signal.SIGTERM)\n"
    "sys.meta_path.insert(0, Sender())\n"
    "from streamrepair.entry import main\n"
    "sys.exit(main())\n"
)
MOMENTS = {
    "loading": LOADING,
    "before": SENT.format("pass", "api.open_checkpoint"),
    "twice": SENT.format("os.kill(os.getpid(), signal.SIGUSR1)", "task._repair"),
    "after": SENT.format("pass", "terminal.print_summary"),
}


@contextlib.contextmanager
def _unwritten(how: str) -> Iterator[int]:
    """A standard error to which nothing can be written."""
    with contextlib.ExitStack() as ends:
        if how == "full":
            descriptor = os.open("/dev/full", os.O_WRONLY)
        else:
            reader, descriptor = os.pipe()
            if how == "left":
                os.close(reader)
            else:
                ends.callback(os.close, reader)
                os.set_blocking(descriptor, False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        os.write(descriptor, bytes(4096))
                os.set_blocking(descriptor, True)
        ends.callback(os.close, descriptor)
        yield descriptor


@pytest.mark.parametrize("how", ["left", "unread", pytest.param("full", marks=FULL)])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_is_75_whatever_becomes_of_the_message(pair: Pair, tmp_path: Path, moment: str, how: str) -> None:
    """A handler that fails would be an error of the run, one that waits for a reader would never end."""
    words = [sys.executable, "-c", MOMENTS[moment], str(pair.base), str(pair.ft), str(tmp_path / "out")]
    with _unwritten(how) as descriptor:
        done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=descriptor, timeout=60, check=False)
    assert done.returncode == 75


@pytest.mark.parametrize("options", [["--quiet"], []])
def test_a_run_whose_messages_nobody_reads_ends_when_it_is_asked_to(
    pair: Pair, tmp_path: Path, options: list[str]
) -> None:
    """It waits in its first warning, or in the last line of all, for room in a full pipe."""
    (pair.ft / "stray.safetensors").write_bytes(b"")
    out = tmp_path / "out"
    code = SMALL_LIMITS.format(0.2, 0.6) + AT_D.format(600, "pass") + COMMAND
    words = [sys.executable, "-c", code, *options, str(pair.base), str(pair.ft), str(out)]
    begun = Path(f"{out}.there") if options else out / ".streamrepair" / "run.json"
    with _unwritten("unread") as descriptor, subprocess.Popen(words, stderr=descriptor) as process:
        while not begun.exists():
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(timeout=60) == 75
        finally:
            process.kill()
    assert api.repair(pair.base, pair.ft, out).tensors["d"].action == "repaired"
