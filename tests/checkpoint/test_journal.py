"""The journal survives a torn end, refuses damage before it, and counts nothing that did not reach the disk."""

from __future__ import annotations

import errno
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
    assert content.count(b"\n") == 3


def test_a_file_cut_at_any_byte_gives_the_records_before_the_cut(tmp_path: Path) -> None:
    """And what is appended afterwards follows them without a seam."""
    path = tmp_path / "journal"
    content = _written(path)
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = sum(end <= cut for end in ends)
        journal = Journal(path)
        assert journal.open() == RECORDS[:whole]
        journal.append(RECORDS[whole:])
        journal.close()
        assert path.read_bytes() == content


def test_a_last_line_torn_before_its_newline_was_overtaken_is_dropped(tmp_path: Path) -> None:
    """A page that never reached the disk reads as zeros, the newline behind it may have."""
    path = tmp_path / "journal"
    content = bytearray(_written(path))
    content[-8:-1] = bytes(7)
    path.write_bytes(content)
    assert _reopened(path) == RECORDS[:2]
    assert len(path.read_bytes()) < len(content)


def test_any_flipped_byte_before_the_last_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    content = _written(path)
    last = content[:-1].rindex(b"\n") + 1
    for place in range(last - 1):  # the newline before the last line gone, both look like one torn line
        damaged = bytearray(content)
        damaged[place] ^= 0x20
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"journal: line [12] of [234] is damaged.*--overwrite"):
            _reopened(path)
        assert path.read_bytes() == damaged, "a refused journal is left as it is"


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
