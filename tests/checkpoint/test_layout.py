"""What each way of naming a checkpoint resolves to, and what is told of files and tensors that are not part of it."""

from __future__ import annotations

import os
import pickle
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

from streamrepair.checkpoint.layout import Checkpoint, open_checkpoint
from streamrepair.errors import InputError
from tests.builders import bf16, write_index, write_safetensors, write_sharded
from tests.checkpoint.test_sidecars import CARRIED

ONE = {"b": np.zeros((2, 3), dtype=np.float32), "a": np.ones(5, dtype=np.float16)}
TWO = {"d": bf16([[1.0, 2.0]]), "c": np.zeros((), dtype=np.int64)}


def _refusal(given: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(given, side="FT")
    assert str(caught.value).startswith("FT: ")
    assert str(caught.value).isprintable()
    return str(caught.value)


def _shard_names(checkpoint: Checkpoint) -> list[str]:
    return [shard.path.name for shard in checkpoint.shards]


def test_one_file_is_a_checkpoint_without_neighbours(tmp_path: Path) -> None:
    """Its folder is known, but the folder's other shards are not called stray: the user named one file."""
    path = write_safetensors(tmp_path / "some.safetensors", ONE)
    write_safetensors(tmp_path / "other.safetensors", TWO)
    checkpoint = open_checkpoint(path, side="BASE")
    assert (checkpoint.given, checkpoint.folder, checkpoint.whole_folder) == (str(path), tmp_path, False)
    assert (checkpoint.index_name, checkpoint.index_metadata, checkpoint.stray_files) == (None, {}, ())
    assert (tuple(checkpoint.tensors), checkpoint.unindexed) == (("b", "a"), ())
    assert checkpoint.tensors["a"] == (0, checkpoint.shards[0].tensors[1])
    assert checkpoint.total_bytes == path.stat().st_size


@pytest.mark.parametrize("named", ["folder", "index"])
def test_a_sharded_folder_is_read_by_its_index(tmp_path: Path, named: str) -> None:
    folder = write_sharded(tmp_path / "in", [ONE, TWO])
    index = folder / "model.safetensors.index.json"
    checkpoint = open_checkpoint(folder if named == "folder" else str(index), side="BASE")
    assert (checkpoint.folder, checkpoint.index_name, checkpoint.whole_folder) == (folder, index.name, True)
    assert checkpoint.index_metadata == {"total_size": 24 + 10 + 4 + 8}
    assert _shard_names(checkpoint) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert tuple(checkpoint.tensors) == ("b", "a", "d", "c")
    assert {name: shard for name, (shard, _) in checkpoint.tensors.items()} == {"b": 0, "a": 0, "d": 1, "c": 1}
    assert all(name == tensor.name for name, (_, tensor) in checkpoint.tensors.items())
    assert checkpoint.total_bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert pickle.loads(pickle.dumps(checkpoint)) == checkpoint


def test_the_indexs_order_is_kept_and_shards_are_sorted(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "z.safetensors", ONE)
    write_safetensors(tmp_path / "y.safetensors", TWO)
    write_index(tmp_path, {"a": "z.safetensors", "c": "y.safetensors", "b": "z.safetensors", "d": "y.safetensors"})
    checkpoint = open_checkpoint(tmp_path, side="BASE")
    assert tuple(checkpoint.tensors) == ("a", "c", "b", "d")
    assert _shard_names(checkpoint) == ["y.safetensors", "z.safetensors"]


def test_unindexed_tensors_and_stray_files_are_ignored_and_reported(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "part.safetensors", ONE)
    write_safetensors(tmp_path / "consolidated.safetensors", TWO)
    (tmp_path / "._part.safetensors").write_bytes(b"AppleDouble")
    write_index(tmp_path, {"a": "part.safetensors"})
    checkpoint = open_checkpoint(tmp_path, side="BASE")
    assert list(checkpoint.tensors) == ["a"]
    assert (checkpoint.unindexed, checkpoint.stray_files) == (("b",), ("consolidated.safetensors",))


def test_a_single_model_file_wins_over_an_index(tmp_path: Path) -> None:
    """As in transformers; the index's shards are then strays."""
    folder = write_sharded(tmp_path / "in", [ONE, TWO])
    write_safetensors(folder / "model.safetensors", {"x": np.zeros(1)})
    checkpoint = open_checkpoint(folder, side="BASE")
    assert (list(checkpoint.tensors), checkpoint.index_name, checkpoint.whole_folder) == (["x"], None, True)
    assert checkpoint.stray_files == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def test_the_models_own_index_wins_over_others(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "in", [ONE])
    write_sharded(folder, [TWO], stem="extra")
    assert list(open_checkpoint(folder, side="BASE").tensors) == ["b", "a"]


def test_the_only_index_is_taken_whatever_its_name(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "in", [ONE], stem="diffusion_pytorch_model")
    assert open_checkpoint(folder, side="BASE").index_name == "diffusion_pytorch_model.safetensors.index.json"


def test_the_only_file_is_taken_whatever_its_name(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "weights.safetensors", ONE)
    checkpoint = open_checkpoint(tmp_path, side="BASE")
    assert (_shard_names(checkpoint), checkpoint.whole_folder) == (["weights.safetensors"], True)


def test_the_folder_of_a_pipeline_is_refused_with_the_names_of_its_parts(tmp_path: Path) -> None:
    for part in ("unet", "text_encoder"):
        (tmp_path / part).mkdir()
        write_safetensors(tmp_path / part / "model.safetensors", ONE)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "v1.ckpt").write_bytes(b"")
    assert "its subfolders have (text_encoder, unet); name one of them" in _refusal(tmp_path)


def test_a_hidden_file_is_refused(tmp_path: Path) -> None:
    """What is made of one would be hidden too, from loaders and from `verify`; a link to it has another name."""
    write_safetensors(tmp_path / ".w.safetensors", ONE)
    assert "begins with a dot" in _refusal(tmp_path / ".w.safetensors")
    (tmp_path / "w.safetensors").symlink_to(".w.safetensors")
    assert _shard_names(open_checkpoint(tmp_path / "w.safetensors", side="FT")) == ["w.safetensors"]


def test_several_indices_and_none_of_the_usual_name_are_refused(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "in", [ONE], stem="x")
    write_sharded(folder, [TWO], stem="y")
    assert "2 indices (x.safetensors.index.json, y.safetensors.index.json)" in _refusal(folder)


def test_shards_without_their_index_are_refused(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "in", [ONE, TWO])
    (folder / "model.safetensors.index.json").unlink()
    assert "2 .safetensors files" in _refusal(folder)
    assert "missing model.safetensors.index.json" in _refusal(folder)


def test_the_index_of_a_variant_is_refused_with_the_name_that_is_read(tmp_path: Path) -> None:
    """It was said to be missing."""
    folder = write_sharded(tmp_path / "in", [ONE, TWO], stem="model.fp16")
    variant = folder / "model.safetensors.index.fp16.json"
    (folder / "model.fp16.safetensors.index.json").rename(variant)
    assert f"{variant.name} is that of a variant; copy it to model.fp16.safetensors.index.json" in _refusal(folder)
    (folder / "model.fp16.safetensors.index.json").write_bytes(variant.read_bytes())
    assert len(open_checkpoint(folder, side="FT").shards) == 2


@pytest.mark.parametrize("name", ["pytorch_model-00001-of-00002.bin", "a.pt", "a.pth", "a.gguf"])
def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"never read")
    for given in (tmp_path, tmp_path / name):
        assert name in _refusal(given)
        assert "save_pretrained" in _refusal(given)


def test_an_empty_folder_and_an_empty_checkpoint_are_refused(tmp_path: Path) -> None:
    assert "no .safetensors file" in _refusal(tmp_path)
    assert "has no tensors" in _refusal(write_safetensors(tmp_path / "model.safetensors", {}))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "config.json: is no folder, .safetensors file or .index.json" in _refusal(tmp_path / "config.json")


def test_links_into_a_cache_are_followed_and_the_links_folder_is_the_checkpoints(tmp_path: Path) -> None:
    """As the Hub's cache has it: snapshots/x/model.safetensors → ../../blobs/<digest>."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    blob = write_safetensors(tmp_path / "blobs" / "0123abcd", ONE)
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/0123abcd")
    checkpoint = open_checkpoint(tmp_path / "snapshot", side="BASE")
    assert checkpoint.folder == tmp_path / "snapshot"
    assert checkpoint.shards[0].inode == blob.stat().st_ino


@pytest.mark.parametrize("given", ["nowhere", "/no/such/folder", "../no/thing", "a/b/c", "x\0y", "n" * 5000, "\udcff"])
def test_paths_that_do_not_exist_are_refused(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them looks like a Hub id, so nothing is asked of the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert "cannot be opened" in _refusal(given)


def test_the_empty_path_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_safetensors(tmp_path / "model.safetensors", ONE)
    monkeypatch.chdir(tmp_path)
    assert "path is empty" in _refusal("")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names themselves")
def test_paths_that_are_not_utf8_are_read_and_shown(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    folder.mkdir()
    assert "no .safetensors file" in _refusal(folder)
    (folder / os.fsdecode(b"stray\xff.safetensors")).touch()
    write_safetensors(folder / "model.safetensors", ONE)
    checkpoint = open_checkpoint(folder, side="BASE")
    assert checkpoint.stray_files == (os.fsdecode(b"stray\xff.safetensors"),)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_folder_is_refused(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "in", [ONE])
    folder.chmod(0)
    try:
        assert "check its mode" in _refusal(folder)
    finally:
        folder.chmod(0o700)


@pytest.mark.parametrize(
    ("given", "repo", "revision"),
    [
        ("org/model", "org/model", None),
        ("org/model-1.5@main", "org/model-1.5", "main"),
        ("o/m@refs/pr/1", "o/m", "refs/pr/1"),
    ],
)
def test_a_hub_id_is_fetched_without_pickles(
    given: str, repo: str, revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_sharded(tmp_path / "snapshot", [ONE])
    asked: list[tuple[str, str | None, list[str]]] = []

    def fetch(repo_id: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((repo_id, revision, allow_patterns))
        return str(folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    checkpoint = open_checkpoint(given, side="BASE")
    assert (checkpoint.given, checkpoint.folder, checkpoint.whole_folder) == (given, folder, True)
    [(asked_repo, asked_revision, patterns)] = asked
    assert (asked_repo, asked_revision) == (repo, revision)
    fetched = ("model-00001-of-00002.safetensors", "LICENSE.txt", *CARRIED)
    assert [name for name in fetched if not any(fnmatchcase(name, pattern) for pattern in patterns)] == []
    pickles = ("model.bin", "optimizer.pt", "consolidated.00.pth", "vocab.pkl", "model.ckpt")
    assert not any(fnmatchcase(name, pattern) for name in pickles for pattern in patterns)


def test_what_the_hub_client_says_is_not_cut_before_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError("GET https://example.org/" + 250 * "x" + " 401: this model is gated")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert "this model is gated" in _refusal("org/model")
    assert "hf auth login" in _refusal("org/model")


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "weights-2-of-3.safetensors"])
def test_one_shard_of_several_does_not_stand_for_all(tmp_path: Path, name: str) -> None:
    """Named by the user, and left alone in a folder by a broken download; a shard that is all there is may be named."""
    write_safetensors(tmp_path / name, {"a": np.zeros(3, np.float32)})
    assert f"{name}: is one shard of 3; name its folder or its index" in _refusal(tmp_path / name)
    assert f"{name}: is one shard of 3; fetch the others" in _refusal(tmp_path)
    alone = tmp_path / name.replace("2", "1").replace("3", "1")
    (tmp_path / name).rename(alone)
    assert open_checkpoint(alone, side="FT").tensors.keys() == {"a"}


def test_an_index_tells_that_a_file_is_one_of_several(tmp_path: Path) -> None:
    """Whatever its name; another index, or one that is broken, says nothing of it."""
    for name in ("one", "two", "apart"):
        write_safetensors(tmp_path / f"{name}.safetensors", {name: np.zeros(3, np.float32)})
    write_index(tmp_path, {"one": "one.safetensors", "two": "two.safetensors"})
    (tmp_path / "broken.safetensors.index.json").write_text("{")
    said = _refusal(tmp_path / "two.safetensors")
    assert "is one shard of 2; name its folder or model.safetensors.index.json instead" in said
    assert open_checkpoint(tmp_path / "apart.safetensors", side="FT").tensors.keys() == {"apart"}


def test_whatever_the_hub_client_raises_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise RuntimeError("404\nnot\x1b[31m found")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert "org/model@v1 is neither a local path nor a Hub model" in _refusal("org/model@v1")


def test_a_local_path_that_looks_like_a_hub_id_stays_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sharded(tmp_path / "org" / "model", [ONE])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert open_checkpoint("org/model", side="BASE").folder == Path("org/model")
