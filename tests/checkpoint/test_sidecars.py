"""What is carried over from FT beside the weights: all that loading needs, nothing else, byte for byte, unexecuted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from streamrepair.checkpoint.layout import open_checkpoint
from streamrepair.checkpoint.sidecars import copy_sidecars, left_beside, not_carried, sidecars
from streamrepair.errors import InputError, OutputError
from tests.builders import write_safetensors, write_sharded

CARRIED = (
    "LICENSE", "USE_POLICY.md", "added_tokens.json", "bpe.codes", "chat_template.jinja", "config.json",
    "entity_vocab.tsv",
    "generation_config.json", "kernel.cu", "merges.txt", "modeling_custom.py", "preprocessor_config.json",
    "prophetnet.tokenizer", "source.spm", "special_tokens_map.json", "templates/tool_use.jinja", "tokenizer.json",
    "tokenizer.model", "tokenizer.model.v7m1", "tokenizer_config.json", "vocab.json",
)  # fmt: skip
LEFT = (
    ".gitattributes", ".cache/x.json", "README.md", "adapter_config.json", "all_results.json",
    "checkpoint-500/config.json", "dghard_repair.json", "model.bin", "onnx/config.json", "optimizer.pt",
    "model.safetensors.index.fp16.json", "original/params.json", "pytorch_model.bin.index.json", "rng_state.pth",
    "streamrepair.json", "trainer_state.json", "training_args.bin",
)  # fmt: skip


@pytest.fixture
def ft(tmp_path: Path) -> Path:
    folder = write_sharded(tmp_path / "ft", [{"a": np.zeros(3, np.float32)}, {"b": np.zeros(3, np.float32)}])
    for name in (*CARRIED, *LEFT):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{name}\r\n\xff".encode("latin-1"))
    return folder


def _copied(ft: Path, out: Path, dtype: str | None = None) -> dict[str, bytes]:
    checkpoint = open_checkpoint(ft, side="FT")
    out.mkdir(exist_ok=True)
    copy_sidecars(checkpoint, sidecars(checkpoint), out, dtype=dtype)
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_what_loading_needs_is_copied_byte_for_byte_and_nothing_else(ft: Path, tmp_path: Path) -> None:
    """No weights and no index: those are the run's own."""
    assert sidecars(open_checkpoint(ft, side="FT")) == CARRIED
    assert _copied(ft, tmp_path / "out") == {name: (ft / name).read_bytes() for name in CARRIED}


def test_what_might_be_needed_and_is_not_copied_is_told_of(ft: Path) -> None:
    """Weights of a part in a folder of its own, pickled vocabularies: not training's state, pictures or the README."""
    missed = (
        "2_Dense/model.safetensors", "3_Dense/pytorch_model.bin",
        "adapter/adapter_model.safetensors", "data/train.tsv", "language_model/5gram.bin",
        "mel_filters.npz", "mm_projector.bin", "vocab.pkl", "voices/a.npy",
    )  # fmt: skip
    for name in (
        *missed,
        "stray.safetensors",
        "optimizer.bin",
        "pytorch_model-00001-of-00002.bin",
        "adapter_model.safetensors",
        "assets/a.PNG",
        "global_step5/x.pt",
    ):
        (ft / name).parent.mkdir(exist_ok=True)
        (ft / name).write_bytes(b"")
    assert not_carried(open_checkpoint(ft, side="FT")) == missed
    assert sidecars(open_checkpoint(ft, side="FT")) == CARRIED


def test_custom_code_is_not_executed(ft: Path, tmp_path: Path) -> None:
    witness = tmp_path / "executed"
    (ft / "modeling_custom.py").write_text(f"open({str(witness)!r}, 'w')\n")
    assert b"open" in _copied(ft, tmp_path / "out")["modeling_custom.py"]
    assert not witness.exists()


def test_links_are_followed_and_become_files(ft: Path, tmp_path: Path) -> None:
    """The Hub's cache is made of links; what is no regular file behind one is left."""
    blob = tmp_path / "blob"
    (ft / "tokenizer.json").rename(blob)
    (ft / "tokenizer.json").symlink_to(blob)
    (ft / "circle.json").symlink_to("circle.json")
    (ft / "dangling.json").symlink_to(tmp_path / "nowhere")
    (ft / "unsearched.json").symlink_to("x" * 256)  # as one into a folder that may not be searched: stat is refused
    (ft / "folder.json").mkdir()
    os.mkfifo(ft / "fifo.json")
    copied = _copied(ft, tmp_path / "out")
    assert left_beside(open_checkpoint(ft, side="FT")) == (
        "circle.json",
        "dangling.json",
        "fifo.json",
        "unsearched.json",
    )
    assert copied["tokenizer.json"] == blob.read_bytes()
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert tuple(sorted(copied)) == CARRIED


def test_linked_folders_are_not_walked(ft: Path, tmp_path: Path) -> None:
    """A link to a parent would lead around for ever."""
    (ft / "again").symlink_to(ft, target_is_directory=True)
    assert sidecars(open_checkpoint(ft, side="FT")) == CARRIED


def test_folders_deeper_than_is_looked_are_told_of(ft: Path) -> None:
    (ft / "a" / "b" / "c").mkdir(parents=True)
    for folder in ("a", "a/b", "a/b/c"):
        (ft / folder / "tokenizer.json").write_text("{}")
    opened = open_checkpoint(ft, side="FT")
    assert [name for name in sidecars(opened) if name.startswith("a/")] == ["a/b/tokenizer.json", "a/tokenizer.json"]
    assert left_beside(opened) == ("a/b/c/",)


@pytest.mark.parametrize("mark", ["streamrepair.json", ".streamrepair/lock"])
def test_a_result_among_them_is_not_carried_along(ft: Path, mark: str) -> None:
    """FT named as one file may have OUT beside it: every repetition would copy the result into itself."""
    for name in (mark, "config.json"):
        path = ft / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    assert sidecars(open_checkpoint(ft, side="FT")) == CARRIED


def test_a_folder_of_out_that_leads_elsewhere_is_refused(ft: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="templates: leads out of OUT"):
        _copied(ft, tmp_path / "out")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_the_dtype_that_config_states_follows_the_weights(ft: Path, tmp_path: Path, key: str) -> None:
    def stating(dtype: str) -> dict[str, object]:
        parts = {"text_config": {key: dtype, "n": 1}, "thinker_config": {"text_config": {key: dtype}}}
        return {"model_type": "ä", key: dtype, **parts, "quantization_config": None}

    config = stating("bfloat16")
    (ft / "config.json").write_text(json.dumps(config))
    (ft / "text_config.json").write_text(json.dumps(config))
    copied = _copied(ft, tmp_path / "out", "float32")
    assert json.loads(copied["config.json"]) == stating("float32")
    assert json.loads(copied["text_config.json"]) == config


@pytest.mark.parametrize("content", ["not JSON", "[]", '{"model_type": "x"}'])
def test_a_config_without_a_dtype_is_not_given_one(ft: Path, tmp_path: Path, content: str) -> None:
    (ft / "config.json").write_text(content)
    copied = _copied(ft, tmp_path / "out", "float32")["config.json"]
    if content.startswith("{"):
        assert json.loads(copied) == json.loads(content)
    else:
        assert copied.decode() == content


def test_one_file_has_sidecars_only_beside_a_config(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "w.safetensors", {"a": np.zeros(3, np.float32)})
    (tmp_path / "notes.txt").write_text("mine")
    assert sidecars(open_checkpoint(path, side="FT")) == ()
    (tmp_path / "config.json").write_text("{}")
    assert sidecars(open_checkpoint(path, side="FT")) == ("config.json", "notes.txt")


def test_a_sidecar_with_the_longest_name_is_copied(ft: Path, tmp_path: Path) -> None:
    """The name of what is not whole yet was longer than a name may be, which ended the run after all its work."""
    for name in ("说" * 83 + "ab.txt", "说" * 83 + "ac.txt", "x" * 251 + ".txt"):
        (ft / name).write_text(name)
        assert _copied(ft, tmp_path / "out")[name] == name.encode()


def test_a_monstrous_sidecar_is_refused(ft: Path, tmp_path: Path) -> None:
    with (ft / "vocab.json").open("wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(InputError, match=r"vocab\.json: is 268435457 bytes long"):
        _copied(ft, tmp_path / "out")
