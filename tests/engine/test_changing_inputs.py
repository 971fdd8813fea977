"""Inputs that change under a run: told of at the latest before they count, and nothing is sealed from a mixture."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from streamrepair import api
from streamrepair.checkpoint import osfile
from streamrepair.checkpoint.headers import ShardHeader
from streamrepair.checkpoint.read import InputFiles
from streamrepair.engine import commit
from streamrepair.errors import InputError
from tests.faults import ALL, Kernel, none
from tests.pairs import Pair, shard_bytes, write_pair

SHAPES = {"a": (48, 40), "b": (40, 48), "v": (40,), "c": (64, 32)}
_STEP = 13


def _truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 500)


def _grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def _rewritten(path: Path) -> None:
    """In place, other weights of the same length."""
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(len(content) // 2)
        file.write(bytes(len(content) - len(content) // 2))


def _replaced(path: Path) -> None:
    """By another file that takes its name, as a download or an editor does it."""
    other = path.with_name("new")
    shutil.copyfile(path, other)
    _rewritten(other)
    other.replace(path)


def _restored(path: Path) -> None:
    """By a file that has even its time: the inode is another."""
    other = path.with_name("new")
    shutil.copy2(path, other)
    other.replace(path)


def _removed(path: Path) -> None:
    path.unlink()


CHANGES = [_truncated, _grown, _rewritten, _replaced, _restored, _removed]


def _copied(pair: Pair, folder: Path) -> Pair:
    return Pair(shutil.copytree(pair.base, folder / "base"), shutil.copytree(pair.ft, folder / "ft"))


def _result(pair: Pair, out: Path) -> dict[str, bytes] | None:
    """Shards of a whole result; None, and no report, for what is refused."""
    try:
        api.repair(pair.base, pair.ft, out, workers=1)
    except InputError:
        assert not (out / "streamrepair.json").exists()
        return None
    return shard_bytes(out)


@pytest.mark.parametrize("side", ["base", "ft"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_an_input_that_changes_at_any_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str, change: Callable[[Path], None]
) -> None:
    """Refused; or the result of one input: of the old, not needed any more, or of the new, not opened before."""
    monkeypatch.setattr(commit, "_EVERY_S", 0.0)
    pair = write_pair(tmp_path, SHAPES, shards=(1, 2))
    kernel = Kernel(ALL, none)
    monkeypatch.setattr(osfile, "os", kernel)
    old, count = _result(pair, tmp_path / "old"), len(kernel.calls)
    changed = _copied(pair, tmp_path / "changed")
    change(sorted(getattr(changed, side).glob("*.safetensors"))[-1])
    new = _result(changed, tmp_path / "new")
    refused = 0
    for number in range(1 + CHANGES.index(change), count, _STEP):
        changing, out = _copied(pair, tmp_path / str(number)), tmp_path / str(number) / "out"
        victim = sorted(getattr(changing, side).glob("*.safetensors"))[-1]

        def fault(count: int, name: str, at: int = number, path: Path = victim) -> None:
            if count == at:
                change(path)

        monkeypatch.setattr(osfile, "os", Kernel(ALL, fault))
        found = _result(changing, out)
        monkeypatch.setattr(osfile, "os", os)
        assert found is None or found in (old, new)
        if found is None:
            refused += 1
            for name, content in shard_bytes(out).items() if out.exists() else ():
                assert old is not None
                assert content == old[name], "sealed from a mixture"
            if (out / ".streamrepair" / "run.json").exists():  # to go on would mix; the same bytes are no other input
                assert _result(changing, out) == (old if change is _restored else None)
    assert refused >= 3


def test_an_input_that_is_changed_after_it_was_read_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compared before a commit: what was made of it stays out of the journal."""
    pair = write_pair(tmp_path, SHAPES, shards=(1, 1))

    def fault(count: int, name: str) -> None:
        if name == "fsync" and (tmp_path / "out" / ".streamrepair" / "journal").exists():
            _rewritten(pair.base / "model.safetensors")

    monkeypatch.setattr(osfile, "os", Kernel(("fsync",), fault))
    with pytest.raises(InputError, match="changed while it was being read"):
        api.repair(pair.base, pair.ft, tmp_path / "out", workers=1)
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(("every_s", "most"), [(0.0, 40), (3600.0, 3)])
def test_inputs_are_looked_at_once_for_many_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_s: float, most: int
) -> None:
    """A look is at every shard of both: one for each that is sealed would take the square of their number."""
    pair = write_pair(tmp_path, {f"w{i}": (64,) for i in range(16)}, shards=(16, 16))
    looks, look = list[int](), InputFiles.check_unchanged

    def counted(files: InputFiles, shards: Sequence[ShardHeader]) -> None:
        looks.append(len(shards))
        look(files, shards)

    monkeypatch.setattr(InputFiles, "check_unchanged", counted)
    monkeypatch.setattr(commit, "_EVERY_S", every_s)
    api.repair(pair.base, pair.ft, tmp_path / "out", workers=1)
    assert set(looks) == {32}
    assert 2 <= len(looks) <= most
    assert len(looks) >= 16 or every_s


def test_a_sidecar_that_goes_away_meanwhile_is_missed(tmp_path: Path) -> None:
    """A result without its tokenizer would look whole."""
    pair, out = write_pair(tmp_path, SHAPES), tmp_path / "out"
    tokenizer = pair.ft / "tokenizer.json"
    content = tokenizer.read_bytes()

    class Taking(api.Silent):
        def begin(self, *_: object) -> None:
            tokenizer.unlink()

    with pytest.raises(InputError, match=r"tokenizer\.json"):
        api.repair(pair.base, pair.ft, out, watcher=Taking())
    assert not (out / "streamrepair.json").exists()
    tokenizer.write_bytes(content)
    assert "tokenizer.json" in api.repair(pair.base, pair.ft, out).sidecars
