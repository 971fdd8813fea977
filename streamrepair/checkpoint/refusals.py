"""What the system refuses, said with the file's name and what to do: the errors of everything that touches files."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from streamrepair.errors import InputError, OutputError, StreamRepairError, shown

TOO_MANY = (errno.EMFILE, errno.ENFILE)
OPEN_FILES = "raise the limit on open files (ulimit -n)"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space"),
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) or name another OUT",
    **dict.fromkeys(TOO_MANY, OPEN_FILES),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it writable"),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ENOTDIR), "name another OUT"),
    # A link or a folder in place of a file of OUT.
    **dict.fromkeys((errno.ELOOP, errno.EISDIR), "remove what is there"),
}


def shown_path(path: Path) -> str:
    """A path safe to print whole: every part of it escaped by itself, so that the file's name is never cut off."""
    return str(Path(*map(shown, path.parts)))


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What fails inside is said of the file that is read.

    Raises:
        InputError: for a system's error, or an InputError that names no file, inside.
        StreamRepairError: where the process may open no more files, which is no fault of this one.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{shown_path(path)}: {error.finding}", error.advice) from error
    except OSError as error:
        what = f"{shown_path(path)}: cannot be read ({error.strerror})"
        if error.errno in TOO_MANY:
            raise StreamRepairError(f"{what}: {OPEN_FILES} and run the same command again") from error
        raise InputError(what, "check the path and mode") from error


@contextlib.contextmanager
def writing(path: Path, verb: str) -> Iterator[None]:
    """What fails inside is said of the file that could not be "written", "synced", or whatever the verb is.

    Raises:
        OutputError: for a system's error inside.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        remedy = _REMEDIES.get(error.errno or 0, "mend the disk")
        raise OutputError(
            f"{shown_path(path)}: could not be {verb} ({error.strerror or error})",
            f"finished work is kept: {remedy} and run the same command again",
        ) from error


@contextlib.contextmanager
def reading_output() -> Iterator[None]:
    """What cannot be read back inside is a fault of OUT, not of an input.

    Raises:
        OutputError: for an InputError inside.
    """
    try:
        yield
    except InputError as error:
        raise OutputError(error.finding, error.advice) from error
