"""Tensors that are only copied: FT's bytes, read once, in pieces that are checked, digested and written from the cache.

A piece is small enough to stay in a core's second-level cache while BASE is compared, NaN looked for, the digest taken
and the bytes handed to the kernel: memory is passed once and not five times. Past the page cache a device wants pieces
that are larger.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from streamrepair.checkpoint import direct, osfile
from streamrepair.checkpoint.write import digest_text, new_digest
from streamrepair.decompose.convert import STORED_TYPE, widen
from streamrepair.engine.job import Job
from streamrepair.engine.memory import COPY_BYTES, PIECE_BYTES
from streamrepair.engine.nonfinite import met_nonfinite

_DIRECT_FROM_BYTES = 1 << 20
"""Smaller tensors go through the page cache, which gathers them."""
_WRITTEN_OUT_BYTES = 1 << 23
"""After so many bytes the device begins to write them: it works while the next are copied."""
_HEAD_BYTES = 1 << 14
"""Most pairs of tensors differ at once: so many bytes of each tell."""


def copy(job: Job) -> tuple[str, str | None]:
    """Write FT's tensor as it is; returns the digest, and where it is not finite if that is allowed.

    Raises:
        NonFiniteInputError: it holds NaN or infinity and the user did not allow it.
    """
    if job.task.out.dtype != job.task.ft.entry.dtype:
        return _copy_widened(job)
    copied = _Copy(job)
    nonfinite: str | None = None
    for offset, piece, _ in copied.pieces():
        job.read(job.task.ft, offset, piece)
        nonfinite = nonfinite or met_nonfinite(job, piece, offset)
        copied.put(offset, piece)
    return copied.digest, nonfinite


def _copy_widened(job: Job) -> tuple[str, str | None]:
    """Write FT's tensor in the wider output dtype; exact.

    Raises:
        NonFiniteInputError: it holds NaN or infinity and the user did not allow it.
    """
    digest = new_digest()
    nonfinite: str | None = None
    entry = job.task.ft.entry
    stored = np.dtype(STORED_TYPE[entry.dtype])
    buffer = memoryview(bytearray(min(COPY_BYTES, entry.nbytes)))
    for offset, length in osfile.chunks(entry.nbytes, COPY_BYTES):
        job.around.check_stop()
        job.read(job.task.ft, offset, buffer[:length])
        nonfinite = nonfinite or met_nonfinite(job, buffer[:length], offset)
        wide = np.empty(length // stored.itemsize, np.float32)
        widen(np.frombuffer(buffer[:length], stored), entry.dtype, wide)
        data = wide.view(np.uint8).data
        digest.update(data)
        job.write(offset // stored.itemsize * 4, data)
    return digest_text(digest), nonfinite


def copy_while_equal(job: Job) -> str | None:
    """Copy FT's tensor for as long as BASE's bytes are the same; the digest if they all are.

    A tensor that fine-tuning did not touch is done in this one pass; any other leaves at its first difference, which is
    nearly always in the first piece, and is overwritten by its repair.
    """
    base, ft, out = job.task.pairing.base, job.task.ft, job.task.out
    assert base is not None
    if base.entry.dtype != ft.entry.dtype or out.dtype != ft.entry.dtype:
        return None
    copied = _Copy(job)
    for offset, piece, of_base in copied.pieces():
        if offset == 0 and not _read_same(job, 0, piece[:_HEAD_BYTES], of_base):
            return None
        if not _read_same(job, offset, piece, of_base) or met_nonfinite(job, piece, offset):
            return None
        copied.put(offset, piece)
    return copied.digest


def _read_same(job: Job, offset: int, piece: memoryview, of_base: bytearray) -> bool:
    """Fill `piece` from FT and the beginning of `of_base` from BASE; whether they are the same."""
    assert job.task.pairing.base is not None
    length = len(piece)
    job.read(job.task.pairing.base, offset, memoryview(of_base)[:length])
    job.read(job.task.ft, offset, piece)
    # A bytearray is compared by memcmp, a memoryview item by item.
    return (of_base if length == len(of_base) else of_base[:length]) == piece


class _Copy:
    """A tensor on its way to OUT."""

    def __init__(self, job: Job) -> None:
        self._job, self._digest = job, new_digest()
        out = job.task.out
        self._past_cache = out.nbytes >= _DIRECT_FROM_BYTES and job.around.shards[job.task.shard].direct
        self._lead = out.start % direct.PAGE_BYTES if self._past_cache else 0
        self._handed_on = 0

    @property
    def digest(self) -> str:
        """Of all that was put."""
        return digest_text(self._digest)

    def pieces(self) -> Iterator[tuple[int, memoryview, bytearray]]:
        """Offset of each piece, a buffer of its length for FT's bytes, and one at least as long for BASE's."""
        step = COPY_BYTES if self._past_cache else PIECE_BYTES
        of_base, of_ft = self._job.worker.pieces.of(step)
        for offset, length in osfile.chunks(self._job.task.out.nbytes, step):
            self._job.around.check_stop()
            # Past the page cache a piece has to lie at pages in memory as it does in the file.
            yield offset, of_ft[self._lead : self._lead + length], of_base

    def put(self, offset: int, piece: memoryview) -> None:
        """Digest and write a piece of FT."""
        out, end = self._job.task.out, offset + len(piece)
        self._digest.update(piece)
        self._job.write(offset, piece, past_cache=self._past_cache)
        self._job.tell(end / out.nbytes)
        if end - self._handed_on >= _WRITTEN_OUT_BYTES or end == out.nbytes:
            self._begin_writing(end)

    def _begin_writing(self, end: int) -> None:
        """Have the device begin with all up to `end`; a small tensor waits for others, and is gathered with them."""
        out = self._job.task.out
        if not self._past_cache and out.nbytes >= PIECE_BYTES:
            shard = self._job.around.shards[self._job.task.shard]
            shard.start_writing(out.start + self._handed_on, end - self._handed_on)
        self._handed_on = end
