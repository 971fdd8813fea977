"""The commonest failures, word for word: file, tensor, found, expected, what to do; one line, as a user reads it."""

from __future__ import annotations

import errno
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from streamrepair import api
from streamrepair.checkpoint import osfile
from streamrepair.engine import commit
from streamrepair.engine.stop import StopRequest
from streamrepair.errors import BudgetError, InputError, LockedError, OutputError, StreamRepairError, brief
from tests.builders import entry, write_file
from tests.faults import Kernel, fails
from tests.pairs import Pair, spoil, write_pair

SHAPES = {"w": (64, 48), "v": (48,)}
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


class Case:
    """A sound pair and an OUT in a folder called T, to be spoilt in one way."""

    def __init__(self, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.top, self.patch = top, monkeypatch
        self.pair = write_pair(top, SHAPES, shards=(1, 2))
        self.base, self.ft, self.out = self.pair.base, self.pair.ft, top / "out"

    def run(self, **options: object) -> None:
        """The repair."""
        api.repair(self.base, self.ft, self.out, workers=1, **options)  # type: ignore[arg-type]

    def run_with(self, call: str, number: int, error: int) -> None:
        """The repair on a kernel that fails once."""
        self.patch.setattr(osfile, "os", Kernel((call,), fails(number, error)))
        self.patch.setattr(commit, "_EVERY_S", 0.0)
        self.run()


def _missing(case: Case) -> None:
    case.base = case.top / "nowhere"
    case.run()


def _no_weights(case: Case) -> None:
    (case.base / "model.safetensors").unlink()
    case.run()


def _pickles(case: Case) -> None:
    (case.base / "model.safetensors").rename(case.base / "pytorch_model.bin")
    case.run()


def _pointer(case: Case) -> None:
    (case.base / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    case.run()


def _cut(case: Case) -> None:
    os.truncate(case.base / "model.safetensors", 6308)
    case.run()


def _missing_shard(case: Case) -> None:
    (case.ft / SECOND).unlink()
    case.run()


def _wrong_length(case: Case) -> None:
    write_file(case.base / "model.safetensors", {"w": entry("F32", [2], 0, 4)}, bytes(4))
    case.run()


def _strangers(case: Case) -> None:
    case.ft = write_pair(case.top / "other", {"x": (64, 48)}).ft
    case.run()


def _nan(case: Case) -> None:
    spoil(case.ft, "w", 7, math.nan)
    case.run()


def _full_out(case: Case) -> None:
    case.out.mkdir()
    (case.out / "notes.txt").write_text("mine")
    case.run()


def _other_settings(case: Case) -> None:
    case.run()
    case.run(scale=1.5)


def _other_input(case: Case) -> None:
    os.utime(case.base / "model.safetensors", ns=(0, 1000))
    case.run()
    os.utime(case.base / "model.safetensors", ns=(0, 2000))
    case.run()


def _moved_input(case: Case) -> None:
    """Where times are whole seconds, as in images that are built to be the same to the byte."""
    os.utime(case.base / "model.safetensors", ns=(0, 10**9))
    case.run()
    case.base = case.base.rename(case.top / "moved")
    case.run()


class Touching(api.Silent):
    """A watcher that touches a file when the work begins."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, plan: object, done_bytes: int) -> None:  # noqa: ARG002
        """Touch it."""
        os.utime(self._path, ns=(0, 2000))


def _changing_input(case: Case) -> None:
    os.utime(case.base / "model.safetensors", ns=(0, 1000))
    case.run(watcher=Touching(case.base / "model.safetensors"))


def _inside(case: Case) -> None:
    case.out = case.base / "out"
    case.run()


def _held(case: Case) -> None:
    lock = case.out / ".streamrepair" / "lock"
    lock.parent.mkdir(parents=True)
    fd = osfile.open_output(lock)
    osfile.pwrite_all(fd, memoryview(b"pid 7 on there\n"), 0, lock)
    assert osfile.lock(fd, lock)
    try:
        case.run()
    finally:
        osfile.close(fd)


def _damaged_journal(case: Case) -> None:
    case.run()
    journal = case.out / ".streamrepair" / "journal"
    content = journal.read_bytes()
    journal.write_bytes(content[:20] + b"?" + content[21:])
    case.run()


def _small_disk(case: Case) -> None:
    case.patch.setattr(osfile, "free_bytes", lambda _: 1000)
    case.run()


def _stopped(case: Case) -> None:
    stop = StopRequest()
    stop.request("interrupted by SIGTERM")
    case.run(stop=stop)


def _damaged(case: Case) -> None:
    case.run()
    (case.out / "streamrepair.json").write_bytes(b"{")
    api.verify(case.out)


P = "T/out/.streamrepair/partial/"
SAME = "finished work is kept: {} and run the same command again"
CASES: list[tuple[Callable[[Case], object], int, str]] = [
    (_missing, 3, "BASE: T/nowhere: cannot be opened (No such file or directory); check the path, or name a Hub id as "
     "owner/name"),
    (_no_weights, 3, "BASE: T/base: has no .safetensors file and no index; name a checkpoint's folder"),
    (_pickles, 3, "BASE: T/base: has no .safetensors file, only pytorch_model.bin; only safetensors is read and "
     "nothing is unpickled; convert it with transformers' from_pretrained(…).save_pretrained(…)"),
    (_pointer, 3, "BASE: T/base/model.safetensors: is a git-LFS pointer, the file itself was not downloaded; run `git "
     "lfs pull` or `hf download`"),
    (_cut, 3, "BASE: T/base/model.safetensors: is 6308 bytes long, its last tensor ends at byte 6408: it was cut; "
     "download or export the file again"),
    (_missing_shard, 3, f"FT: T/ft/model.safetensors.index.json: 1 of its 2 shards are missing ({SECOND}); download "
     "them into the same folder"),
    (_wrong_length, 3, "BASE: T/base/model.safetensors: tensor w: data_offsets span 32 bits, F32 [2] takes 64 bits; "
     "download or export the file again"),
    (_strangers, 3, "BASE T/base and FT T/other/ft have no tensor name in common (BASE has w, v, FT has x): name a "
     "checkpoint and one that was fine-tuned from it"),
    (_nan, 3, f"T/ft/{FIRST}: tensor w holds NaN or infinity at element 7, expected finite numbers; restore the file, "
     "or pass such tensors through with --on-nonfinite copy-ft"),
    (_full_out, 3, "OUT T/out is not empty and holds no unfinished run: name a new folder, or write "
     "beside what it holds with --overwrite"),
    (_other_settings, 3, "OUT T/out holds a run that differs from this one: --scale was 1.0, is 1.5: repeat the "
     "earlier command, name another OUT, or start anew with --overwrite"),
    (_other_input, 3, "OUT T/out holds a run that differs from this one: BASE file T/base/model.safetensors was 6408 "
     "bytes, mtime 1000, header add1fa4ce9712a30, is 6408 bytes, mtime 2000, header add1fa4ce9712a30: repeat the "
     "earlier command, name another OUT, or start anew with --overwrite"),
    (_moved_input, 3, "OUT T/out holds a run that differs from this one: BASE file T/base/model.safetensors was 6408 "
     "bytes, mtime 1000000000, header add1fa4ce9712a30, is none of its files; BASE file T/moved/model.safetensors was "
     "none of its files, is 6408 bytes, mtime 1000000000, header add1fa4ce9712a30: repeat the earlier command, name "
     "another OUT, or start anew with --overwrite"),
    (_changing_input, 3, "T/base/model.safetensors: changed while it was being read (6408 bytes, mtime 1000 → 6408 "
     "bytes, mtime 2000): nothing may write to the inputs during a run; run again with --overwrite"),
    (_inside, 3, "OUT T/base/out is, lies in, or contains BASE T/base: name another folder"),
    (_held, 11, "OUT T/out is held by another run (pid 7 on there): wait for it or stop it"),
    (_damaged_journal, 3, "T/out/.streamrepair/journal: line 1 of 3 is damaged; the disk lost finished work: run again "
     "with --overwrite to start anew"),
    (lambda c: c.run_with("pwrite", 5, errno.ENOSPC), 1, f"{P}{FIRST}.partial: could not be written (No space left on "
     "device); " + SAME.format("free space")),
    (lambda c: c.run_with("posix_fallocate", 1, errno.ENOSPC), 5, f"{P}{FIRST}.partial: 6248 bytes cannot be reserved "
     "(No space left on device); free space or choose another OUT"),
    (lambda c: c.run_with("posix_fallocate", 1, errno.EFBIG), 5, f"{P}{FIRST}.partial: 6248 bytes cannot be reserved "
     "(File too large); raise the limit on the size of files (ulimit -f) or choose another OUT"),
    (lambda c: c.run_with("open", 1, errno.EMFILE), 1, "T/base/model.safetensors: cannot be read (Too many open "
     "files): raise the limit on open files (ulimit -n) and run the same command again"),
    (lambda c: c.run_with("fsync", 1, errno.ENFILE), 1, "T: could not be synced (Too many open files in system); "
     + SAME.format("raise the limit on open files (ulimit -n)")),
    (lambda c: c.run_with("preadv", 3, errno.EIO), 3, "T/base/model.safetensors: read of 6144 bytes at 168 failed "
     "(Input/output error): check the disk it lies on, then run the same command again"),
    (lambda c: c.run_with("makedirs", 1, errno.EROFS), 1, "T/out: could not be created (Read-only file system); "
     + SAME.format("make it writable")),
    (lambda c: c.run_with("makedirs", 1, errno.EACCES), 1, "T/out: could not be created (Permission denied); "
     + SAME.format("make it writable")),
    (lambda c: c.run_with("replace", 2, errno.EIO), 1, f"T/out/{FIRST}: could not be given its name (Input/output "
     "error); " + SAME.format("mend the disk")),
    (_small_disk, 5, "OUT T/out: the result needs 4.02 MB, 1 kB are free: free space or choose another OUT"),
    (lambda c: c.run(ram="1XB"), 2, "--ram: size '1XB' is not understood: write it like 24GB (10^9 bytes) or 16GiB "
     "(2^30 bytes)"),
    (lambda c: c.run(include="("), 2, "--include '(' is not a regular expression: missing ), unterminated subpattern "
     "at position 0"),
    (_stopped, 75, "interrupted by SIGTERM"),
    (lambda c: api.verify(c.out), 4, "T/out/streamrepair.json: missing: OUT is not a result, or its run has not "
     "finished: run the repair again"),
    (_damaged, 4, "T/out/streamrepair.json: unreadable (Input data was truncated): run the repair again"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "status", "message"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_the_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Case], object],
    status: int,
    message: str,
) -> None:
    with pytest.raises(StreamRepairError) as caught:
        spoil(Case(tmp_path, monkeypatch))
    assert str(caught.value).replace(str(tmp_path), "T") == message
    assert caught.value.exit_status == status


def test_the_pair_that_is_spoilt_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, monkeypatch)
    case.run()
    assert isinstance(case.pair, Pair)
    assert api.verify(case.out).damage == ()


@pytest.mark.parametrize("kind", [StreamRepairError, InputError, OutputError, BudgetError, LockedError])
def test_finding_and_advice_are_one_message_and_stay_apart(kind: type[StreamRepairError]) -> None:
    """Whatever the standard library's type makes of two arguments."""
    error = kind("a; b", "do c")
    for each in (error, pickle.loads(pickle.dumps(error))):
        assert (type(each), str(each), each.finding, each.advice) == (kind, "a; b; do c", "a; b", "do c")
    assert (str(kind("a; b")), kind("a; b").finding, kind("a; b").advice) == ("a; b", "a; b", "")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1 GiB …",
            "CUDA out of memory. Tried to allocate 2.00 GiB.",
        ),
        (
            "cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling `cusolverDnXsyevd(…)`. This error may "
            "appear if the input matrix contains NaN.",
            "cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling `cusolverDnXsyevd(…)`.",
        ),
        ("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be …",
         "CUDA error: an illegal memory access was encountered"),
        ("linalg.eigh: The algorithm failed to converge (error code: 5).",) * 2,
        ("", ""),
    ],
)  # fmt: skip
def test_what_torch_says_is_told_without_its_advice(said: str, told: str) -> None:
    assert brief(RuntimeError(said)) == told
