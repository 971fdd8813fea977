"""Reads and writes past the page cache, and what is told to it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamrepair.checkpoint import direct, osfile
from streamrepair.errors import OutputError
from tests.faults import Kernel, fails, none

PAGE = direct.PAGE_BYTES
LENGTH = 10 * PAGE


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, int]]:
    """A file of zeros with its two descriptors."""
    path = tmp_path_factory.mktemp("direct") / "out.partial"
    fd = osfile.open_output(path)
    osfile.allocate(fd, LENGTH + 5, path)
    direct_fd = osfile.open_direct(path)
    if direct_fd < 0:
        pytest.skip("this file system has no O_DIRECT")
    yield path, fd, direct_fd
    osfile.close(fd)
    osfile.close(direct_fd)


def _aligned(data: bytes, offset: int) -> memoryview:
    """`data` in memory that lies at pages as `offset` does in the file."""
    lead = offset % PAGE
    buffer = direct.page_aligned(lead + len(data))[lead:]
    buffer[:] = data
    return buffer


@settings(max_examples=60, deadline=None)
@given(data=st.data(), alike=st.booleans())
def test_any_range_arrives_whatever_its_edges(file: tuple[Path, int, int], data: st.DataObject, alike: bool) -> None:
    """Neighbours that share a page keep their bytes; it reads back the same both ways."""
    path, fd, direct_fd = file
    start = data.draw(st.integers(0, LENGTH))
    stop = data.draw(st.integers(start, LENGTH + 5))
    before = path.read_bytes()
    written = os.urandom(stop - start)
    buffer = _aligned(written, start if alike else start + 1)
    direct.pwrite_direct(fd, direct_fd, buffer, start, path)
    expected = before[:start] + written + before[stop:]
    assert path.read_bytes() == expected
    found = direct.pread_direct(direct_fd, direct.page_aligned(LENGTH + 3 * PAGE), start, stop - start)
    assert found is not None
    assert bytes(found) == written


def test_a_file_that_is_shorter_is_read_the_usual_way(file: tuple[Path, int, int]) -> None:
    """Whoever asked gets None and then meets the named error there."""
    assert direct.pread_direct(file[2], direct.page_aligned(4 * PAGE), LENGTH, PAGE) is None
    assert direct.pread_direct(-1, direct.page_aligned(4 * PAGE), 0, PAGE) is None


def test_a_device_that_wants_other_alignment_is_written_through_the_cache(
    file: tuple[Path, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fd, direct_fd = file
    kernel = Kernel(("pwrite",), fails(1, errno.EINVAL))
    monkeypatch.setattr(osfile, "os", kernel)
    content = os.urandom(3 * PAGE)
    direct.pwrite_direct(fd, direct_fd, _aligned(content, PAGE), PAGE, path)
    assert path.read_bytes()[PAGE : 4 * PAGE] == content


def test_a_device_that_fails_is_named(file: tuple[Path, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(osfile, "os", Kernel(("pwrite",), fails(1, errno.EIO)))
    with pytest.raises(OutputError, match=r"out\.partial: could not be written"):
        direct.pwrite_direct(file[1], file[2], _aligned(bytes(PAGE), 0), 0, file[0])


def _cached(path: Path, offset: int) -> bool:
    """Whether a page can be read without waiting for the device."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(fd, [bytearray(PAGE)], offset, os.RWF_NOWAIT) == PAGE
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def test_what_is_written_directly_is_not_left_in_the_page_cache(file: tuple[Path, int, int]) -> None:
    path, fd, direct_fd = file
    osfile.pwrite_all(fd, memoryview(bytes(LENGTH)), 0, path)
    osfile.sync(fd, path)
    assert _cached(path, 4 * PAGE)
    direct.pwrite_direct(fd, direct_fd, _aligned(bytes(8 * PAGE), PAGE), PAGE, path)
    assert not _cached(path, 4 * PAGE)


def test_letting_go_and_reading_ahead(tmp_path: Path) -> None:
    """What is let go costs the device again, what is asked for comes by itself."""
    path = tmp_path / "in"
    path.write_bytes(os.urandom(64 * PAGE))
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    assert _cached(path, 32 * PAGE)
    osfile.let_go(fd, 0, 64 * PAGE)
    if _cached(path, 32 * PAGE):
        pytest.skip("this file system lives in memory")
    osfile.read_ahead(fd, 0, 64 * PAGE)
    for _ in range(1000):
        if _cached(path, 32 * PAGE):
            break
        os.sched_yield()
    os.close(fd)
    assert _cached(path, 32 * PAGE)


def test_a_file_system_without_direct_access_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    path.write_bytes(bytes(2 * PAGE))
    monkeypatch.setattr(osfile, "os", Kernel(("open",), fails(1, errno.EINVAL)))
    direct_fd = osfile.open_direct(path)
    assert direct_fd == -1
    monkeypatch.setattr(osfile, "os", Kernel((), none))
    fd = osfile.open_output(path)
    direct.pwrite_direct(fd, direct_fd, _aligned(b"x" * PAGE, 0), 0, path)
    osfile.close(fd)
    assert path.read_bytes() == b"x" * PAGE + bytes(PAGE)
