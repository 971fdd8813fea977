"""Tasks of given shapes without files, for the ledger, the schedule and the simulation."""

from __future__ import annotations

from pathlib import Path

from streamrepair.checkpoint.headers import ShardHeader, TensorEntry
from streamrepair.checkpoint.pairing import Pairing, Side
from streamrepair.engine import memory
from streamrepair.engine.lanes import Place
from streamrepair.engine.memory import MatrixShape
from streamrepair.engine.plan import Task

Shape = tuple[int, ...]
NO_FILE = ShardHeader(Path("no-file.safetensors"), 0, 0, 0, 0, b"", 8, {}, ())


def bf16_task(name: str, shape: Shape, *, shard: int = 0, place: Place = "cpu", ram_bytes: int | None = None) -> Task:
    """The task of one bfloat16 tensor: a repair in panels of one block, or for a vector a copy."""
    nbytes = 2
    for side in shape:
        nbytes *= side
    entry = TensorEntry(name, "BF16", shape, 0, nbytes)
    side_of = Side(NO_FILE, entry)
    pairing = Pairing(name, "repair" if len(shape) == 2 else "keep", "", side_of, side_of)
    if len(shape) != 2:
        return Task(pairing, shard, entry, memory.copy_bytes() if ram_bytes is None else ram_bytes)
    matrix = MatrixShape(max(shape), min(shape), 2, 2, 2)
    if ram_bytes is None:
        ram_bytes = memory.repair_bytes(matrix, "gram", matrix.block, cuda=place == "cuda")
    vram_bytes = memory.device_bytes(matrix, "gram") if place == "cuda" else 0
    return Task(pairing, shard, entry, ram_bytes, matrix, matrix.block, "gram", place, vram_bytes)
