"""The journal of finished tensors: one checked line each, appended in groups after the tensors' bytes are on disk.

A line is the XXH3-64 of its text, a space, the text, a newline. Texts are records (JSON objects) and marks: when a
group has been synced, a line that says so, with the length that was synced, is written after it. A mark is not synced
itself; that it is there shows that what it vouches for was.

A power cut can tear the last group in any way, before its sync was through: from its first broken line on it is dropped
(those tensors are done again). A broken line that a later mark vouches for is damage and is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import xxhash

from streamrepair.checkpoint import osfile, refusals
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
            InputError: a line that was synced is damaged.
            OutputError: the file cannot be opened, read or cut.
        """
        self._fd = osfile.open_output(self._path)
        osfile.refuse_linked(self._fd, self._path)
        with refusals.reading_output():
            content = bytearray(osfile.status(self._fd, self._path).st_size)
            osfile.pread_into(self._fd, memoryview(content), 0, self._path)
        records, self._end = _records(bytes(content), self._path)
        if self._end != len(content):
            osfile.truncate(self._fd, self._end, self._path)
        return records

    def append(self, records: Iterable[bytes]) -> None:
        """Add records and force them to the device.

        Raises:
            OutputError: they may not be on the device; nothing of them counts in this run.
        """
        text = b"".join(_line(record) for record in records)
        osfile.pwrite_all(self._fd, memoryview(text), self._end, self._path)
        osfile.sync(self._fd, self._path)
        self._end += len(text)
        mark = _line(str(self._end).encode())
        osfile.pwrite_all(self._fd, memoryview(mark), self._end, self._path)
        self._end += len(mark)

    def close(self) -> None:
        """Release the descriptor."""
        if self._fd >= 0:
            osfile.close(self._fd)
            self._fd = -1


def records_in(content: bytes) -> list[bytes]:
    """The sound records of a journal that is only looked at."""
    return [text for text in _sound(content.split(b"\n")[:-1]) if text is not None and not text.isdigit()]


def _line(text: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"


def _sound(lines: list[bytes]) -> list[bytes | None]:
    """The text of each line, or None where it is broken."""
    return [text if _line(text) == line + b"\n" else None for line in lines for text in [line.partition(b" ")[2]]]


def _records(content: bytes, path: Path) -> tuple[list[bytes], int]:
    """The sound records, and where what is kept ends."""
    lines = content.split(b"\n")[:-1]
    texts = _sound(lines)
    broken = texts.index(None) if None in texts else len(texts)
    end = sum(len(line) + 1 for line in lines[:broken])
    synced = max((int(text) for text in texts if text is not None and text.isdigit()), default=0)
    if end < synced:
        raise InputError(
            f"{shown(str(path))}: line {broken + 1} of {len(lines)} is damaged; the disk lost finished work: "
            "run again with --overwrite to start anew"
        )
    return [text for text in texts[:broken] if text is not None and not text.isdigit()], end
