"""The command line in processes of its own: exit statuses, one line per failure, and what goes to which stream."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from streamrepair import api
from streamrepair.cli import main
from streamrepair.version import __version__
from tests.builders import write_safetensors
from tests.command import Result, run
from tests.faults import WRITING
from tests.pairs import DEMO, Pair, shard_bytes, smallest_budget, snapshot, write_pair, write_split

SHAPES = {"some.weight": (64, 48), "other.weight": (48, 64), "norm": (48,)}


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return write_pair(tmp_path, SHAPES)


def _shell(script: str, *arguments: object) -> Result:
    """A line of shell with the command as $SR and the arguments as $1, $2, …"""
    done = subprocess.run(
        ["bash", "-c", script, "bash", *map(str, arguments)],
        env=os.environ | {"SR": f"{sys.executable} -m streamrepair"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


def test_a_repair_says_on_stdout_what_was_done(pair: Pair, tmp_path: Path) -> None:
    result = run(pair.base, pair.ft, tmp_path / "out")
    assert (result.status, result.err) == (0, "")
    assert "3 tensors: 2 repaired, 1 kept as fine-tuned" in result.out
    again = run("repair", pair.base, pair.ft, tmp_path / "out")
    assert (again.status, again.out) == (0, result.out)
    assert "nothing to do" in again.err
    assert run(pair.base, pair.ft, tmp_path / "out", "--quiet") == Result(0, "", "")


def test_json_goes_to_stdout_and_all_else_to_stderr(pair: Pair, tmp_path: Path) -> None:
    (pair.ft / "stray.safetensors").write_bytes(b"")
    result = run(pair.base, pair.ft, tmp_path / "out", "--json", "--workers", 2)
    assert result.status == 0
    assert "warning: FT: ignored weight files stray.safetensors" in result.err
    assert json.loads(result.out) == json.loads((tmp_path / "out" / "streamrepair.json").read_text())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_json_whatever_the_encoding_of_standard_output(tmp_path: Path, encoding: str) -> None:
    """Python's escapes for what an encoding lacks, \\xe9 and \\U0001f600, are none of JSON's."""
    name = "é.模型.😀"
    for side in ("base", "ft"):
        write_split(tmp_path / side, {name: np.ones((64, 64), np.float32)}, 1)
    script = f"PYTHONIOENCODING={encoding} $SR $1 $2 $3 --json"
    result = _shell(script, tmp_path / "base", tmp_path / "ft", tmp_path / "out")
    assert result.status == 0, result.err
    assert list(json.loads(result.out)["tensors"]) == [name]


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    """The system's default is a soft limit, low for checkpoints of hundreds of shards; the process may raise it."""
    pair = write_pair(tmp_path, {f"w{i}": (32, 32) for i in range(40)}, shards=(40, 40))
    result = _shell("ulimit -Sn 64; $SR $1 $2 $3 --quiet", pair.base, pair.ft, tmp_path / "out")
    assert result == Result(0, "", "")
    assert run("verify", tmp_path / "out").status == 0


@pytest.mark.parametrize("files", [6, 11, 13, 16])
def test_too_few_open_files_are_refused_before_any_work(tmp_path: Path, files: int) -> None:
    """Else they are met in OUT, in an input, by the reader ahead of the line, or by an import."""
    pair = write_pair(tmp_path, {f"w{i}": (32, 32) for i in range(6)}, shards=(4, 4))
    result = _shell(f"ulimit -n {files}; $SR $1 $2 $3 --quiet", pair.base, pair.ft, tmp_path / "out")
    assert result.status == 1
    said = rf"error: this process may have {files} files open, and a run of 12 shards, of both sides and of OUT, needs "
    assert re.fullmatch(said + r"\d+: raise the limit on open files \(ulimit -n\)", result.error), result.error
    assert not (tmp_path / "out").exists()
    assert run(pair.base, pair.ft, tmp_path / "out", "--quiet") == Result(0, "", "")


def test_quiet_silences_warnings_but_not_errors(pair: Pair, tmp_path: Path) -> None:
    (pair.ft / "stray.safetensors").write_bytes(b"")
    assert run(pair.base, pair.ft, tmp_path / "out", "--quiet") == Result(0, "", "")
    assert "--scale" in run(pair.base, pair.ft, tmp_path / "out", "--quiet", "--scale", 2).error


def test_version_and_help_answer_on_stdout(tmp_path: Path) -> None:
    assert run("--version") == Result(0, f"streamrepair {__version__}\n", "")
    for words in (["--help"], [], ["repair", "--help"], ["plan", "--help"], ["verify", "--help"]):
        result = run(*words, cwd=tmp_path)
        assert (result.status, result.err) == (0, "")
        assert "Usage" in result.out


@pytest.mark.parametrize("columns", ["0", "1", "2", "x", "²", "99999", "999999999", "9" * 30])
def test_help_ends_however_narrow_or_wide_the_terminal(columns: str) -> None:
    words = [sys.executable, "-m", "streamrepair", "--help"]
    done = subprocess.run(
        words, env=os.environ | {"COLUMNS": columns}, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 500


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "the system has less memory than --ram allows (none was left); finished work is kept: give a"),
        (
            RuntimeError("can't start new thread"),
            "the system lets this process start no more threads; finished work is",
        ),
        (ImportError("libx.so: failed to map"), "a library cannot be loaded (libx.so: failed to map): install"),
        (OSError(errno.EMFILE, "Too many open files", "x.py"), "Too many open files: raise the limit on open files"),
        (OSError(errno.EBADF, "Bad file descriptor", 7), "descriptor 7: Bad file descriptor: check the path"),
    ],
)
def test_limits_of_the_system_are_no_bugs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(api, "plan", fail)
    assert main(["plan", "BASE", "FT"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {said}")


IMPORTS = """
import sys
from streamrepair.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
heavy = {"torch", "scipy", "transformers", "huggingface_hub"} & sys.modules.keys()
print("heavy:", *sorted(heavy), file=sys.stderr)
"""


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["plan", "BASE", "FT"], ["verfy", "x"]])
def test_what_computes_nothing_loads_no_numeric_libraries(pair: Pair, words: list[str]) -> None:
    words = [{"BASE": str(pair.base), "FT": str(pair.ft)}.get(word, word) for word in words]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, *words], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr.splitlines()[-1] == "heavy:"


def test_a_run_on_the_cpu_does_not_load_torch(pair: Pair, tmp_path: Path) -> None:
    words = [str(pair.base), str(pair.ft), str(tmp_path / "out"), "--quiet", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, *words], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == "heavy: scipy\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["verfy", "OUT"], "did you mean verify?"),
        (["pln", "BASE", "FT"], "did you mean plan?"),
        (["BASE", "FT"], "OUT"),
        (["BASE", "FT", "OUT", "more"], "more"),
        (["BASE", "FT", "OUT", "--rma", "1GB"], "--rma"),
        (["BASE", "FT", "OUT", "--ram", "1XB"], "--ram: size '1XB' is not understood: write it like 24GB"),
        (["BASE", "FT", "OUT", "--ram", "0"], "size '0'"),
        (["BASE", "FT", "OUT", "--scale", "-1"], "--scale is -1.0, expected a positive number"),
        (["BASE", "FT", "OUT", "--scale", "x"], "--scale"),
        (["BASE", "FT", "OUT", "--workers", "0"], "--workers is 0"),
        (["BASE", "FT", "OUT", "--workers", "1.5"], "--workers: expected a whole number, not '1.5'"),
        (["verify", "OUT", "--sample", "2.5"], "--sample: expected a whole number, not '2.5'"),
        (["BASE", "FT", ""], "OUT is '', expected a path"),
        (["BASE", "FT", "OUT", "--include", "("], "--include '(' is not a regular expression"),
        (["BASE", "FT", "OUT", "--device", "cuda:99"], "--device cuda:99"),
        (["BASE", "FT", "OUT", "--sigma", "mode"], "--sigma"),
        (["BASE", "FT", "OUT", "--ram", "-5GB"], "size '-5GB' is not understood"),
        (["plan", "BASE", "FT", "--vram", "foo"], "size 'foo' is not understood"),
        (["inspect", "BASE", "FT"], "the command inspect is not in this version"),
        (["verify", "OUT", "--sample", "0"], "--sample is 0"),
    ],
)
def test_wrong_usage_is_2_and_one_line(pair: Pair, tmp_path: Path, words: list[str], said: str) -> None:
    paths = {"BASE": pair.base, "FT": pair.ft, "OUT": tmp_path / "out"}
    result = run(*(paths.get(word, word) for word in words), cwd=tmp_path)
    assert (result.status, result.out) == (2, "")
    assert said in result.error
    assert len(result.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_called_nearly_as_a_command_is_a_checkpoint(pair: Pair, tmp_path: Path) -> None:
    pair.base.rename(tmp_path / "verfy")
    result = run("verfy", pair.ft, tmp_path / "out", "--quiet", cwd=tmp_path)
    assert result == Result(0, "", "")


def test_bad_input_is_3_and_leaves_nothing(pair: Pair, tmp_path: Path) -> None:
    (shard,) = pair.base.glob("*.safetensors")
    os.truncate(shard, shard.stat().st_size - 1)
    before = snapshot(tmp_path)
    for words in (["plan", pair.base, pair.ft], [pair.base, pair.ft, tmp_path / "out"]):
        result = run(*words)
        assert (result.status, result.out) == (3, "")
        assert "model.safetensors" in result.error
        assert result.err.count("\n") == 1
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_nan_in_an_input_is_3_naming_file_and_tensor_and_leaves_no_out(pair: Pair, tmp_path: Path) -> None:
    spoilt = {"some.weight": np.full((64, 48), math.nan, np.float32), "other.weight": np.ones((48, 64), np.float32)}
    write_split(tmp_path / "spoilt", spoilt, 1)
    result = run(pair.base, tmp_path / "spoilt", tmp_path / "out")
    assert result.status == 3
    assert "spoilt/model.safetensors: tensor some.weight holds NaN or infinity at element 0" in result.error
    assert not (tmp_path / "out").exists()


def test_overflow_is_1_naming_the_tensor(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    before = np.full((64, 64), 0.8 * 65504)
    after = before + 65504 * (0.05 + 0.01 * rng.standard_normal((64, 64)))
    before[0, 0] = after[0, 0] = 65504
    for side, weights in (("base", before), ("ft", after)):
        write_split(tmp_path / side, {"some.weight": weights.astype(np.float16)}, 1)
    result = run(tmp_path / "base", tmp_path / "ft", tmp_path / "out")
    assert result.status == 1
    assert "tensor some.weight: a repaired value overflows F16" in result.error
    assert "--out-dtype float32" in result.error


def test_a_budget_too_small_is_5_and_the_one_it_names_works(pair: Pair, tmp_path: Path) -> None:
    result = run(pair.base, pair.ft, tmp_path / "out", "--ram", "1MB")
    assert (result.status, result.out) == (5, "")
    assert not (tmp_path / "out").exists()
    smallest = result.error.rpartition(" ")[2]
    assert run("plan", pair.base, pair.ft, "--ram", smallest).status == 0
    done = run(pair.base, pair.ft, tmp_path / "out", "--ram", smallest, "--json")
    budget = json.loads(done.out)["budget"]
    assert done.status == 0
    assert budget["ram_measured_bytes"] <= budget["ram_allowed_bytes"]


def test_an_out_that_is_held_is_11(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "out" / ".streamrepair").mkdir(parents=True)
    result = _shell('flock "$3/.streamrepair/lock" $SR "$@"', pair.base, pair.ft, tmp_path / "out")
    assert result.status == 11
    assert "is held by another run" in result.error


@pytest.mark.parametrize("where", ["equal", "inside", "linked"])
def test_an_out_that_overlaps_an_input_is_3(pair: Pair, tmp_path: Path, where: str) -> None:
    out = {"equal": pair.ft, "inside": pair.base / "deep" / "out"}.get(where, tmp_path / "out")
    if where == "linked":
        out.mkdir()
        (out / "x.safetensors").hardlink_to(pair.base / "model.safetensors")
    before = snapshot(tmp_path)
    result = run(pair.base, pair.ft, out, "--overwrite")
    assert result.status == 3
    assert "name another" in result.error
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("where", ["circle", "circle/out", "file/out", "n" * 300])
def test_an_out_that_leads_nowhere_is_3(pair: Pair, tmp_path: Path, where: str) -> None:
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "file").write_text("")
    result = run(pair.base, pair.ft, tmp_path / where)
    assert result.status == 3
    assert "leads nowhere" in result.error or "cannot be looked up" in result.error


@pytest.mark.parametrize(
    ("status", "words"),
    [(3, ["out"]), (2, ["OUT", "--report", "report.json"]), (2, ["OUT", "--trace", "trace.json"])],
)
def test_a_current_folder_that_is_gone_is_one_line(pair: Pair, tmp_path: Path, status: int, words: list[str]) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    words = [str(tmp_path / "out") if word == "OUT" else word for word in words]
    shell = 'cd "$1" && rmdir "$1" && shift && exec "$@"'
    command = [sys.executable, "-P", "-m", "streamrepair", str(pair.base), str(pair.ft), *words]
    done = subprocess.run(
        ["sh", "-c", shell, "sh", str(gone), *command], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == status
    assert "leads nowhere (No such file or directory): name another place" in Result(status, "", done.stderr).error
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_is_3(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    result = run(pair.base, pair.ft, tmp_path / "out")
    assert result.status == 3
    assert "is not empty" in result.error


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_an_out_that_cannot_be_written_is_1(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    result = run(pair.base, pair.ft, tmp_path / "locked" / "out")
    assert result.status == 1
    assert "locked/out" in result.error


def test_plan_reads_no_weights_and_writes_nothing(tmp_path: Path) -> None:
    """The weights are holes, gigabytes of them, and stay so; no file or folder is touched."""
    side = 2_000_000
    for name in ("base", "ft"):
        (tmp_path / name).mkdir()
        header = {"w": {"dtype": "F32", "shape": [side, 512], "data_offsets": [0, side * 512 * 4]}}
        encoded = json.dumps(header).encode()
        with (tmp_path / name / "model.safetensors").open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            file.truncate(8 + len(encoded) + side * 512 * 4)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_blocks) for p in (tmp_path, *tmp_path.rglob("*"))}
    table = run("plan", tmp_path / "base", tmp_path / "ft", "--ram", "1GB", cwd=tmp_path)
    parsed = run("plan", tmp_path / "base", tmp_path / "ft", "--ram", "1GB", "--json", cwd=tmp_path)
    assert (table.status, table.err, parsed.status, parsed.err) == (0, "", 0, "")
    assert "2000000 × 512" in table.out
    found = json.loads(parsed.out)
    assert found["tensors"]["w"]["intent"] == "repair"
    assert found["totals"]["read_bytes"] == 4 * side * 512 * 4
    assert {p: (p.stat().st_mtime_ns, p.stat().st_blocks) for p in (tmp_path, *tmp_path.rglob("*"))} == before


@pytest.mark.parametrize("words", ["plan $1 $2", "plan $1 $2 --json", "$1 $2 $3", "$1 $2 $3 --json", "--help"])
def test_a_reader_that_leaves_is_no_failure(pair: Pair, tmp_path: Path, words: str) -> None:
    script = f"$SR {words} | head -c0; exit ${{PIPESTATUS[0]}}"
    result = _shell(script, pair.base, pair.ft, tmp_path / "out")
    assert (result.status, result.err) == (0, "")
    if "$3" in words:
        assert (tmp_path / "out" / "streamrepair.json").exists()


def test_a_reader_that_leaves_does_not_hide_damage(pair: Pair, tmp_path: Path) -> None:
    run(pair.base, pair.ft, tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").unlink()
    result = _shell("$SR verify $1 --json | head -c0; exit ${PIPESTATUS[0]}", tmp_path / "out")
    assert result.status == 4
    assert "tokenizer.json" in result.error


@pytest.mark.parametrize("words", ["plan", "repair"])
def test_all_is_written_to_a_pipe_that_does_not_block(tmp_path: Path, words: str) -> None:
    """A loop of events hands out such pipes; the reader comes when the pipe has long been full."""
    pair = write_pair(tmp_path, {f"w{i}": (32, 32) for i in range(40)})
    ours, theirs = os.pipe2(os.O_NONBLOCK)
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)
    out = [tmp_path / "out"] if words == "repair" else []
    command = [sys.executable, "-m", "streamrepair", words, *map(str, (pair.base, pair.ft, *out)), "--json"]
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE, text=True) as process:
        while select.select((), (theirs,), (), 0)[1]:  # it is not yet full
            assert process.poll() is None
            time.sleep(0.01)
        os.close(theirs)
        time.sleep(0.2)  # for whoever does not wait to end
        os.set_blocking(ours, True)
        with os.fdopen(ours) as reader:
            text = reader.read()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert len(json.loads(text)["tensors"]) == 40
    assert len(text) > 8192


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_end_up_in_the_weights(pair: Pair, tmp_path: Path, closed: str) -> None:
    """A file that is opened while 1 is free gets the number 1."""
    run(pair.base, pair.ft, tmp_path / "whole")
    (pair.ft / "stray.safetensors").write_bytes(b"")
    result = _shell(f"$SR $1 $2 $3 --workers 2 {closed}", pair.base, pair.ft, tmp_path / "out")
    assert result.status == 0
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")


WITHOUT_NULL = "import os, sys; os.devnull = '/nowhere/null'; from streamrepair.entry import main; sys.exit(main())"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-", "| head -c0"])
def test_streams_are_closed_where_there_is_no_dev_null(pair: Pair, tmp_path: Path, closed: str) -> None:
    """As in a container with an empty /dev."""
    (pair.ft / "stray.safetensors").write_bytes(b"")
    script = f'{shlex.quote(sys.executable)} -c "$4" $1 $2 $3 {closed}; exit ${{PIPESTATUS[0]}}'
    result = _shell(script, pair.base, pair.ft, tmp_path / "out", WITHOUT_NULL)
    assert result.status == 0, result.err
    assert "Traceback" not in result.err
    assert run("verify", tmp_path / "out", "--quiet").status == 0


def test_names_from_a_checkpoint_are_escaped_wherever_shown(tmp_path: Path) -> None:
    evil = "\x1b[2J\n<b>../x\u202e"
    for side, scale in (("base", 1.0), ("ft", 2.0)):
        (tmp_path / side).mkdir()
        weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
        write_safetensors(tmp_path / side / "model.safetensors", {evil: weights * np.float32(scale)})
    for words in (["plan", "base", "ft"], ["base", "ft", "out"], ["base", "ft", "out2", "--ram", "1MB"]):
        result = run(*words, cwd=tmp_path)
        assert "\x1b" not in result.out + result.err
        assert "\u202e" not in result.out + result.err
    assert "\\x1b[2J\\n" in result.error


def test_debug_shows_the_traceback_and_changes_nothing_else(pair: Pair, tmp_path: Path) -> None:
    for words, status in (([tmp_path / "out", "--ram", "1MB"], 5), ([tmp_path / "out", "--scale", "0"], 2)):
        plain, debug = run(pair.base, pair.ft, *words), run(pair.base, pair.ft, *words, "--debug")
        assert (plain.status, debug.status) == (status, status)
        assert "Traceback" in debug.err
        assert debug.err.endswith(plain.err)


def test_a_second_copy_of_the_report(pair: Pair, tmp_path: Path) -> None:
    assert run(pair.base, pair.ft, tmp_path / "out", "--report", tmp_path / "copy.json").status == 0
    assert (tmp_path / "copy.json").read_bytes() == (tmp_path / "out" / "streamrepair.json").read_bytes()
    refused = run(pair.base, pair.ft, tmp_path / "out2", "--report", pair.ft / "config.json")
    assert refused.status == 3
    assert "--report" in refused.error


IMPORTING = """
import os, signal, sys

class Sender:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.{signal})

sys.meta_path.insert(0, Sender())
from streamrepair.entry import main
sys.exit(main())
"""
"""The command line, which gets a signal when a module begins to be imported."""


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("SIGINT", "streamrepair.cli"),
        ("SIGTERM", "cyclopts"),
        ("SIGUSR1", "streamrepair.api"),
        ("SIGINT", "numpy"),
    ],
)
def test_a_signal_while_the_command_is_still_being_loaded_is_75(
    pair: Pair, tmp_path: Path, name: str, module: str
) -> None:
    code = IMPORTING.format(module=module, signal=name)
    words = [sys.executable, "-c", code, str(pair.base), str(pair.ft), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    result = Result(done.returncode, done.stdout, done.stderr)
    assert (result.status, result.out) == (75, "")
    assert f"interrupted by {name}" in result.error
    assert run(pair.base, pair.ft, tmp_path / "out", "--quiet") == Result(0, "", "")


LEFT_BEHIND = """
import sys, threading, time
import torch
import streamrepair.cli

def work():
    while True:
        torch.linalg.eigh(torch.eye(200, dtype=torch.float64))

def failed():
    threading.Thread(target=work, daemon=True).start()
    time.sleep(0.3)
    print("said")
    return 5

streamrepair.cli.main = failed
from streamrepair.entry import main
sys.exit(main())
"""


def test_a_worker_that_is_left_in_torch_changes_no_status() -> None:
    """As a card's is, when another worker's failure ends the run; the interpreter's end would abort the process."""
    words = [sys.executable, "-c", LEFT_BEHIND]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (5, "said\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("words", ["$1 $2 $3", "$1 $2 $3 --json", "plan $1 $2", "--help", "--version"])
def test_a_full_standard_output_is_one_line_and_no_bug(pair: Pair, tmp_path: Path, words: str) -> None:
    result = _shell(f"$SR {words} > /dev/full", pair.base, pair.ft, tmp_path / "out")
    assert result.status == 1
    assert "standard output cannot be written (No space left on device)" in result.error
    assert result.err.count("\n") == 1
    if "$3" in words:
        assert run("verify", tmp_path / "out", "--quiet").status == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("options", ["", "--json"])
def test_a_full_standard_output_does_not_hide_damage(pair: Pair, tmp_path: Path, options: str) -> None:
    run(pair.base, pair.ft, tmp_path / "out", "--quiet")
    (tmp_path / "out" / "config.json").unlink()
    result = _shell(f"$SR verify $1 {options} > /dev/full", tmp_path / "out")
    assert result.status == 4
    assert "1 fault: config.json: copied from FT by the run, now missing" in result.error


def test_float64_deltas_of_any_size_are_summed_up(tmp_path: Path) -> None:
    """Their norms are numbers, the squares of these are not."""
    rng = np.random.default_rng(0)
    before = rng.standard_normal((64, 64))
    for name, scale in (("huge", 1e190), ("small", 1e-190)):
        for side, added in (("base", 0.0), ("ft", 1.0)):
            noise = np.random.default_rng(1).standard_normal((64, 64)) + 5.0
            write_split(tmp_path / name / side, {"w": scale * (before + added * noise)}, 1)
        result = run(tmp_path / name / "base", tmp_path / name / "ft", tmp_path / name / "out")
        assert result.status == 0
        share = float(result.out.partition("energy kept ")[2].partition("%")[0])
        assert 0.0 < share < 100.0


def test_what_a_plan_warns_of_is_said(pair: Pair) -> None:
    (pair.ft / "stray.safetensors").write_bytes(b"")
    table, parsed = run("plan", pair.base, pair.ft), run("plan", pair.base, pair.ft, "--json")
    warning = "FT: ignored weight files stray.safetensors"
    assert table.err == parsed.err == f"warning: {warning}\n"
    assert json.loads(parsed.out)["warnings"] == [warning]


def test_one_of_something_is_said_so(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {"w": (64, 48)}, shards=(1, 1))
    text = run("plan", pair.base, pair.ft, "--workers", 1).out
    assert "in 1 shard, 0 GFLOP\n" in text
    assert "s on cpu with 1 worker, a processor each, by shipped speeds (streamrepair bench --calibrate" in text
    assert "1 tensor: 1 repaired" in run(pair.base, pair.ft, tmp_path / "out").out
    (tmp_path / "out" / "config.json").unlink()
    assert "1 fault; 1 tensor," in run("verify", tmp_path / "out").out


STOPPED = (
    "import os, signal, sys; from streamrepair.engine import task; repair = task._repair; "
    "task._repair = lambda job: (os.kill(os.getpid(), signal.{name}), repair(job))[1]; "
    "from streamrepair.cli import main; sys.exit(main())"
)


def test_a_signal_is_75_and_names_itself(pair: Pair, tmp_path: Path) -> None:
    code = STOPPED.format(name=signal.SIGUSR1.name)
    words = [sys.executable, "-c", code, str(pair.base), str(pair.ft), str(tmp_path / "out"), "--workers", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    result = Result(done.returncode, done.stdout, done.stderr)
    assert (result.status, result.out) == (75, "")
    assert "interrupted by SIGUSR1; finished work is kept: the same command continues it" in result.error
    assert "stopping: the tensors in hand are finished, which takes 25 s at most; the same again ends" in result.err


FULL = (
    "import os, sys; from streamrepair.checkpoint import osfile; from tests.faults import Kernel, fails; "
    "osfile.os = Kernel(({calls!r},), fails(2, 28)); from streamrepair.cli import main; sys.exit(main())"
)


@pytest.mark.parametrize("call", [call for call in WRITING if call != "unlink"])
def test_a_disk_that_refuses_is_one_line(pair: Pair, tmp_path: Path, call: str) -> None:
    words = [sys.executable, "-c", FULL.format(calls=call), str(pair.base), str(pair.ft), str(tmp_path / "out")]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parent.parent
    )
    result = Result(done.returncode, done.stdout, done.stderr)
    assert result.status in (1, 5)
    assert "No space left on device" in result.error
    assert run(pair.base, pair.ft, tmp_path / "out", "--quiet") == Result(0, "", "")


def test_the_demo_pair_from_start_to_end(tmp_path: Path) -> None:
    assert run(DEMO / "base", DEMO / "ft", tmp_path / "out").status == 0
    assert "whole" in run("verify", tmp_path / "out", "--deep").out


def test_a_plan_has_times_and_their_sum(pair: Pair) -> None:
    """A row for each kind of tensor with its time; the totals say about how long all of it takes."""
    text = run("plan", pair.base, pair.ft, "--device", "cpu").out
    head, *rows = text.splitlines()
    assert head.split() == ["tensors", "shape", "what", "result", "memory", "each", "one", "worker"]
    assert all(row.split()[-1] in ("s", "min", "h") for row in rows[: rows.index("")])
    assert re.search(r"^time: about [\d.e-]+ s on cpu with \d+ workers, a processor each, by ", text, re.MULTILINE)
    data = json.loads(run("plan", pair.base, pair.ft, "--device", "cpu", "--json").out)
    assert sum(group["count"] for group in data["groups"]) == len(data["tensors"])
    total_s = sum(tensor.get("seconds", 0.0) for tensor in data["tensors"].values())
    assert 0 < data["totals"]["estimated_s"] <= total_s * 1.01


def test_a_plan_says_why_each_backend_and_what_more_memory_would_do(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {"a": (1200, 1200), "b": (1200, 1200)}, shards=(1, 1))
    options = ("plan", pair.base, pair.ft, "--device", "cpu", "--workers", 2)
    little = smallest_budget(pair) + 24_000_000  # for the second worker, but not for its matrix
    scarce = run(*options, "--ram", little).out
    found = re.search(
        r": room for 1 of the largest at once, for one per worker with --ram (\d+MB)$", scarce, re.MULTILINE
    )
    assert found is not None
    assert "at once" in run(*options, "--ram", f"{int(found[1][:-2]) - 1}MB").out
    plenty = run(*options, "--ram", found[1]).out
    assert "at once" not in plenty
    assert "\ngram: the reduction is predicted to be about as quick as block Krylov, or quicker\n" in plenty
    forced = run(*options, "--ram", "4GB", "--backend", "randomized").out
    assert "repair, randomized or gram " in forced
    assert "\nrandomized or gram: --backend randomized\n" in forced
    small = write_pair(tmp_path / "small", {"c": (200, 200)})
    forced = run("plan", small.base, small.ft, "--device", "cpu", "--backend", "randomized").out
    assert "\ngram: too few columns for block Krylov, whose basis would be as large as the matrix\n" in forced
    data = json.loads(run(*options, "--ram", little, "--json").out)
    assert (data["workers"], data["budget"]["side_by_side"]) == (2, 1)
    for tensor in data["tensors"].values():
        assert {"backend": "gram", "tries": ["gram"], "threads": 1}.items() <= tensor.items()
        assert tensor["why"] == "the reduction is predicted to be about as quick as block Krylov, or quicker"


def test_a_plan_names_the_budget_in_which_a_float64_svd_has_room(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {"a": (1000, 1000), "b": (600, 600)}, shards=(1, 1))
    options = ("plan", pair.base, pair.ft, "--device", "cpu", "--workers", 1)
    found = re.search(
        r"may turn out to need, though few do; one that does would fail the run: with (--ram \S+ --workers 1) there",
        run(*options, "--ram", smallest_budget(pair)).err,
    )
    assert found is not None
    assert "no room" not in run(*options, *found[1].split()[:2]).err


def test_the_summary_says_who_was_busy_and_a_trace_what_they_did(pair: Pair, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    result = run(pair.base, pair.ft, tmp_path / "out", "--workers", 1, "--device", "cpu", "--trace", trace)
    assert result.status == 0, result.err
    assert re.search(r"^cpu busy \d+%.*; files busy \d+%$", result.out, re.MULTILINE)
    events = json.loads(trace.read_text())["traceEvents"]
    tasks = {event["name"] for event in events if event.get("cat") == "task"}
    assert tasks == json.loads((tmp_path / "out" / "streamrepair.json").read_text())["tensors"].keys()


def test_a_trace_among_the_inputs_is_refused(pair: Pair, tmp_path: Path) -> None:
    result = run(pair.base, pair.ft, tmp_path / "out", "--trace", pair.base / "trace.json")
    assert result.status == 3
    assert result.error.startswith(f"error: --trace {pair.base}/trace.json lies in BASE")
    assert not (tmp_path / "out").exists()
    assert not (pair.base / "trace.json").exists()
