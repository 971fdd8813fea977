"""Nothing outside OUT is created or changed, by whatever route; and nothing from a checkpoint is executed."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from streamrepair import api
from streamrepair.checkpoint import osfile
from streamrepair.engine import workspace
from streamrepair.errors import InputError, OutputError
from tests.builders import write_sharded
from tests.faults import Kernel, fails
from tests.pairs import Pair, matrices, snapshot, stored, write_pair

SHAPES = {"a": (48, 40), "b": (40, 48), "v": (40,), "c": (64, 32)}

AUDITED = """
import json, os, sys

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
           "os.chown", "os.utime", "os.setxattr", "os.removexattr", "shutil.rmtree", "shutil.move", "shutil.copyfile",
           "tempfile.mkstemp", "tempfile.mkdtemp"}
RUNS = {"pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "marshal.loads",
        "socket.connect"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
seen, folders = [], {}


def hook(event, args):
    if event == "open" and args[2] & WRITES and isinstance(args[0], (str, bytes, os.PathLike)):
        seen.append((event, os.path.abspath(os.fsdecode(args[0]))))
    elif event in CHANGES:
        seen.extend((event, os.path.abspath(os.fsdecode(a))) for a in args if isinstance(a, (str, bytes, os.PathLike)))
    elif event in RUNS and not (event == "marshal.loads" and importing()):
        seen.append((event, repr(args)[:200]))


def importing():  # compiled modules of the installation itself
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


sys.dont_write_bytecode = True
sys.addaudithook(hook)
from streamrepair.cli import main

status = main(sys.argv[1:])
print(json.dumps([status, seen]), file=sys.stderr)
"""
"""The command line with every system call that Python knows of watched, for what it changes and what it runs."""

_ALLOWED = ("/dev/null", "/proc/self/")


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> object:
        return Path.touch, (self._mark,)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return write_pair(tmp_path, SHAPES, shards=(1, 2))


@pytest.fixture
def hostile(tmp_path: Path) -> Pair:
    """Tensor names that are paths, code and pickles beside the weights, links in every direction."""
    names = ["../../escaped", "/tmp/escaped", "..", "a/../../b", "\x1b[2J", "C:\\x"]
    sides: dict[str, dict[str, object]] = {"base": {}, "ft": {}}
    import numpy as np

    for seed, name in enumerate(names):
        before, after = matrices(np.random.default_rng(seed), (48, 40))
        sides["base"][name], sides["ft"][name] = stored(before, "BF16"), stored(after, "BF16")
    for side, tensors in sides.items():
        folder = tmp_path / side
        dealt = [{n: tensors[n] for n in names[i::2]} for i in range(2)]
        write_sharded(folder, dealt)  # type: ignore[arg-type]
        mark = tmp_path / "executed"
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
        (folder / "modeling.py").write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch()")
        (folder / "config.json").write_text('{"auto_map": {"AutoModel": "modeling.Model"}}')
        (folder / "sub").mkdir()
        (folder / "sub" / "vocab.txt").write_text("x")
        (folder / "linked").symlink_to(tmp_path)
    return Pair(tmp_path / "base", tmp_path / "ft")


def _audited(*words: object, cwd: Path) -> tuple[int, list[tuple[str, str]], str]:
    """A command's status, what it changed and ran, and what it said."""
    home = cwd / "home"
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", AUDITED, *map(str, words)], capture_output=True, text=True, timeout=120, check=False,
        cwd=cwd, env=os.environ | {"HOME": str(home), "TMPDIR": str(home), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    status, seen = json.loads(done.stderr.splitlines()[-1])
    return status, [(event, where) for event, where in seen if not where.startswith(_ALLOWED)], done.stderr[:999]


@pytest.mark.slow
@pytest.mark.parametrize("sides", ["sound", "hostile"])
def test_only_out_is_changed_and_nothing_of_a_checkpoint_runs(
    request: pytest.FixtureRequest, tmp_path: Path, sides: str
) -> None:
    """Of a run, its repetition, a damaged result put right, an overwriting run, and refusals."""
    pair: Pair = request.getfixturevalue("pair" if sides == "sound" else "hostile")
    out, other = tmp_path / "out", tmp_path / "nothing"
    other.mkdir()
    before = {name: found for name, found in snapshot(tmp_path).items() if not name.startswith("out")}
    changed: list[tuple[str, str]] = []

    def audited(*words: object, status: int = 0) -> None:
        found, seen, said = _audited(*words, cwd=tmp_path)
        assert found == status, said
        changed.extend(seen)

    audited("plan", pair.base, pair.ft)
    audited(pair.base, pair.ft, other, "--ram", "1MB", status=5)
    audited(pair.base, pair.ft, pair.ft / "out", status=3)
    assert changed == []
    audited(pair.base, pair.ft, out, "--quiet")
    audited(pair.base, pair.ft, out, "--quiet")
    shard = sorted(out.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x33")
    audited("verify", out, "--repair", "--deep", "--quiet")
    audited(pair.base, pair.ft, out, "--overwrite", "--scale", 2, "--quiet")
    assert len(changed) > 40, "the audit was meant to see the run's own writes"
    assert {event for event, _ in changed} <= {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir",
                                              "os.truncate", "shutil.rmtree"}  # fmt: skip
    outside = [(event, where) for event, where in changed if Path(where) != out and out not in Path(where).parents]
    # shutil.rmtree names what it removes relative to an open folder; a relative name shows as if in the working one.
    assert {where for event, where in outside if event not in ("os.rmdir", "os.remove")} == set()
    after = {name: found for name, found in snapshot(tmp_path).items() if not name.startswith("out")}
    assert after == before
    assert not (tmp_path / "executed").exists()
    assert list((tmp_path / "home").iterdir()) == []


def _half_done(pair: Pair, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that failed at its first sealing."""
    with monkeypatch.context() as patch:
        patch.setattr(osfile, "os", Kernel(("replace",), fails(2, 5)))
        with pytest.raises(OutputError):
            api.repair(pair.base, pair.ft, out, workers=1)


@pytest.mark.parametrize("linked", [".streamrepair", ".streamrepair/partial"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_state_that_leads_out_of_out_is_refused(pair: Pair, tmp_path: Path, linked: str, overwrite: bool) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    (out / linked).parent.mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    (out / linked).symlink_to(elsewhere)
    with pytest.raises(InputError, match=f"{linked} is not a folder"):
        api.repair(pair.base, pair.ft, out, overwrite=overwrite)
    assert [p.name for p in elsewhere.iterdir()] == ["precious"]


@pytest.mark.parametrize("name", ["lock", "journal", "run.json", "made"])
def test_state_files_that_are_links_are_not_written_through(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    out = tmp_path / "out"
    _half_done(pair, out, monkeypatch)
    path = out / ".streamrepair" / name
    elsewhere = path.rename(tmp_path / "elsewhere")
    content = elsewhere.read_bytes()
    path.symlink_to(elsewhere)
    for overwrite in (False, True):
        with contextlib.suppress(OutputError):  # refused, or the link is replaced
            api.repair(pair.base, pair.ft, out, overwrite=overwrite)
        assert elsewhere.read_bytes() == content


@pytest.mark.parametrize("name", ["journal", "partial/model-00001-of-00002.safetensors.partial"])
def test_work_that_has_a_second_name_is_not_changed_in_place(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As after `cp -al OUT COPY`: the copy would change too."""
    out = tmp_path / "out"
    _half_done(pair, out, monkeypatch)
    copy = tmp_path / "copy"
    copy.hardlink_to(out / ".streamrepair" / name)
    content = copy.read_bytes()
    with pytest.raises(OutputError, match=r"has 2 names \(hard links\)"):
        api.repair(pair.base, pair.ft, out)
    assert copy.read_bytes() == content
    copy.unlink()
    api.repair(pair.base, pair.ft, out)
    assert api.verify(out).damage == ()


def test_a_damaged_shard_that_has_a_second_name_is_not_mended_in_place(pair: Pair, tmp_path: Path) -> None:
    """A whole one may have as many as it likes."""
    out, copy = tmp_path / "out", tmp_path / "copy.safetensors"
    api.repair(pair.base, pair.ft, out)
    shard = out / "model-00001-of-00002.safetensors"
    copy.hardlink_to(shard)
    api.repair(pair.base, pair.ft, out)
    damaged = shard.read_bytes()[:-1] + b"\x33"
    shard.write_bytes(damaged)
    with pytest.raises(OutputError, match=r"has 2 names \(hard links\)"):
        api.verify(out, repair=True)
    assert copy.read_bytes() == shard.read_bytes() == damaged


def test_overwrite_removes_links_and_not_what_they_lead_to(pair: Pair, tmp_path: Path) -> None:
    """Whatever names the earlier report gives its sidecars."""
    out, outside = tmp_path / "out", tmp_path / "outside"
    api.repair(pair.base, pair.ft, out)
    outside.mkdir()
    for name in ("victim.json", "shard"):
        (outside / name).write_text("mine")
    (out / "sub").symlink_to(outside)
    report = json.loads((out / "streamrepair.json").read_text())
    report["sidecars"] += ["../outside/victim.json", "sub/victim.json", str(outside / "victim.json")]
    (out / "streamrepair.json").write_text(json.dumps(report))
    shard = out / "model-00001-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(outside / "shard")
    api.repair(pair.base, pair.ft, out, overwrite=True, scale=2.0)
    assert {p.name: p.read_text() for p in outside.iterdir()} == {"victim.json": "mine", "shard": "mine"}
    assert not shard.is_symlink()
    assert api.verify(out).damage == ()


@pytest.mark.parametrize(
    "holder", [f"pid {os.getpid()} on {os.uname().nodename}", "pid 1 on elsewhere", "", "\xff\x1b"]
)
def test_a_lock_file_that_nobody_holds_is_taken_over(pair: Pair, tmp_path: Path, holder: str) -> None:
    """Whatever it says: of a process that is gone and whose number lives again, of another host."""
    out = tmp_path / "out"
    (out / ".streamrepair").mkdir(parents=True)
    (out / ".streamrepair" / "lock").write_bytes(holder.encode("latin-1"))
    assert api.repair(pair.base, pair.ft, out).tensors["a"].action == "repaired"


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else two runs could each hold one: a refused run removes its state, the lock's file with it."""
    out, lock, removed = tmp_path / "out", osfile.lock, []

    def late(fd: int, path: Path) -> bool:
        if not removed:
            removed.append(path)
            path.unlink()
            path.parent.rmdir()
        return lock(fd, path)

    monkeypatch.setattr(osfile, "lock", late)
    ours = workspace.Workspace(out, ())
    osfile.make_folder(out)
    ours._lock()
    assert osfile.is_same_file(ours._lock_fd, out / ".streamrepair" / "lock")
    ours.close()


def test_a_name_that_no_file_can_have_is_one_line(pair: Pair, tmp_path: Path) -> None:
    for out in (tmp_path / ("x" * 300), tmp_path / "a" / ("x" * 300)):
        with pytest.raises((InputError, OutputError), match=r"(cannot|could not) be .* \(File name too long\)"):
            api.repair(pair.base, pair.ft, out)
