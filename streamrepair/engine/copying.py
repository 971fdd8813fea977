"""Tensors that are only copied: FT's bytes, read once, checked and digested on their way."""

from __future__ import annotations

import numpy as np

from streamrepair.checkpoint import osfile
from streamrepair.checkpoint.headers import TensorEntry
from streamrepair.checkpoint.write import digest_text, new_digest
from streamrepair.engine.job import Job
from streamrepair.engine.memory import COPY_BYTES
from streamrepair.engine.nonfinite import met_nonfinite

_DIRECT_FROM_BYTES = 1 << 20
"""Smaller tensors go through the page cache, which gathers them."""


def copy(job: Job) -> tuple[str, str | None]:
    """Write FT's tensor as it is; returns the digest, and where it is not finite if that is allowed.

    Raises:
        NonFiniteInputError: it holds NaN or infinity and the user did not allow it.
    """
    entry, out = job.task.ft.entry, job.task.out
    if out.dtype != entry.dtype:
        from streamrepair.engine.repair_task import copy_widened

        return copy_widened(job)
    digest = new_digest()
    nonfinite: str | None = None
    buffer, past_cache = _copy_buffer(out)
    for offset, length in osfile.chunks(entry.nbytes, COPY_BYTES):
        job.around.check_stop()
        piece = buffer[:length]
        job.read(job.task.ft, offset, piece, of_base=False)
        nonfinite = nonfinite or met_nonfinite(job, piece, offset, of_base=False)
        digest.update(piece)
        job.write(offset, piece, past_cache=past_cache)
        job.tell((offset + length) / entry.nbytes)
    return digest_text(digest), nonfinite


def _copy_buffer(out: TensorEntry) -> tuple[memoryview, bool]:
    """A buffer for pieces of a tensor that is only copied, and whether they go past the page cache.

    They do where that is worth it: the buffer then lies at pages as the tensor does in the file.
    """
    if out.nbytes < _DIRECT_FROM_BYTES:
        return memoryview(bytearray(min(COPY_BYTES, out.nbytes))), False
    lead = out.start % osfile.PAGE_BYTES
    return osfile.page_aligned(lead + COPY_BYTES)[lead:], True


def copy_while_equal(job: Job) -> str | None:
    """Copy FT's tensor for as long as BASE's bytes are the same; the digest if they all are.

    A tensor that fine-tuning did not touch is done in this one pass; any other leaves at its first difference, which is
    nearly always in the first piece, and is overwritten by its repair.
    """
    base, ft, out = job.task.pairing.base, job.task.ft, job.task.out
    assert base is not None
    if base.entry.dtype != ft.entry.dtype or out.dtype != ft.entry.dtype:
        return None
    digest = new_digest()
    base_buffer = memoryview(bytearray(min(COPY_BYTES, out.nbytes)))
    ft_buffer, past_cache = _copy_buffer(out)
    for offset, length in osfile.chunks(out.nbytes, COPY_BYTES):
        job.around.check_stop()
        base_piece, ft_piece = base_buffer[:length], ft_buffer[:length]
        if offset == 0:  # most pairs differ at once: a page tells
            head = min(length, 1 << 14)
            job.read(base, 0, base_piece[:head], of_base=True)
            job.read(ft, 0, ft_piece[:head], of_base=False)
            if base_piece[:head].tobytes() != ft_piece[:head].tobytes():
                return None
        job.read(base, offset, base_piece, of_base=True)
        job.read(ft, offset, ft_piece, of_base=False)
        if not _equal(base_piece, ft_piece):
            return None
        if met_nonfinite(job, ft_piece, offset, of_base=False):
            return None
        digest.update(ft_piece)
        job.write(offset, ft_piece, past_cache=past_cache)
        job.tell((offset + length) / out.nbytes)
    return digest_text(digest)


def _equal(a: memoryview, b: memoryview) -> bool:
    whole = len(a) // 8 * 8
    words = np.array_equal(np.frombuffer(a[:whole], np.uint64), np.frombuffer(b[:whole], np.uint64))
    return bool(words) and a[whole:].tobytes() == b[whole:].tobytes()
