"""File operations are whole or failed, whatever the kernel does by halves, and every failure names the file."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from streamrepair.checkpoint import osfile, wholefile
from streamrepair.errors import DiskSpaceError, InputError, OutputError
from tests.faults import WRITING, Kernel, fails, none


class Grudging:
    """An `os` that moves at most three bytes a call, and is interrupted every other time."""

    def __init__(self) -> None:
        self._calls = 0

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def _interrupted(self) -> None:
        self._calls += 1
        if self._calls % 2:
            raise InterruptedError(errno.EINTR, "Interrupted system call")

    def pread(self, fd: int, count: int, offset: int) -> bytes:
        self._interrupted()
        return os.pread(fd, min(count, 3), offset)

    def preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        self._interrupted()
        return os.preadv(fd, [buffers[0][:3]], offset)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        self._interrupted()
        return os.pwrite(fd, data[:3], offset)

    def posix_fallocate(self, fd: int, offset: int, length: int) -> None:
        self._interrupted()
        os.posix_fallocate(fd, offset, length)


def test_short_and_interrupted_reads_and_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(osfile, "os", Grudging())
    content = bytes(range(100))
    path = tmp_path / "f"
    fd = osfile.open_output(path)
    osfile.allocate(fd, 105, path)
    osfile.pwrite_all(fd, memoryview(content), 5, path)
    assert path.read_bytes() == bytes(5) + content
    found = bytearray(100)
    osfile.pread_into(fd, memoryview(found), 5, path)
    assert found == content
    assert osfile.read_exactly(fd, 100, 5) == content
    assert wholefile.read_whole(path) == bytes(5) + content
    osfile.close(fd)


OPERATIONS: dict[str, Callable[[int, Path], object]] = {
    "pwrite": lambda fd, path: osfile.pwrite_all(fd, memoryview(b"x"), 0, path),
    "fsync": osfile.sync,
    "replace": lambda _, path: osfile.rename(path, path),
    "ftruncate": lambda fd, path: osfile.truncate(fd, 0, path),
    "makedirs": lambda _, path: osfile.make_folder(path / "below"),
    "unlink": lambda _, path: osfile.unlink(path),
}


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", OPERATIONS)
def test_a_refused_write_names_the_file_and_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: int
) -> None:
    path = tmp_path / "some-name"
    fd = osfile.open_output(path)
    monkeypatch.setattr(osfile, "os", Kernel((call,), fails(1, error)))
    with pytest.raises(OutputError, match=f"some-name.*{os.strerror(error)}"):
        OPERATIONS[call](fd, path)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errno.ENOSPC, DiskSpaceError),
        (errno.EDQUOT, DiskSpaceError),
        (errno.EFBIG, DiskSpaceError),
        (errno.EIO, OutputError),
    ],
)
def test_space_that_cannot_be_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, kind: type[Exception]
) -> None:
    fd = osfile.open_output(tmp_path / "f")
    monkeypatch.setattr(osfile, "os", Kernel(("posix_fallocate",), fails(1, error)))
    with pytest.raises(kind, match=f"{tmp_path / 'f'}.*{os.strerror(error)}"):
        osfile.allocate(fd, 10, tmp_path / "f")


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_file_systems_without_reservation_get_the_length_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    fd = osfile.open_output(tmp_path / "f")
    monkeypatch.setattr(osfile, "os", Kernel(("posix_fallocate",), fails(1, error)))
    osfile.allocate(fd, 10, tmp_path / "f")
    assert (tmp_path / "f").stat().st_size == 10


def test_allocation_reserves_blocks_and_shortens_a_longer_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old" * 1_000_000)
    fd = osfile.open_output(path)
    osfile.allocate(fd, 1_000_000, path)
    assert (path.stat().st_size, path.read_bytes()[:3]) == (1_000_000, b"old")
    fresh = osfile.open_output(tmp_path / "g")
    osfile.allocate(fresh, 1_000_000, tmp_path / "g")
    assert (tmp_path / "g").stat().st_blocks * 512 >= 1_000_000


def test_a_read_past_the_end_says_where_the_file_ends(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(10))
    fd = osfile.open_input(path)
    with pytest.raises(InputError, match=r"f: ends at byte 10 .*truncated"):
        osfile.pread_into(fd, memoryview(bytearray(20)), 0, path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda _: None])
def test_only_regular_files_are_inputs(tmp_path: Path, make: object) -> None:
    assert callable(make)
    make(tmp_path / "x.json")
    with pytest.raises(InputError, match=r"x\.json: "):
        osfile.open_input(tmp_path / "x.json")


def test_no_descriptor_is_left_by_refused_inputs(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        with pytest.raises(InputError):
            osfile.open_input(tmp_path)
        with pytest.raises(InputError), osfile.opened_input(tmp_path):
            pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_outputs_have_the_mode_the_umask_allows_and_follow_no_link(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        wholefile.write_atomic(tmp_path / "f", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640
    (tmp_path / "link").symlink_to(tmp_path / "f")
    with pytest.raises(OutputError, match="link: could not be opened"):
        osfile.open_output(tmp_path / "link")


def test_a_whole_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(11))
    assert wholefile.read_whole(tmp_path / "f", 11) == bytes(11)
    with pytest.raises(InputError, match="f: is 11 bytes long, expected at most 10"):
        wholefile.read_whole(tmp_path / "f", 10)


def test_an_atomic_write_that_fails_anywhere_leaves_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every operation on the disk in turn; and a later write is not hindered by what a failed one left."""
    path = tmp_path / "f"
    kernel = Kernel(WRITING, none)
    monkeypatch.setattr(osfile, "os", kernel)
    wholefile.write_atomic(path, b"old")
    assert kernel.calls == ["unlink", "pwrite", "fsync", "replace", "fsync"]
    for number in range(1, len(kernel.calls) + 1):
        path.write_bytes(b"old")
        monkeypatch.setattr(osfile, "os", Kernel(WRITING, fails(number, errno.EIO)))
        with pytest.raises(OutputError):
            wholefile.write_atomic(path, b"new")
        assert path.read_bytes() == (b"new" if number == 5 else b"old")
    monkeypatch.setattr(osfile, "os", os)
    wholefile.write_atomic(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_lock_is_exclusive_and_ends_with_its_descriptor(tmp_path: Path) -> None:
    first, second = (osfile.open_output(tmp_path / "lock") for _ in range(2))
    assert osfile.lock(first, tmp_path / "lock")
    assert not osfile.lock(second, tmp_path / "lock")
    osfile.close(first)
    assert osfile.lock(second, tmp_path / "lock")


def test_chunks_cover_a_range_once() -> None:
    assert list(osfile.chunks(10, 4)) == [(0, 4), (4, 4), (8, 2)]
    assert list(osfile.chunks(8, 4)) == [(0, 4), (4, 4)]
    assert list(osfile.chunks(0, 4)) == []


def test_a_wish_to_begin_writing_changes_nothing_and_never_fails(tmp_path: Path) -> None:
    path = tmp_path / "out"
    fd = osfile.open_output(path)
    osfile.pwrite_all(fd, memoryview(b"x" * 10_000), 0, path)
    osfile.start_writing(fd, 5, 9_000)
    osfile.start_writing(fd, 1 << 40, 1)
    osfile.sync(fd, path)
    osfile.close(fd)
    osfile.start_writing(-1, 0, 1)
    assert path.read_bytes() == b"x" * 10_000
