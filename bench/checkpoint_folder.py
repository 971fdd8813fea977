"""Writes Hugging Face checkpoint folders, tensor by tensor, with nothing held; `make_pair.py` makes the numbers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from architectures import Decoder, TensorSpec, config
from tokenizers.pre_tokenizers import ByteLevel


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a checkpoint."""

    file_name: str
    specs: list[TensorSpec]


def shard(specs: Iterable[TensorSpec], itemsize: int, max_shard_bytes: int) -> list[Shard]:
    """Fills shards in order, as Hugging Face does: a tensor that would pass the limit starts the next one."""
    groups: list[list[TensorSpec]] = [[]]
    filled_bytes = 0
    for spec in specs:
        if groups[-1] and filled_bytes + spec.size * itemsize > max_shard_bytes:
            groups.append([])
            filled_bytes = 0
        groups[-1].append(spec)
        filled_bytes += spec.size * itemsize
    if len(groups) == 1:
        return [Shard("model.safetensors", groups[0])]
    return [Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def _header(specs: list[TensorSpec], dtype_name: str, itemsize: int) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        end = offset + spec.size * itemsize
        entries[spec.name] = {"dtype": dtype_name, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class Folder:
    """A checkpoint folder whose tensors are appended in order."""

    def __init__(
        self, path: Path, specs: list[TensorSpec], *, dtype_name: str, itemsize: int, max_shard_bytes: int
    ) -> None:
        path.mkdir(parents=True)
        self.path = path
        self.dtype_name, self.itemsize = dtype_name, itemsize
        self.shards = shard(specs, self.itemsize, max_shard_bytes)
        self.starts = {group.specs[0].name: group for group in self.shards}
        self.stream: BinaryIO | None = None
        if len(self.shards) > 1:
            self._write_index(specs)

    def _write_index(self, specs: list[TensorSpec]) -> None:
        index = {
            "metadata": {"total_size": sum(spec.size for spec in specs) * self.itemsize},
            "weight_map": {spec.name: group.file_name for group in self.shards for spec in group.specs},
        }
        _write_json(self.path / "model.safetensors.index.json", index)

    def begin(self, spec: TensorSpec) -> BinaryIO:
        """The stream to append this tensor's values to, placed at its offset."""
        if spec.name in self.starts:
            self.close()
            group = self.starts[spec.name]
            self.stream = (self.path / group.file_name).open("wb")
            self.stream.write(_header(group.specs, self.dtype_name, self.itemsize))
        assert self.stream is not None
        return self.stream

    def write_sparse(self) -> None:
        """Gives every shard its header and its length, and no data: it reads as zeros and takes no disk."""
        for group in self.shards:
            header = _header(group.specs, self.dtype_name, self.itemsize)
            with (self.path / group.file_name).open("wb") as stream:
                stream.write(header)
                stream.truncate(len(header) + sum(spec.size for spec in group.specs) * self.itemsize)

    def close(self) -> None:
        """Closes the shard being written, if any."""
        if self.stream is not None:
            self.stream.close()


def _write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n")


def write_sidecars(path: Path, decoder: Decoder, torch_dtype: str) -> None:
    """config.json, generation config and a stand-in tokenizer: every byte is one token."""
    _write_json(path / "config.json", config(decoder, torch_dtype))
    _write_json(path / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    specials = ["<unk>", "<s>", "</s>"]
    words = [*specials, *sorted(ByteLevel.alphabet())]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": word, **flags} for i, word in enumerate(specials)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {word: i for i, word in enumerate(words)}, "merges": []},
    }
    _write_json(path / "tokenizer.json", tokenizer)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings |= {"model_max_length": decoder.context, "tokenizer_class": "PreTrainedTokenizerFast"}
    _write_json(path / "tokenizer_config.json", settings)
