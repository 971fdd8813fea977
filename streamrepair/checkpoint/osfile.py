"""The file operations of the engine, whole or failed: the one place where bytes enter and leave the process.

What the kernel may do by halves (short reads and writes, interruption) is finished here; what it refuses is raised as
the one error that names the file. Nothing else in the package calls `os.pread` and its kin, so that a test can stand in
for the kernel under all of it.

What a write guarantees: after `pwrite_all` the bytes are in the page cache, visible to every reader and lost in a power
cut; after `sync` they are on the device. After `rename` the name is visible; after `sync_folder` it survives a power
cut. A failed `sync` may have dropped the pages: it must never be repeated in the hope of success (PostgreSQL's "fsync
gate", 2018); the caller has to write the data again.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from streamrepair.errors import DiskSpaceError, InputError, OutputError, shown

_COPY_BYTES = 1 << 24


def open_input(path: Path) -> int:
    """A descriptor for reading; never blocks on a FIFO.

    Raises:
        InputError: it cannot be opened.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InputError(f"{shown(str(path))}: cannot be opened for reading ({error.strerror})") from error


def open_output(path: Path) -> int:
    """A descriptor for reading and writing, created with 0666 & ~umask, never through a symbolic link.

    Raises:
        OutputError: it cannot be opened.
    """
    with _output(path, "opened for writing"):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def close(fd: int) -> None:
    """Close a descriptor; late write errors were met by `sync` already."""
    with contextlib.suppress(OSError):
        os.close(fd)


def pread_into(fd: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fill `buffer` from `offset`.

    Raises:
        InputError: the file ends before the buffer is full, or cannot be read.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError as error:
            raise InputError(
                f"{shown(str(path))}: read of {len(buffer)} bytes at {offset} failed ({error.strerror})"
            ) from error
        if count == 0:
            raise InputError(
                f"{shown(str(path))}: ends at byte {offset + done} where its header promises more; "
                "it was truncated while being read: restore it and run again"
            )
        done += count


def pwrite_all(fd: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Write all of `buffer` at `offset`.

    Raises:
        OutputError: the device refused (disk full, quota, I/O error).
    """
    done = 0
    with _output(path, "written"):
        while done < len(buffer):
            done += os.pwrite(fd, buffer[done:], offset + done)


def allocate(fd: int, size_bytes: int, path: Path) -> None:
    """Reserve `size_bytes` on disk and set the file's length to it.

    Raises:
        DiskSpaceError: the disk or quota is too small.
        OutputError: any other failure.
    """
    try:
        _fallocate(fd, size_bytes)
        os.ftruncate(fd, size_bytes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskSpaceError(
                f"{shown(str(path))}: {size_bytes} bytes cannot be reserved ({error.strerror}); "
                "free space or choose another OUT"
            ) from error
        raise OutputError(f"{shown(str(path))}: cannot be allocated ({error.strerror})") from error


def _fallocate(fd: int, size_bytes: int) -> None:
    while size_bytes:
        try:
            os.posix_fallocate(fd, 0, size_bytes)
        except InterruptedError:
            continue
        except OSError as error:
            # Some file systems (older NFS, FUSE) have no fallocate: there the space check at the start has to do.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
        return


def sync(fd: int, path: Path) -> None:
    """Force a file's data and length to the device. Never call it again after it failed: write the data again.

    Raises:
        OutputError: the device reported an error; nothing since the last success is known to be on it.
    """
    with _output(path, "synced"):
        os.fsync(fd)


def sync_folder(folder: Path) -> None:
    """Force a folder's names to the device.

    Raises:
        OutputError: the device reported an error.
    """
    with _output(folder, "synced"):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # file systems on which a folder cannot be synced
                raise
        finally:
            os.close(fd)


def rename(source: Path, target: Path) -> None:
    """Give a finished file its final name, atomically.

    Raises:
        OutputError: it failed; the file keeps its old name.
    """
    with _output(target, "given its name"):
        os.replace(source, target)  # noqa: PTH105 – this module is where os calls live


def unlink(path: Path) -> None:
    """Remove a file if it is there.

    Raises:
        OutputError: it is there and cannot be removed.
    """
    with _output(path, "removed"), contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108


def make_folder(path: Path) -> bool:
    """Create a folder (parents too); True if it was not there.

    Raises:
        OutputError: it cannot be created, or a file has its name.
    """
    with _output(path, "created"):
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if not path.is_dir():
                raise
            return False
    return True


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: whole after a crash, either the old bytes or the new.

    Raises:
        OutputError: it failed; the old file is untouched.
    """
    partial = path.with_name(path.name + ".partial")
    unlink(partial)
    fd = open_output(partial)
    try:
        pwrite_all(fd, memoryview(data), 0, partial)
        sync(fd, partial)
    finally:
        close(fd)
    rename(partial, path)
    sync_folder(path.parent)


def chunks(size_bytes: int, step: int = _COPY_BYTES) -> Iterator[tuple[int, int]]:
    """(offset, length) of consecutive pieces of at most `step` bytes."""
    for offset in range(0, size_bytes, step):
        yield offset, min(step, size_bytes - offset)


@contextlib.contextmanager
def _output(path: Path, verb: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{shown(str(path))}: could not be {verb} ({error.strerror or error}); finished work is kept: "
            "mend the disk and run the same command again"
        ) from error
