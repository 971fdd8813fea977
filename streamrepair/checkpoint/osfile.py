"""The file operations of the engine, whole or failed: the one place where bytes enter and leave the process.

What the kernel may do by halves (short reads and writes, interruption) is finished here; what it refuses is raised as
the one error that names the file (`refusals`). Nothing else in the package calls `os.pread` and its kin, so that a test
can stand in for the kernel under all of it but `start_writing`, which is not in `os` and whose failure means nothing:
`direct` (past the page cache) and `wholefile` are made of what is here.

What a write guarantees: after `pwrite_all` the bytes are in the page cache, visible to every reader and lost in a power
cut; after `sync` they are on the device. After `rename` the name is visible; after `sync_folder` it survives a power
cut. A failed `sync` may have dropped the pages: it must never be repeated in the hope of success (PostgreSQL's "fsync
gate", 2018); the caller has to write the data again.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import math
import os
import resource
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from streamrepair.checkpoint.refusals import reading, reading_output, shown_path, writing
from streamrepair.errors import DiskSpaceError, InputError, OutputError

_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = ctypes.CDLL(None).sync_file_range  # Python has no name for it
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def open_input(path: Path) -> int:
    """A descriptor of a regular file for reading; FIFOs and devices are refused without waiting for them.

    Raises:
        InputError: it cannot be opened, or is no regular file.
    """
    with reading(path):
        # O_NONBLOCK: opening a FIFO that nobody writes to would wait for ever.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            mode = os.fstat(fd).st_mode
            if not stat.S_ISREG(mode):
                what = "folder" if stat.S_ISDIR(mode) else "FIFO, device or socket"
                raise InputError(f"is a {what}, expected a regular file", "put the file itself there")
        except BaseException:
            close(fd)
            raise
        return fd


@contextlib.contextmanager
def opened_input(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """A descriptor and status of the regular file at `path`; all that fails in opening or inside names the path.

    Raises:
        InputError: it cannot be opened, or what is done inside fails.
    """
    fd = open_input(path)
    try:
        with reading(path):
            yield fd, os.fstat(fd)
    finally:
        close(fd)


def read_exactly(fd: int, nbytes: int, offset: int) -> bytes:
    """`nbytes` bytes from `offset`, over as many short reads as it takes; InputError where the file ends earlier.

    The error does not name the file: it is for use under `opened_input`, as are the system's own errors.
    """
    parts: list[bytes] = []
    while nbytes > 0:
        try:
            part = os.pread(fd, nbytes, offset)
        except InterruptedError:
            continue
        if not part:
            raise InputError(
                f"ends at byte {offset}, {nbytes} bytes early: it shrank while it was read",
                "download or export the file again",
            )
        parts.append(part)
        nbytes -= len(part)
        offset += len(part)
    return b"".join(parts)


def status(fd: int, path: Path) -> os.stat_result:
    """Size, times and identity of what is open.

    Raises:
        InputError: the file system does not say.
    """
    with reading(path):
        return os.fstat(fd)


def open_output(path: Path) -> int:
    """A descriptor for reading and writing, created with 0666 & ~umask, never through a symbolic link.

    Raises:
        OutputError: it cannot be opened, or is no regular file.
    """
    with writing(path, "opened for writing"):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        if not stat.S_ISREG(status(fd, path).st_mode):
            what = "is a FIFO, device or socket: remove it and run the same command again"
            raise OutputError(f"{shown_path(path)}: {what}")
    except BaseException:
        close(fd)
        raise
    return fd


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
        except InterruptedError:
            continue
        except OSError as error:
            raise InputError(
                f"{shown_path(path)}: read of {len(buffer)} bytes at {offset} failed ({error.strerror}): "
                "check the disk it lies on, then run the same command again"
            ) from error
        if count == 0:
            raise InputError(
                f"{shown_path(path)}: ends at byte {offset + done} where its header promises more; "
                "it was truncated while being read: restore it and run again"
            )
        done += count


def read_ahead(fd: int, offset: int, nbytes: int) -> None:
    """Ask the kernel to have a range in the page cache soon; a wish, which it may ignore."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_WILLNEED)


def let_go(fd: int, offset: int, nbytes: int) -> None:
    """Tell the kernel that a range's pages are not needed in the page cache; it keeps those not yet written."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


def pwrite_all(fd: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Write all of `buffer` at `offset`.

    Raises:
        OutputError: the device refused (disk full, quota, I/O error).
    """
    done = 0
    with writing(path, "written"):
        while done < len(buffer):
            try:
                count = os.pwrite(fd, buffer[done:], offset + done)
            except InterruptedError:
                continue
            if count == 0:
                raise OSError(errno.EIO, "the device takes nothing")
            done += count


def start_writing(fd: int, offset: int, nbytes: int) -> None:
    """Tell the kernel to begin writing a range to the device; a wish: only `sync` tells that it is there.

    It waits for nothing but a place in the device's queue, and takes no error away from `sync`: the kernel marks one as
    reported only where it was waited for.
    """
    _sync_file_range(fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


def pwrite_some(fd: int, buffer: memoryview, offset: int) -> int:
    """One write, of as much as the kernel takes; for `direct`, which has its own answer to what is refused."""
    return os.pwrite(fd, buffer, offset)


def pread_some(fd: int, buffer: memoryview, offset: int) -> int:
    """One read, likewise."""
    return os.preadv(fd, [buffer], offset)


def open_direct(path: Path) -> int:
    """A second descriptor of an output, past the page cache; −1 where the file system has no such thing."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECT)
    except OSError:
        return -1


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
            remedy = "raise the limit on the size of files (ulimit -f)" if error.errno == errno.EFBIG else "free space"
            raise DiskSpaceError(
                f"{shown_path(path)}: {size_bytes} bytes cannot be reserved ({error.strerror}); "
                f"{remedy} or choose another OUT"
            ) from error
        raise OutputError(f"{shown_path(path)}: cannot be allocated ({error.strerror})") from error


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


def longest_file_bytes() -> float:
    """How long a file of this process may become (ulimit -f)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return math.inf if soft == resource.RLIM_INFINITY else soft


def truncate(fd: int, size_bytes: int, path: Path) -> None:
    """Cut a file to `size_bytes`.

    Raises:
        OutputError: it failed.
    """
    with writing(path, "cut"):
        os.ftruncate(fd, size_bytes)


def lock(fd: int, path: Path) -> bool:
    """Take the exclusive lock on a file; False if another process has it. It ends with the descriptor or the process.

    Raises:
        OutputError: the file system has no locks.
    """
    with writing(path, "locked"):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def sync(fd: int, path: Path) -> None:
    """Force a file's data and length to the device. Never call it again after it failed: write the data again.

    Raises:
        OutputError: the device reported an error; nothing since the last success is known to be on it.
    """
    with writing(path, "synced"):
        os.fsync(fd)


def sync_folder(folder: Path) -> None:
    """Force a folder's names to the device.

    Raises:
        OutputError: the device reported an error.
    """
    with writing(folder, "synced"):
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
    with writing(target, "given its name"):
        os.replace(source, target)  # noqa: PTH105 – this module is where os calls live


def unlink(path: Path) -> None:
    """Remove a file if it is there.

    Raises:
        OutputError: it is there and cannot be removed.
    """
    with writing(path, "removed"), contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108


def refuse_linked(fd: int, path: Path) -> None:
    """Refuse to change a file in place that has another name: what lies there would change with it.

    Raises:
        OutputError: it has.
    """
    with reading_output():
        links = status(fd, path).st_nlink
    if links > 1:
        raise OutputError(
            f"{shown_path(path)}: has {links} names (hard links), expected 1: to write it would change a file outside "
            "OUT: put a copy in its place, or name another OUT"
        )


def is_same_file(fd: int, path: Path) -> bool:
    """Whether a name still stands for what is open.

    Raises:
        OutputError: the file system does not say.
    """
    with writing(path, "looked up"):
        try:
            return os.path.samestat(os.fstat(fd), os.lstat(path))
        except FileNotFoundError:
            return False


def refuse_replaced(fd: int, path: Path) -> None:
    """Refuse to go on where a name does not stand for what is open any more: what is done by that name is another's.

    Raises:
        OutputError: it does not.
    """
    if not is_same_file(fd, path):
        raise OutputError(
            f"{shown_path(path)}: was moved or removed while the run was on, or another file put in its place: leave "
            "OUT alone until the run has ended, and run the same command again"
        )


def is_other_than_folder(path: Path) -> bool:
    """Whether a name is taken by something else than a folder, a link to one included.

    Raises:
        InputError: the name cannot be looked up; nothing was begun.
    """
    try:
        return not stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise InputError(
            f"{shown_path(path)}: cannot be looked up ({error.strerror or error}): name another OUT"
        ) from error


def make_folder(path: Path) -> bool:
    """Create a folder (parents too), its name on the device; True if it was not there.

    Raises:
        OutputError: it cannot be created or synced, or a file has its name.
    """
    with writing(path, "created"):
        new = [path, *path.parents][: [p.exists() for p in (path, *path.parents)].index(True)]
        try:
            os.makedirs(path)  # noqa: PTH103
        except FileExistsError:
            if not path.is_dir():
                raise
            return False
    # What is synced in a folder is lost with it if the folder's own name is not.
    for folder in reversed(new):
        sync_folder(folder.parent)
    return True


def remove_folder(path: Path, *, with_content: bool) -> None:
    """Remove a folder if it is there and, unless its content goes too, empty; what cannot be removed stays."""
    if with_content:
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.rmdir(path)  # noqa: PTH106


def free_bytes(folder: Path) -> int:
    """What an unprivileged process may still write to the file system of `folder`.

    Raises:
        OutputError: the file system does not say.
    """
    with writing(folder, "asked for its free space"):
        found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def chunks(size_bytes: int, step: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of consecutive pieces of at most `step` bytes."""
    for offset in range(0, size_bytes, step):
        yield offset, min(step, size_bytes - offset)
