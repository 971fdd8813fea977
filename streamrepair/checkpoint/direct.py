"""Past the page cache: whole pages between a buffer that lies at pages and the device, the rest the usual way."""

from __future__ import annotations

import ctypes
import errno
import mmap
from pathlib import Path

from streamrepair.checkpoint import osfile
from streamrepair.checkpoint.refusals import writing

PAGE_BYTES = 4096
"""What direct reads and writes are aligned to; a device that wants more is written the usual way."""


def page_aligned(nbytes: int) -> memoryview:
    """A zeroed buffer that begins at a page, as the device wants it for what goes past the page cache."""
    # Private: shared memory is a file to the kernel, and dearer to fill.
    return memoryview(mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))[:nbytes]


def pwrite_direct(fd: int, direct_fd: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Write all of `buffer` at `offset`: whole pages past the page cache if they lie at pages in memory too.

    Edges, and all of it where the file system refuses, go the usual way; the kernel keeps the two ways coherent.

    Raises:
        OutputError: the device refused.
    """
    head = min(len(buffer), -offset % PAGE_BYTES)
    middle = (len(buffer) - head) // PAGE_BYTES * PAGE_BYTES
    if direct_fd < 0 or middle == 0 or _address(buffer[head:]) % PAGE_BYTES:
        osfile.pwrite_all(fd, buffer, offset, path)
        return
    osfile.pwrite_all(fd, buffer[:head], offset, path)
    done = head
    with writing(path, "written"):
        while done < head + middle and done % PAGE_BYTES == head % PAGE_BYTES:
            try:
                count = osfile.pwrite_some(direct_fd, buffer[done : head + middle], offset + done)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                break
            if count == 0:
                break
            done += count
    osfile.pwrite_all(fd, buffer[done:], offset + done, path)


def pread_direct(direct_fd: int, buffer: memoryview, offset: int, nbytes: int) -> memoryview | None:
    """The `nbytes` bytes from `offset`, read past the page cache; None where that failed: read them the usual way.

    Args:
        buffer: page-aligned, two pages larger than `nbytes`.
    """
    lead = offset % PAGE_BYTES
    whole = -(-(lead + nbytes) // PAGE_BYTES) * PAGE_BYTES
    try:
        count = osfile.pread_some(direct_fd, buffer[:whole], offset - lead)
    except OSError:
        return None
    return buffer[lead : lead + nbytes] if count >= lead + nbytes else None


def _address(buffer: memoryview) -> int:
    """Where a buffer lies; −1, which is no page, for one that cannot be written to."""
    return -1 if buffer.readonly else ctypes.addressof(ctypes.c_char.from_buffer(buffer))
