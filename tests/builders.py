"""Writes safetensors files and indices byte by byte, the sound and the broken, without any library's help."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

Raw = tuple[str, tuple[int, ...], bytes]
"""A tensor that numpy has no dtype for: ("BF16", shape, bytes)."""
Tensors = Mapping[str, npt.NDArray[np.generic] | Raw]

_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32",
    "int64": "I64", "uint64": "U64", "float16": "F16", "float32": "F32", "float64": "F64", "complex64": "C64",
}  # fmt: skip


def bf16(array: npt.ArrayLike) -> Raw:
    """`array` rounded to bfloat16, ties to even; finite values only."""
    wide = np.ascontiguousarray(array, dtype=np.float32)
    bits = wide.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return "BF16", np.shape(array), rounded.tobytes()


def raw(tensor: npt.NDArray[np.generic] | Raw) -> Raw:
    """dtype, shape and little-endian bytes of a tensor given either way."""
    return tensor if isinstance(tensor, tuple) else (_DTYPES[tensor.dtype.name], tensor.shape, tensor.tobytes())


def entry(dtype: str, shape: Sequence[int], begin: int, end: int) -> dict[str, object]:
    """One tensor's value in a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def write_file(
    path: Path, header: bytes | str | Mapping[str, object], data: bytes = b"", *, n: int | None = None
) -> Path:
    """A file of length, header and data exactly as given, however wrong; `n` is the length to claim."""
    if isinstance(header, Mapping):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    path.write_bytes((len(header) if n is None else n).to_bytes(8, "little") + header + data)
    return path


def write_safetensors(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    """A sound file holding `tensors` in the order given, its header padded to 8 bytes as the library pads it."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = bytearray()
    for name, tensor in tensors.items():
        dtype, shape, content = raw(tensor)
        header[name] = entry(dtype, shape, len(data), len(data) + len(content))
        data += content
    encoded = json.dumps(header, separators=(",", ":")).encode()
    return write_file(path, encoded + b" " * (-len(encoded) % 8), bytes(data))


def write_index(folder: Path, weight_map: Mapping[str, str], *, stem: str = "model", **metadata: object) -> Path:
    """An index as transformers writes it."""
    path = folder / f"{stem}.safetensors.index.json"
    path.write_text(json.dumps({"metadata": metadata, "weight_map": dict(weight_map)}, indent=2) + "\n")
    return path


def write_sharded(
    folder: Path, shards: Sequence[Tensors], *, stem: str = "model", metadata: Mapping[str, str] | None = None
) -> Path:
    """A folder of numbered shards and their index, as transformers writes it; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, tensors, metadata)
        weight_map |= dict.fromkeys(tensors, name)
    total_bytes = sum(len(raw(tensor)[2]) for tensors in shards for tensor in tensors.values())
    write_index(folder, weight_map, stem=stem, total_size=total_bytes)
    return folder
