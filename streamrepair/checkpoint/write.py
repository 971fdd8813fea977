"""One shard of the result: header first, tensors at their offsets in any order, its name only when it is whole.

A shard grows under `OUT/.streamrepair/partial/`, reserved on disk in full before any work. Loaders glob for
`*.safetensors` in OUT itself; they meet a shard only once every byte has been written, read back, checked and synced.
Where the dtype is kept, FT's header is reused byte for byte, so that offsets, order and metadata are FT's by identity.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from streamrepair.checkpoint import direct, osfile, refusals
from streamrepair.checkpoint.headers import ITEM_BITS, ShardHeader, TensorEntry
from streamrepair.checkpoint.pairing import FLOATS
from streamrepair.errors import DamageError, shown

PARTIAL_SUFFIX = ".partial"
_READ_BACK_BYTES = 1 << 23
_PIECE_BYTES = 1 << 20
"""What is digested at once where the page cache has it: small enough that the allocator keeps the memory."""
_READERS = 2
"""Threads that read a shard back, if it is not small: one waits for the device while the other digests."""


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Where everything of an output shard will lie."""

    name: str
    """Final file name."""
    prefix: bytes
    """The first bytes of the file: the header's length and the header."""
    entries: Mapping[str, TensorEntry]
    """Tensors by name, with their dtype and offsets in the output file."""
    file_bytes: int
    """Final length."""

    @property
    def header_digest(self) -> str:
        """SHA-256 of the length and the header, in hex; of a header read back, `ShardHeader.digest`."""
        return hashlib.sha256(self.prefix).hexdigest()


def layout_like(shard: ShardHeader, out_dtype: str) -> ShardLayout:
    """The output shard of an FT shard; `out_dtype` is "same", or "float32": plain floats of 16 bits become F32."""
    if out_dtype == "same":
        prefix = len(shard.header_bytes).to_bytes(8, "little") + shard.header_bytes
        return ShardLayout(shard.path.name, prefix, {e.name: e for e in shard.tensors}, shard.file_bytes)
    fields: dict[str, object] = {}
    if shard.metadata:
        fields["__metadata__"] = dict(shard.metadata)
    offset, placed = 0, []
    for entry in shard.tensors:
        dtype = "F32" if entry.dtype in FLOATS and entry.dtype != "F64" else entry.dtype
        nbytes = entry.numel * ITEM_BITS[dtype] // 8
        fields[entry.name] = {"dtype": dtype, "shape": entry.shape, "data_offsets": [offset, offset + nbytes]}
        placed.append((entry, dtype, offset, nbytes))
        offset += nbytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format's own alignment of the data
    start = 8 + len(text)
    entries = {e.name: TensorEntry(e.name, dtype, e.shape, start + at, nbytes) for e, dtype, at, nbytes in placed}
    return ShardLayout(shard.path.name, len(text).to_bytes(8, "little") + text, entries, start + offset)


class ShardFile:
    """An output shard while it grows, or the sealed one.

    Args:
        layout: what it will hold. out: the folder of its final name. work: the folder it grows in.
        direct: whether copies may go past the page cache.
    """

    def __init__(self, layout: ShardLayout, *, out: Path, work: Path, direct: bool = True) -> None:
        self.layout, self._direct = layout, direct
        self.final = out / layout.name
        self.partial = work / (layout.name + PARTIAL_SUFFIX)
        self.sealed = False
        self._fd = self._direct_fd = -1
        self._past_cache: set[int] = set()
        """Offsets of writes past the page cache: what lies there is read back from the device too."""

    def open(self) -> bool:
        """Open what is there (the sealed file, or the partial one), or reserve a new partial file.

        Returns:
            False if the sealed file's length or header was wrong: its name was taken back, to write it again.

        Raises:
            DiskSpaceError, OutputError: it cannot be reserved or opened.
        """
        self.sealed = self.final.exists() and not self.partial.exists()
        self._fd = osfile.open_output(self.path)
        sound = not self.sealed or self._begins_right()
        if not sound:
            self.unseal()
        if not self.sealed:
            osfile.refuse_linked(self._fd, self.partial)
            osfile.allocate(self._fd, self.layout.file_bytes, self.partial)
            osfile.pwrite_all(self._fd, memoryview(self.layout.prefix), 0, self.partial)
            self._direct_fd = osfile.open_direct(self.partial) if self._direct else -1
        return sound

    def _begins_right(self) -> bool:
        """Whether the file has the right length and header."""
        with refusals.reading_output():
            if osfile.status(self._fd, self.path).st_size != self.layout.file_bytes:
                return False
            header = bytearray(len(self.layout.prefix))
            osfile.pread_into(self._fd, memoryview(header), 0, self.path)
        return header == self.layout.prefix

    @property
    def path(self) -> Path:
        """Its present name."""
        return self.final if self.sealed else self.partial

    @property
    def direct(self) -> bool:
        """Whether copies go past the page cache."""
        return self._direct_fd >= 0

    def write(self, offset: int, data: memoryview, *, past_cache: bool = False) -> None:
        """Write bytes at a file offset; past the page cache where nobody will read them soon.

        Raises:
            OutputError: the device refused.
        """
        assert not self.sealed, "a sealed shard is not written"
        if past_cache and self.direct:
            direct.pwrite_direct(self._fd, self._direct_fd, data, offset, self.partial)
            self._past_cache.add(offset)
        else:
            osfile.pwrite_all(self._fd, data, offset, self.partial)

    def start_writing(self, offset: int, nbytes: int) -> None:
        """Have the device begin with what is written by now, so that `sync` finds little left."""
        osfile.start_writing(self._fd, offset, nbytes)

    def digest(self, name: str) -> str:
        """Digest of a tensor's bytes as they are in the file now.

        Raises:
            OutputError: they cannot be read back.
        """
        entry = self.layout.entries[name]
        with refusals.reading_output():
            if entry.start in self._past_cache:
                return self._digest_direct(entry.start, entry.nbytes)
            return digest_range(self._fd, entry.start, entry.nbytes, self.path)

    def _digest_direct(self, start: int, nbytes: int) -> str:
        """Likewise, from the device: pages that are not in memory are not brought there."""
        digest = new_digest()
        buffer = direct.page_aligned(_READ_BACK_BYTES + 2 * direct.PAGE_BYTES)
        for offset, length in osfile.chunks(nbytes, _READ_BACK_BYTES):
            found = direct.pread_direct(self._direct_fd, buffer, start + offset, length)
            if found is None:
                return digest_range(self._fd, start, nbytes, self.path)
            digest.update(found)
        return digest_text(digest)

    def let_go(self) -> None:
        """The page cache need not keep what is on the device by now."""
        osfile.let_go(self._fd, 0, self.layout.file_bytes)

    def sync(self) -> None:
        """Force the data to the device.

        Raises:
            OutputError: the device reported an error: what was written since the last sync is to be written again.
        """
        osfile.sync(self._fd, self.path)

    def seal(self, digests: Mapping[str, str], *, check_stop: Callable[[], None] = lambda: None) -> None:
        """Read everything back, compare it with `digests`, sync, and give the shard its final name.

        `check_stop` is called before each tensor; what it raises ends the sealing.

        Raises:
            DamageError: the file does not hold what was written.
            OutputError: sync or rename failed, or another file has its name.
        """
        if not self._begins_right():
            raise DamageError(
                f"{shown(str(self.partial))}: its header does not read back as written: memory or disk is faulty; "
                "run the same command again"
            )

        def read_back(name: str) -> str:
            check_stop()
            return self.digest(name)

        if self.layout.file_bytes <= _READ_BACK_BYTES:
            digested = [read_back(name) for name in self.layout.entries]
        else:
            with ThreadPoolExecutor(_READERS, thread_name_prefix="read-back") as pool:
                digested = list(pool.map(read_back, self.layout.entries))
        for name, found in zip(self.layout.entries, digested, strict=True):
            if found != digests[name]:
                raise DamageError(
                    f"{shown(str(self.partial))}: tensor {shown(name)} reads back with digest {found}, expected "
                    f"{digests[name]}: memory or disk is faulty; run the same command again, or on another disk"
                )
        self.sync()
        osfile.refuse_replaced(self._fd, self.partial)
        osfile.rename(self.partial, self.final)
        osfile.sync_folder(self.final.parent)
        self.sealed = True

    def unseal(self) -> None:
        """Take the final name back from a shard that turned out damaged, to write parts of it again.

        Raises:
            OutputError: the rename failed.
        """
        osfile.refuse_linked(self._fd, self.final)
        osfile.rename(self.final, self.partial)
        osfile.sync_folder(self.final.parent)
        self.sealed = False

    def close(self) -> None:
        """Release the descriptor."""
        for fd in (self._fd, self._direct_fd):
            if fd >= 0:
                osfile.close(fd)
        self._fd = self._direct_fd = -1


def digest_range(fd: int, start: int, nbytes: int, path: Path) -> str:
    """XXH3-128 of a byte range, as "xxh3-128:…".

    Damage is what it guards against, not an adversary: whoever can change OUT can change its report too. It runs at
    memory speed, where a cryptographic hash would be slower than the disk.

    Raises:
        InputError: the file ends early or cannot be read.
    """
    digest = new_digest()
    buffer = memoryview(bytearray(min(nbytes, _PIECE_BYTES)))
    for offset, length in osfile.chunks(nbytes, _PIECE_BYTES):
        osfile.pread_into(fd, buffer[:length], start + offset, path)
        digest.update(buffer[:length])
    return digest_text(digest)


def digest_file(path: Path) -> str:
    """The same of a whole file.

    Raises:
        InputError: it cannot be read.
    """
    with osfile.opened_input(path) as (fd, status):
        return digest_range(fd, 0, status.st_size, path)


def new_digest() -> xxhash.xxh3_128:
    """An empty running digest."""
    return xxhash.xxh3_128()


def digest_of(data: bytes | memoryview) -> str:
    """Digest of bytes in memory."""
    return digest_text(xxhash.xxh3_128(data))


def digest_text(digest: xxhash.xxh3_128) -> str:
    """The digest as it stands in reports."""
    return f"xxh3-128:{digest.hexdigest()}"
