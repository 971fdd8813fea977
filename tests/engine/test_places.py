"""Where a run may write: what is refused before any work, so that neither foreign files nor hours are lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from streamrepair import api
from streamrepair.checkpoint import osfile, wholefile
from streamrepair.checkpoint.write import ShardFile
from streamrepair.engine import task
from streamrepair.engine.job import Job
from streamrepair.errors import DiskSpaceError, InputError, LockedError, OutputError, UsageError
from tests.faults import Kernel, fails
from tests.pairs import Pair, shard_bytes, snapshot, write_pair


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return write_pair(tmp_path, {"w": (64, 48), "x": (48, 48)}, shards=(1, 2))


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "config.json", "new.json", ".streamrepair/journal"]
)
def test_a_report_in_out_is_refused_and_takes_nothings_place(pair: Pair, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    for _ in range(2):  # before OUT exists, and when it is whole
        before = snapshot(out) if out.exists() else {}
        with pytest.raises(UsageError, match=r"--report .* lies in OUT"):
            api.repair(pair.base, pair.ft, out, report=out / name)
        assert (snapshot(out) if out.exists() else {}) == before
        api.repair(pair.base, pair.ft, out)
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(UsageError, match="lies in OUT"):
        api.repair(pair.base, pair.ft, out, report=tmp_path / "link" / name)
    assert api.verify(out).damage == ()


def test_the_reports_own_place_is_no_second_one(pair: Pair, tmp_path: Path) -> None:
    api.repair(pair.base, pair.ft, tmp_path / "out", report=tmp_path / "out" / "streamrepair.json")
    assert api.verify(tmp_path / "out").damage == ()


def test_a_report_that_cannot_be_written_is_refused_before_any_work(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "fifo")
    before = snapshot(tmp_path)
    for name, said in (
        ("folder", "is a folder"),
        ("none/report.json", "none does not exist: create it"),
        ("link", "is a link, FIFO or device"),
        ("fifo", "is a link, FIFO or device"),
    ):
        with pytest.raises(UsageError, match=rf"--report .*{said}"):
            api.repair(pair.base, pair.ft, tmp_path / "out", report=tmp_path / name)
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["report", "trace"])
def test_nothing_takes_the_place_of_a_file_beside_weights_that_are_named_as_one_file(
    tmp_path: Path, option: str
) -> None:
    """Their folder is not the input's, but the configuration in it is read; it was replaced by the report."""
    pair = write_pair(tmp_path, {"w": (64, 48)}, shards=(1, 1))
    for side in (pair.base, pair.ft):
        (side / "config.json").write_text("{}")
        for name in ("config.json", "model.safetensors"):
            before = snapshot(tmp_path)
            with pytest.raises(InputError, match=rf"--{option} .* lies in (BASE|FT)"):
                api.repair(
                    pair.base / "model.safetensors",
                    pair.ft / "model.safetensors",
                    tmp_path / "out",
                    **{option: side / name},  # type: ignore[arg-type]
                )
            assert snapshot(tmp_path) == before
    beside = pair.ft / "report.json"
    api.repair(
        pair.base / "model.safetensors",
        pair.ft / "model.safetensors",
        tmp_path / "out",
        **{option: beside},  # type: ignore[arg-type]
    )
    assert beside.is_file()


def test_report_and_trace_in_one_file_are_refused(pair: Pair, tmp_path: Path) -> None:
    """The report took the trace's place, or the trace the report's, and nothing was said."""
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UsageError, match=r"--report and --trace are both .*name two files"):
        api.repair(pair.base, pair.ft, tmp_path / "out", report=tmp_path / "a.json", trace=tmp_path / "link" / "a.json")
    assert not (tmp_path / "out").exists()


def test_files_beside_a_report_and_a_trace_are_left_alone(pair: Pair, tmp_path: Path) -> None:
    """Of whatever name: the one under which a report grows was taken."""
    beside = [tmp_path / name for name in ("a.json", "b.json")]
    others = [path.with_name(f"{path.name}.partial") for path in beside]
    for path in others:
        path.write_text("of the user")
    api.repair(pair.base, pair.ft, tmp_path / "out", report=beside[0], trace=beside[1])
    assert [path.read_text() for path in others] == ["of the user", "of the user"]
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {p.name for p in (*beside, *others)}


@pytest.mark.parametrize("where", ["n" * 300, "n" * 300 + "/report.json"])
def test_a_report_that_cannot_be_looked_up_is_refused(pair: Pair, tmp_path: Path, where: str) -> None:
    for option in ("report", "trace"):
        with pytest.raises(UsageError, match=rf"--{option} .* cannot be looked up \(File name too long\)"):
            api.repair(pair.base, pair.ft, tmp_path / "out", **{option: tmp_path / where})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_out_in_the_folder_of_a_file_stays_as_it_is_when_the_command_is_repeated(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {"w": (64, 48)}, shards=(1, 1))
    out = pair.ft / "out"
    for _ in range(2):
        api.repair(pair.base, pair.ft / "model.safetensors", out)
        assert not (out / "out").exists()


def test_a_report_that_fails_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in ("pwrite", "fsync", "replace"):
        monkeypatch.setattr(osfile, "os", Kernel((call,), fails(1, 28)))
        with pytest.raises(OutputError, match="No space left"):
            wholefile.write_atomic(tmp_path / "report.json", b"{}")
        monkeypatch.undo()
        assert list(tmp_path.iterdir()) == []


def _no_work(job: Job) -> object:
    raise AssertionError("work began")


def test_a_sidecar_that_is_too_large_is_met_before_any_work(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "_repair", _no_work)
    with (pair.ft / "vocab.json").open("wb") as file:
        file.truncate((1 << 28) + 1)
    with pytest.raises(InputError, match=r"vocab\.json: is 268435457 bytes long"):
        api.repair(pair.base, pair.ft, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sidecar_that_cannot_be_read_is_met_before_any_work(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "_repair", _no_work)

    class Unreadable:
        def __getattr__(self, name: str) -> object:
            return getattr(os, name)

        def open(self, path: Path, *rest: int) -> int:
            if Path(path).name == "tokenizer.json":
                raise PermissionError(13, "Permission denied")
            return os.open(path, *rest)

    monkeypatch.setattr(osfile, "os", Unreadable())
    for call in (lambda: api.repair(pair.base, pair.ft, tmp_path / "out"), lambda: api.plan(pair.base, pair.ft)):
        with pytest.raises(InputError, match=r"tokenizer\.json: cannot be read \(Permission denied\)"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("there", ["tokenizer.json/", "sub", "sub -> .", "sub/deep"])
def test_what_has_the_place_of_a_sidecar_in_out_is_met_before_any_work(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    """With --overwrite OUT may hold other files; one in the way ended the run when all else was done."""
    monkeypatch.setattr(task, "_repair", _no_work)
    (pair.ft / "sub" / "deep").mkdir(parents=True)
    (pair.ft / "sub" / "deep" / "vocab.txt").write_text("")
    path = tmp_path / "out" / there.partition(" ")[0]
    path.parent.mkdir(parents=True)
    if there.endswith("/"):
        path.mkdir()
    elif "->" in there:
        path.symlink_to(tmp_path)
    else:
        path.write_text("of the user")
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=r"is in the place of a (file|folder) of FT's: move it away"):
        api.repair(pair.base, pair.ft, tmp_path / "out", overwrite=True)
    assert snapshot(tmp_path) == before


def _foreign(out: Path, names: list[str]) -> None:
    """A checkpoint that no run made, called as the result's files would be."""
    out.mkdir()
    for name in names:
        (out / name).write_bytes(b"precious " + name.encode())


def test_overwrite_takes_no_checkpoint_that_only_bears_the_same_names(pair: Pair, tmp_path: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    _foreign(tmp_path / "out", names)
    before = snapshot(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"not empty|weights that are not of an earlier run"):
            api.repair(pair.base, pair.ft, tmp_path / "out", overwrite=overwrite)
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("begun", [True, False])
def test_a_run_that_goes_on_takes_no_shard_that_it_did_not_make(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool, overwrite: bool
) -> None:
    """One in OUT of which nothing but its state was there, or only an empty folder for that, was replaced."""
    out = tmp_path / "out"
    if begun:
        monkeypatch.setattr(osfile, "os", Kernel(("posix_fallocate",), fails(1, 28)))
        with pytest.raises(DiskSpaceError):
            api.repair(pair.base, pair.ft, out)
        monkeypatch.undo()
    else:
        (out / ".streamrepair").mkdir(parents=True)
    (out / "model-00002-of-00002.safetensors").write_bytes(b"precious")
    for _ in range(2):
        with pytest.raises(InputError, match=r"holds (weights|model-00002).*not.*: move (it|them) away"):
            api.repair(pair.base, pair.ft, out, overwrite=overwrite)
        assert (out / "model-00002-of-00002.safetensors").read_bytes() == b"precious"
    (out / "model-00002-of-00002.safetensors").unlink()
    api.repair(pair.base, pair.ft, out)
    assert api.verify(out).damage == ()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_shard_that_is_put_where_a_stopped_run_would_seal_its_own_is_left_alone(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """All of its tensors are in the journal, and it is still a partial file."""
    out, name = tmp_path / "out", "model-00002-of-00002.safetensors"

    def killed(*_: object, **__: object) -> None:
        raise OutputError("killed")

    monkeypatch.setattr(ShardFile, "seal", killed)
    with pytest.raises(OutputError, match="killed"):
        api.repair(pair.base, pair.ft, out)
    monkeypatch.undo()
    (out / name).write_bytes(b"precious")
    with pytest.raises(InputError, match=r"holds .*not.*: move (it|them) away"):
        api.repair(pair.base, pair.ft, out, overwrite=overwrite)
    assert (out / name).read_bytes() == b"precious"
    shutil.copy(out / ".streamrepair" / "partial" / f"{name}.partial", out / name)  # half of a renaming
    api.repair(pair.base, pair.ft, out)
    assert api.verify(out).damage == ()


def test_mending_removes_nothing_that_a_finished_result_has(pair: Pair, tmp_path: Path) -> None:
    """Though FT has lost it meanwhile."""
    out = tmp_path / "out"
    (pair.ft / "tokenizer.model").write_text("old")
    api.repair(pair.base, pair.ft, out)
    (pair.ft / "tokenizer.model").unlink()
    shard = out / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    assert api.verify(out).damage != ()
    api.repair(pair.base, pair.ft, out)
    assert (out / "tokenizer.model").read_text() == "old"


def test_overwrite_knows_an_unfinished_runs_shards_where_ft_is_made_of_links(pair: Pair, tmp_path: Path) -> None:
    """As the Hub's cache is: its links lead to files named by their digest."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(pair.ft.glob("*.safetensors"))):
        path.rename(blobs / f"{number}")
        path.symlink_to(blobs / f"{number}")
    out = tmp_path / "out"
    api.repair(pair.base, pair.ft, out)
    (out / "streamrepair.json").unlink()
    assert api.repair(pair.base, pair.ft, out, overwrite=True, scale=2.0).settings.scale == 2.0
    assert api.verify(out).damage == ()


@pytest.mark.parametrize("overwrite", [True, False])
def test_nothing_that_an_unfinished_run_copied_beside_the_weights_stays_in_anothers_result(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """Its tokenizer stayed, no report listed it, and `verify` called the result whole."""
    out = tmp_path / "out"
    for name in ("config.json", "tokenizer.model", "sub/vocab.txt"):
        (pair.ft / name).parent.mkdir(exist_ok=True)
        (pair.ft / name).write_text("{}")
    write = wholefile.write_atomic

    def fail_at_the_report(path: Path, data: bytes) -> None:
        if path.name == "streamrepair.json":
            raise OutputError("full")
        write(path, data)

    monkeypatch.setattr(wholefile, "write_atomic", fail_at_the_report)
    with pytest.raises(OutputError, match="full"):
        api.repair(pair.base, pair.ft, out)
    monkeypatch.undo()
    (out / "mine.model").write_text("of the user")
    for name in ("tokenizer.model", "sub/vocab.txt"):
        assert (out / name).is_file()
        (pair.ft / name).unlink()
    report = api.repair(pair.base, pair.ft, out, overwrite=overwrite, scale=2.0 if overwrite else 1.0)
    assert report.sidecars == ("config.json", "tokenizer.json")
    assert {path.name for path in out.rglob("*.model")} == {"mine.model"}
    assert not (out / "sub").exists()


def test_a_result_that_was_half_removed_leaves_none_of_its_copies_either(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report, which lists them, goes first."""
    out = tmp_path / "out"
    (pair.ft / "tokenizer.model").write_text("old")
    api.repair(pair.base, pair.ft, out)
    (pair.ft / "tokenizer.model").unlink()
    unlink = osfile.unlink

    def only_the_report(path: Path) -> None:
        unlink(path)
        if path.name == "streamrepair.json":
            raise OutputError("killed")

    monkeypatch.setattr(osfile, "unlink", only_the_report)
    with pytest.raises(OutputError, match="killed"):
        api.repair(pair.base, pair.ft, out, scale=2.0, overwrite=True)
    monkeypatch.undo()
    assert not (out / "streamrepair.json").exists()
    api.repair(pair.base, pair.ft, out, scale=2.0, overwrite=True)
    assert not (out / "tokenizer.model").exists()


def test_overwrite_takes_no_index_that_is_not_a_runs(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    api.repair(pair.base, pair.ft, out)
    foreign = out / "adapter.safetensors.index.json"
    for text in (json.dumps({"weight_map": {"a": "adapter-1.safetensors"}}), "{", "[]"):
        foreign.write_text(text)
        before = snapshot(out)
        with pytest.raises(InputError, match=r"not of an earlier run, e\.g\. adapter\.safetensors\.index\.json"):
            api.repair(pair.base, pair.ft, out, overwrite=True)
        assert snapshot(out) == before
    foreign.unlink()
    expected = shard_bytes(out)
    api.repair(pair.base, pair.ft, out, overwrite=True)
    assert shard_bytes(out) == expected


def test_a_lock_whose_holder_has_not_signed_yet_is_said_so_plainly(pair: Pair, tmp_path: Path) -> None:
    state = tmp_path / "out" / ".streamrepair"
    state.mkdir(parents=True)
    fd = osfile.open_output(state / "lock")
    assert osfile.lock(fd, state / "lock")
    with pytest.raises(LockedError, match="is held by another run: wait"):
        api.repair(pair.base, pair.ft, tmp_path / "out")
    osfile.close(fd)


@pytest.mark.parametrize("named", ["", "model.safetensors.index.json"])
def test_what_an_unfinished_run_has_left_is_no_input(pair: Pair, tmp_path: Path, named: str) -> None:
    """Its shards have their names once they are whole; tokenizer, report and other shards may be missing."""
    out = tmp_path / "out"
    api.repair(pair.base, pair.ft, out)
    assert api.plan(pair.base, out / named).tasks, "a finished result is a checkpoint like others"
    (out / "streamrepair.json").unlink()
    (tmp_path / "link").mkdir()
    for path in out.glob("*.*"):
        (tmp_path / "link" / path.name).symlink_to(path)
    for sides in ((pair.base, out / named), (out / named, pair.ft), (pair.base, tmp_path / "link" / named)):
        with pytest.raises(InputError, match="is the result of a run that has not finished; finish it"):
            api.plan(*sides)


class Moving(api.Silent):
    """Takes OUT away when the work begins, and perhaps has another run do the same there."""

    def __init__(self, pair: Pair, out: Path, way: str) -> None:
        self.pair, self.out, self.way = pair, out, way
        self.others: dict[str, bytes] = {}

    def begin(self, *_: object) -> None:
        if "moved" in self.way:
            self.out.rename(self.out.with_name("elsewhere"))
        elif "state" in self.way:
            shutil.rmtree(self.out / ".streamrepair")
        else:
            shutil.rmtree(self.out)
        if "replaced" in self.way:
            api.repair(self.pair.base, self.pair.ft, self.out, scale=1.5)
            self.others = snapshot(self.out)


@pytest.mark.parametrize("way", ["moved", "removed", "moved and replaced", "removed and replaced", "state replaced"])
def test_a_run_whose_out_is_taken_away_touches_nothing_in_its_place(pair: Pair, tmp_path: Path, way: str) -> None:
    """A job looks dead, its OUT is moved away and the command given again: everyday life on a cluster."""
    out = tmp_path / "out"
    moving = Moving(pair, out, way)
    with pytest.raises(OutputError, match="moved or removed while the run was on"):
        api.repair(pair.base, pair.ft, out, watcher=moving)
    assert (snapshot(out) if out.exists() else {}) == moving.others
    if moving.others:
        assert api.verify(out).damage == ()
    assert not list(tmp_path.glob("elsewhere/*.safetensors"))


def test_overwrite_keeps_the_result_where_nothing_could_take_its_place(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    api.repair(pair.base, pair.ft, out)
    before = snapshot(out)
    with monkeypatch.context() as patch:
        patch.setattr(osfile, "longest_file_bytes", lambda: 100)
        with pytest.raises(DiskSpaceError, match=r"more than a file may have here: raise .* \(ulimit -f\)"):
            api.repair(pair.base, pair.ft, out, scale=1.5, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(osfile, "os", Kernel(("makedirs",), fails(1, errno.EACCES)))
        with pytest.raises(OutputError, match="Permission denied"):
            api.repair(pair.base, pair.ft, out, scale=1.5, overwrite=True)
    assert {name: data for name, data in snapshot(out).items() if name != ".streamrepair/lock"} == {
        name: data for name, data in before.items() if name != ".streamrepair/lock"
    }
    assert api.verify(out).damage == ()
    api.repair(pair.base, pair.ft, out, scale=1.5, overwrite=True)
