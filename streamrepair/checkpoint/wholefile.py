"""Files that fit memory: read whole, replaced whole."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from streamrepair.checkpoint import osfile
from streamrepair.errors import InputError, OutputError

_PARTIAL = ".partial"
_LONGEST_NAME_BYTES = 255


def read_whole(path: Path, most_bytes: int | None = None) -> bytes:
    """All of a file that fits memory.

    Raises:
        InputError: it cannot be read, or is longer than `most_bytes`.
    """
    with osfile.opened_input(path) as (fd, status):
        _refuse_longer(status, most_bytes)
        return osfile.read_exactly(fd, status.st_size, 0)


def check_readable(path: Path, most_bytes: int) -> int:
    """Open a file and look at its length, as `read_whole` would; its bytes.

    Raises:
        InputError: it cannot be opened, or is longer than `most_bytes`.
    """
    with osfile.opened_input(path) as (_, status):
        _refuse_longer(status, most_bytes)
        return status.st_size


def _refuse_longer(status: os.stat_result, most_bytes: int | None) -> None:
    if most_bytes is not None and status.st_size > most_bytes:
        raise InputError(f"is {status.st_size} bytes long, expected at most {most_bytes}", "move it elsewhere")


def write_atomic(path: Path, data: bytes, *, among_others: bool = False) -> None:
    """Replace `path` by `data`: whole after a crash, either the old bytes or the new.

    Args:
        among_others: whether files beside it are none of ours, whatever their names.

    Raises:
        OutputError: it failed; the old file is untouched, and nothing is left beside it.
    """
    partial = _partial(path, f".{os.getpid()}{_PARTIAL}" if among_others else _PARTIAL)
    osfile.unlink(partial)
    fd = osfile.open_output(partial)
    try:
        try:
            osfile.pwrite_all(fd, memoryview(data), 0, partial)
            osfile.sync(fd, partial)
        finally:
            osfile.close(fd)
        osfile.rename(partial, path)
    except OutputError:
        with contextlib.suppress(OutputError):
            osfile.unlink(partial)
        raise
    osfile.sync_folder(path.parent)


def _partial(path: Path, suffix: str) -> Path:
    """Where a file grows: beside it, by a name that is cut where it would be longer than names may be."""
    name, room = os.fsencode(path.name), _LONGEST_NAME_BYTES - len(suffix)
    return path.with_name((path.name if len(name) <= room else name[:room].decode(errors="ignore")) + suffix)
