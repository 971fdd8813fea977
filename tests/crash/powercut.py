"""A disk with a cache that a power cut empties: what was not synced may be gone, in any part and any order.

A run's operations are recorded together with their data. A power cut after the Nth of them leaves of every file what
its last fsync forced out, and any part of what came after, torn into sectors; of every folder the names that its last
fsync forced out, and any part of the changes after it. That is all POSIX promises, less than ext4, XFS or btrfs give.
A rename is atomic (assumed in docs/durability.md) and lasts once the folder of its new name is synced.

The image is written out as a folder, and the same command is run on it.
"""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from streamrepair.checkpoint import osfile
from tests.crash.judge import Undisturbed, judge_fault, judge_resumed

SECTOR_BYTES = 512
MODES = ("all lost", "names kept, data lost", "data kept, names lost", "data only", "any part", "any part again")
"""What becomes of what was not synced. "data only": as "data kept", and the lengths are lost."""


@dataclass(eq=False)
class File:
    """An inode: its synced bytes, and what was done to it since."""

    synced: bytes = b""
    pending: list[tuple[str, int, bytes]] = field(default_factory=list)
    """("write", offset, data), ("length", bytes, b"")."""


@dataclass(eq=False)
class Folder:
    """A folder: its synced names, and what was done to them since."""

    synced: dict[str, File | Folder] = field(default_factory=dict)
    now: dict[str, File | Folder] = field(default_factory=dict)
    pending: list[tuple[str, File | Folder | None]] = field(default_factory=list)
    """Name → what it stands for from then on; None for nothing."""

    def point(self, name: str, to: File | Folder | None) -> None:
        """Change a name, for now in the cache only."""
        if to is None:
            self.now.pop(name, None)
        else:
            self.now[name] = to
        self.pending.append((name, to))


Operation = Callable[["State"], None]


class State:
    """The disk as a run's operations leave it."""

    def __init__(self, top: Path, found: Folder | None = None) -> None:
        self.top = top
        self.root = found or Folder()

    def at(self, path: Path) -> File | Folder | None:
        """What a path stands for."""
        here: File | Folder | None = self.root
        for part in path.relative_to(self.top).parts:
            here = here.now.get(part) if isinstance(here, Folder) else None
        return here

    def parent(self, path: Path) -> Folder:
        """The folder that has a path's name."""
        found = self.at(path.parent)
        assert isinstance(found, Folder), path
        return found

    def file(self, path: Path) -> File:
        """The file of a name, made if there is none."""
        found = self.at(path)
        if found is None:
            found = File()
            self.parent(path).point(path.name, found)
        assert isinstance(found, File), path
        return found

    def make_folders(self, path: Path) -> None:
        """As makedirs."""
        if self.at(path) is None:
            self.make_folders(path.parent)
            self.parent(path).point(path.name, Folder())

    def rename(self, source: Path, target: Path) -> None:
        """Both changes wait in their folders; `sync` keeps them together."""
        moved = self.at(source)
        assert isinstance(moved, File)
        self.parent(target).point(target.name, moved)
        self.parent(source).point(source.name, None)

    def sync(self, path: Path) -> None:
        """All of a file's bytes, or of a folder's names."""
        found = self.at(path)
        if isinstance(found, File):
            found.synced, found.pending = _content(found, found.pending), []
            return
        assert isinstance(found, Folder)
        new = {id(to) for _, to in found.pending if to is not None}
        found.synced, found.pending = dict(found.now), []
        self._settle_renames(self.root, new)

    def _settle_renames(self, folder: Folder, new: set[int]) -> None:
        """Names under which a file that got another was known before go with the sync of the other's folder."""
        for name, there in list(folder.synced.items()):
            if isinstance(there, Folder):
                self._settle_renames(there, new)
            elif id(there) in new and folder.now.get(name) is not there:
                del folder.synced[name]
                folder.pending = [(n, to) for n, to in folder.pending if n != name or to is not None]


@dataclass
class Recording:
    """A run's operations on a folder, to be carried out on a `State` as far as wanted."""

    top: Path
    operations: list[Operation] = field(default_factory=list)

    def after(self, count: int) -> State:
        """The disk after so many operations."""
        state = State(self.top)
        for operation in self.operations[:count]:
            operation(state)
        return state


class Recorder:
    """The `os` module of a run whose operations below a folder are recorded."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._paths: dict[int, Path] = {}
        self._one = threading.Lock()

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def _note(self, operation: Operation) -> None:
        self._recording.operations.append(operation)

    def _known(self, path: Path) -> bool:
        return path.is_relative_to(self._recording.top)

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        with self._one:
            fd = os.open(path, flags, mode)
            if self._known(path):
                self._paths[fd] = path
                if flags & os.O_CREAT:
                    self._note(lambda state: _ignore(state.file(path)))
            return fd

    def close(self, fd: int) -> None:
        with self._one:
            self._paths.pop(fd, None)
            os.close(fd)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        with self._one:
            done = os.pwrite(fd, data, offset)
            path, content = self._paths[fd], bytes(data[:done])
            self._note(lambda state: state.file(path).pending.append(("write", offset, content)))
            return done

    def ftruncate(self, fd: int, length: int) -> None:
        with self._one:
            os.ftruncate(fd, length)
            path = self._paths[fd]
            self._note(lambda state: state.file(path).pending.append(("length", length, b"")))

    def posix_fallocate(self, fd: int, offset: int, length: int) -> None:
        os.posix_fallocate(fd, offset, length)  # ftruncate to the same length follows it

    def fsync(self, fd: int) -> None:
        with self._one:
            os.fsync(fd)
            path = self._paths[fd]
            self._note(lambda state: state.sync(path))

    def replace(self, source: Path, target: Path) -> None:
        with self._one:
            os.replace(source, target)  # noqa: PTH105 – this is os
            self._paths = {fd: target if path == source else path for fd, path in self._paths.items()}
            self._note(lambda state: state.rename(source, target))

    def unlink(self, path: Path) -> None:
        with self._one:
            os.unlink(path)  # noqa: PTH108
            self._note(lambda state: state.parent(path).point(path.name, None))

    def makedirs(self, path: Path) -> None:
        with self._one:
            os.makedirs(path)  # noqa: PTH103
            self._note(lambda state: state.make_folders(path))

    def rmtree(self, path: Path, *, ignore_errors: bool) -> None:
        with self._one:
            shutil.rmtree(path, ignore_errors=ignore_errors)
            self._note(lambda state: state.parent(path).point(path.name, None))


def recorded(reference: Undisturbed, top: Path) -> Recording:
    """The operations of an undisturbed run that writes `top`/out."""
    top.mkdir()
    recording = Recording(top)
    recorder = Recorder(recording)
    osfile.os = osfile.shutil = recorder  # type: ignore[assignment]
    try:
        reference.repair(top / "out")
    finally:
        osfile.os, osfile.shutil = os, shutil
    return recording


def one_cut(reference: Undisturbed, disk: Recording, at: int, out: Path, *, mode: str, rng: random.Random) -> int:
    """A power cut after `at` operations, and the same command after it; how many tensors it found finished.

    What the journal was synced to hold before the cut must be found again, whatever the cut took.
    """
    state = disk.after(at)
    out.mkdir()
    _write_out(state.root, out, mode, rng)
    found = out / "out"
    finished = judge_fault(reference, found) if found.exists() else {}
    promised = _promised(state)
    assert promised <= len(finished), f"{promised} tensors were promised, {len(finished)} are there"
    report = reference.repair(found)
    judge_resumed(reference, found, finished, report)
    return len(finished)


def _promised(state: State) -> int:
    """Lines of the journal that were synced."""
    journal = state.at(state.top / "out" / ".streamrepair" / "journal")
    return journal.synced.count(b'"record"') if isinstance(journal, File) else 0


def _write_out(folder: Folder, path: Path, mode: str, rng: random.Random) -> None:
    """What a power cut leaves of a folder."""
    names = dict(folder.synced)
    for name, to in folder.pending:
        kept = rng.random() < 0.5 if mode.startswith("any part") else mode == "names kept, data lost"
        if kept and to is not None:
            names[name] = to
        elif kept:
            names.pop(name, None)
    for name, there in names.items():
        if isinstance(there, Folder):
            (path / name).mkdir()
            _write_out(there, path / name, mode, rng)
        else:
            (path / name).write_bytes(_content(there, _survivors(there, mode, rng)))


def _survivors(file: File, mode: str, rng: random.Random) -> list[tuple[str, int, bytes]]:
    """What a power cut leaves of a file's operations since its last sync, torn into sectors."""
    if mode in ("all lost", "names kept, data lost"):
        return []
    if mode == "data kept, names lost":
        return file.pending
    if mode == "data only":
        return [operation for operation in file.pending if operation[0] == "write"]
    pieces: list[tuple[str, int, bytes]] = []
    for kind, offset, data in file.pending:
        if kind != "write":
            pieces.append((kind, offset, data))
        for start in range(0, len(data), SECTOR_BYTES):
            pieces.append((kind, offset + start, data[start : start + SECTOR_BYTES]))
    return [piece for piece in pieces if rng.random() < 0.5]


def _content(file: File, operations: list[tuple[str, int, bytes]]) -> bytes:
    content = bytearray(file.synced)
    for kind, offset, data in operations:
        length = offset if kind == "length" else max(len(content), offset + len(data))
        content.extend(bytes(max(0, length - len(content))))
        if kind == "length":
            del content[length:]
        else:
            content[offset : offset + len(data)] = data
    return bytes(content)


def _ignore(_: object) -> None:
    return None
