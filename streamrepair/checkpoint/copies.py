"""Matrices that FT stores twice and BASE once, as where a tool wrote tied weights out: told by their bytes.

Repaired alone, one of them would differ from its copy, and a loader that finds two different ones unties them: another
model than FT repaired. So the copy is paired with BASE's tensor of the other's name, and comes out the same. By headers
alone a plan knows only which may be copies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import xxhash

from streamrepair.checkpoint import osfile
from streamrepair.checkpoint.headers import TensorEntry
from streamrepair.checkpoint.layout import Checkpoint
from streamrepair.checkpoint.pairing import is_repairable
from streamrepair.checkpoint.read import InputFiles

_HEAD_BYTES = 1 << 12
"""Nearly all that are no copies differ here."""
_PIECE_BYTES = 1 << 20


def candidates(base: Checkpoint, ft: Checkpoint) -> dict[str, list[str]]:
    """Matrix that only FT has → matrices of its shape and dtype in FT that BASE has too."""
    paired: dict[tuple[tuple[int, ...], str], list[str]] = defaultdict(list)
    for name, (_, entry) in ft.tensors.items():
        if (found := base.tensors.get(name)) is not None and is_repairable(entry, found[1]):
            paired[entry.shape, entry.dtype].append(name)
    alone = {name: entry for name, (_, entry) in ft.tensors.items() if name not in base.tensors}
    return {
        name: paired[entry.shape, entry.dtype] for name, entry in alone.items() if (entry.shape, entry.dtype) in paired
    }


def copies(base: Checkpoint, ft: Checkpoint) -> dict[str, str]:
    """Matrix that only FT has → the one of FT that BASE has too, and whose bytes are the same.

    Raises:
        InputError: FT cannot be read, or changed since its headers were.
    """
    tried = candidates(base, ft)
    reading = _Reading(ft)
    try:
        paired: dict[bytes, list[str]] = defaultdict(list)
        for name in dict.fromkeys(other for others in _distinct(tried) for other in others):
            paired[reading.head(name)].append(name)
        found = {}
        for name in tried:
            like = (other for other in paired.get(reading.head(name), ()) if reading.same(name, other))
            if (twin := next(like, None)) is not None and not reading.uniform(name):
                found[name] = twin
        return found
    finally:
        reading.close()


def _distinct(tried: Mapping[str, list[str]]) -> list[list[str]]:
    """The lists of candidates, each once: matrices of one shape share theirs."""
    return list({id(others): others for others in tried.values()}.values())


class _Reading:
    """FT's tensors, read for comparison."""

    def __init__(self, ft: Checkpoint) -> None:
        self._ft, self._files = ft, InputFiles()
        self._buffers = (bytearray(_PIECE_BYTES), bytearray(_PIECE_BYTES))

    def close(self) -> None:
        """Let the files go."""
        self._files.close()

    def head(self, name: str) -> bytes:
        """A digest of a tensor's shape, dtype and first bytes."""
        entry = self._entry(name)
        first = self._read(name, 0, min(_HEAD_BYTES, entry.nbytes), self._buffers[0])
        return xxhash.xxh3_128_digest(f"{entry.dtype} {entry.shape} ".encode() + first)

    def uniform(self, name: str) -> bool:
        """Whether all elements are the same, as in a module that was only begun: such are copies of nothing."""
        entry = self._entry(name)
        item = entry.nbytes // entry.numel
        first = self._read(name, 0, item, self._buffers[0])
        return all(
            self._read(name, offset, length, self._buffers[0]) == first * (length // item)
            for offset, length in osfile.chunks(entry.nbytes, _PIECE_BYTES)
        )

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors of one shape and dtype have the same bytes."""
        return all(
            self._read(name, offset, length, self._buffers[0]) == self._read(other, offset, length, self._buffers[1])
            for offset, length in osfile.chunks(self._entry(name).nbytes, _PIECE_BYTES)
        )

    def _read(self, name: str, offset: int, length: int, into: bytearray) -> bytes:
        shard, entry = self._ft.tensors[name]
        self._files.read_into(self._ft.shards[shard], entry.start + offset, memoryview(into)[:length])
        return bytes(into[:length])

    def _entry(self, name: str) -> TensorEntry:
        return self._ft.tensors[name][1]
