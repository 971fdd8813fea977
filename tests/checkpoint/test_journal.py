"""The journal survives a torn end, refuses damage before it, and counts nothing that did not reach the disk."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path

import pytest

from streamrepair.checkpoint import osfile
from streamrepair.checkpoint.journal import Journal
from streamrepair.errors import InputError, OutputError
from tests.faults import Kernel, fails

RECORDS = [b'{"name": "a"}', b'{"name": "b", "text": "\xc3\xa4"}', b'{"name": "c"}']


def _written(path: Path) -> bytes:
    journal = Journal(path)
    assert journal.open() == []
    journal.append(RECORDS[:2])
    journal.append(RECORDS[2:])
    journal.close()
    return path.read_bytes()


def _reopened(path: Path) -> list[bytes]:
    journal = Journal(path)
    try:
        return journal.open()
    finally:
        journal.close()


def test_records_come_back_in_order_and_one_line_each(tmp_path: Path) -> None:
    content = _written(tmp_path / "journal")
    assert _reopened(tmp_path / "journal") == RECORDS
    assert content.count(b"\n") == 5, "three records, two marks"


def test_a_file_cut_at_any_byte_gives_the_records_before_the_cut(tmp_path: Path) -> None:
    """And what is appended afterwards follows them without a seam."""
    path = tmp_path / "journal"
    content = _written(path)
    ends = [content.index(record) + len(record) + 1 for record in RECORDS]
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = sum(end <= cut for end in ends)
        journal = Journal(path)
        assert journal.open() == RECORDS[:whole]
        journal.append(RECORDS[whole:])
        journal.close()
        assert _reopened(path) == RECORDS


def test_the_last_group_may_be_torn_in_any_way(tmp_path: Path) -> None:
    """Any of its sectors may have reached the disk before it was synced, and any not: zeros are read there."""
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.open()
    journal.append(RECORDS[:1])
    first = path.read_bytes()
    journal.append(RECORDS * 3)
    journal.close()
    group = path.read_bytes()[len(first) :]
    group = group[: group.rstrip(b"\n").rindex(b"\n") + 1]  # without its mark, which is written after the sync
    sectors = range(0, len(group), 40)
    for lost in itertools.product([False, True], repeat=len(sectors)):
        torn = b"".join(
            bytes(len(group[at : at + 40])) if gone else group[at : at + 40]
            for at, gone in zip(sectors, lost, strict=True)
        )
        path.write_bytes(first + torn)
        records = _reopened(path)
        assert records == [RECORDS[0], *RECORDS * 3][: len(records)]
        assert len(records) >= 1
        assert records == _reopened(path), "the torn tail was cut off"
        assert any(lost) or len(records) == 10


def test_any_flipped_byte_of_what_was_synced_is_refused(tmp_path: Path) -> None:
    """In any group, the last one too; a flipped mark costs nothing but its voucher."""
    path = tmp_path / "journal"
    content = _written(path)
    last = content[:-1].rindex(b"\n") + 1
    for place in range(last - 1):  # without the newline before it the last mark is part of a broken line
        damaged = bytearray(content)
        damaged[place] ^= 0x20
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"journal: line [1-4] of [456] is damaged.*--overwrite"):
            _reopened(path)
        assert path.read_bytes() == damaged, "a refused journal is left as it is"
    for place in range(last, len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 0x20
        path.write_bytes(damaged)
        assert _reopened(path) == RECORDS


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_records_that_could_not_be_forced_to_disk_are_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.open()
    journal.append(RECORDS[:1])
    monkeypatch.setattr(osfile, "os", Kernel((call,), fails(1, errno.EIO)))
    with pytest.raises(OutputError, match="journal"):
        journal.append(RECORDS[1:2])
    journal.append(RECORDS[2:])
    journal.close()
    assert _reopened(path) == [RECORDS[0], RECORDS[2]]
