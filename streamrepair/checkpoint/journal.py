"""The journal of finished tensors: one checked line each, appended after the tensor's bytes are on disk.

A line is the XXH3-64 of its JSON, a space, the JSON, a newline. A crash can tear only the end of the file, so a broken
last line is dropped (its tensor is done again); a broken line before the last is damage and is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import xxhash

from streamrepair.checkpoint import osfile
from streamrepair.errors import InputError, shown


class Journal:
    """An append-only file of records."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._end = 0

    def open(self) -> list[bytes]:
        """Open or create the file, cut a torn tail off, and return the records it holds.

        Raises:
            InputError: a line before the last is damaged.
            OutputError: the file cannot be opened or cut.
        """
        self._fd = osfile.open_output(self._path)
        content = bytearray(osfile.status(self._fd).st_size)
        osfile.pread_into(self._fd, memoryview(content), 0, self._path)
        records, self._end = _records(bytes(content), self._path)
        if self._end != len(content):
            osfile.truncate(self._fd, self._end, self._path)
        return records

    def append(self, records: Iterable[bytes]) -> None:
        """Add records and force them to the device.

        Raises:
            OutputError: they may not be on the device; nothing of them counts.
        """
        text = b"".join(xxhash.xxh3_64_hexdigest(record).encode() + b" " + record + b"\n" for record in records)
        osfile.pwrite_all(self._fd, memoryview(text), self._end, self._path)
        osfile.sync(self._fd, self._path)
        self._end += len(text)

    def close(self) -> None:
        """Release the descriptor."""
        if self._fd >= 0:
            osfile.close(self._fd)
            self._fd = -1


def _records(content: bytes, path: Path) -> tuple[list[bytes], int]:
    """The sound records and where the last of them ends."""
    lines = content.split(b"\n")
    records: list[bytes] = []
    end = 0
    for number, line in enumerate(lines[:-1], 1):
        digest, space, record = line.partition(b" ")
        if not space or xxhash.xxh3_64_hexdigest(record).encode() != digest:
            if number == len(lines) - 1 and not lines[-1]:
                break  # the last line, torn by a crash in such a way that its newline survived
            raise InputError(
                f"{shown(str(path))}: line {number} of {len(lines) - 1} is damaged; the disk lost finished work: "
                "run again with --overwrite to start anew"
            )
        records.append(record)
        end += len(line) + 1
    return records, end
