"""OUT while a run works on it: the lock, the fingerprint, the journal, the shards; what is resumed and what refused.

OUT/.streamrepair/lock        held by the live run (flock: it ends with the process, however that ends)
OUT/.streamrepair/run.json    the fingerprint
OUT/.streamrepair/journal     finished tensors
OUT/.streamrepair/partial/    shards that are not whole yet
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec

from streamrepair.checkpoint import osfile
from streamrepair.checkpoint.journal import Journal
from streamrepair.checkpoint.layout import Checkpoint
from streamrepair.checkpoint.write import ShardFile, ShardLayout
from streamrepair.errors import DiskSpaceError, InputError, LockedError, shown
from streamrepair.report import REPORT_NAME, Fingerprint, JournalEntry, TensorRecord
from streamrepair.units import format_bytes

STATE = ".streamrepair"
_DISK_RESERVE_BYTES = 64_000_000  # sidecars, index, journal, report


class Workspace:
    """OUT, held by this run from `open` to `close`."""

    def __init__(self, out: Path, layouts: tuple[ShardLayout, ...]) -> None:
        self.out = out
        self.state = out / STATE
        self.work = self.state / "partial"
        self.journal = Journal(self.state / "journal")
        self.shards = tuple(ShardFile(layout, out=out, work=self.work) for layout in layouts)
        self._made_out = False
        self._lock_fd = -1

    def open(self, fingerprint: Fingerprint, *, overwrite: bool) -> dict[str, TensorRecord]:
        """Take the lock, settle what an earlier run left, reserve the disk; returns the journalled records.

        Raises:
            LockedError: a live run holds OUT.
            InputError: OUT holds other things, or a run with other inputs or settings.
            DiskSpaceError: the disk is too small.
            OutputError: OUT cannot be written.
        """
        if not self.state.is_dir() and not overwrite:
            self._refuse_foreign()
        self._check_space(overwrite=overwrite)
        self._made_out = osfile.make_folder(self.out)
        osfile.make_folder(self.state)
        self._lock()
        if overwrite:
            self._clear()
        fresh = not (self.state / "run.json").exists()
        if fresh:
            osfile.unlink(self.state / "journal")
            osfile.write_atomic(self.state / "run.json", msgspec.json.format(msgspec.json.encode(fingerprint)))
        else:
            self._refuse_changed(fingerprint)
        osfile.make_folder(self.work)
        entries = [self._entry(line) for line in self.journal.open()]
        for shard in self.shards:
            shard.open()
        osfile.sync_folder(self.work)
        return {entry.name: entry.record for entry in entries}

    def finish(self) -> None:
        """Remove what only an unfinished run needs."""
        shutil.rmtree(self.work, ignore_errors=True)

    def discard(self) -> None:
        """Leave OUT as it was found: everything this run and its interrupted forerunners made is removed."""
        self.close_files()
        for shard in self.shards:
            osfile.unlink(shard.final)
        shutil.rmtree(self.state, ignore_errors=True)
        if self._made_out:
            with contextlib.suppress(OSError):
                self.out.rmdir()

    def close_files(self) -> None:
        """Close shards and journal; the lock stays."""
        for shard in self.shards:
            shard.close()
        self.journal.close()

    def close(self) -> None:
        """Close everything and let the lock go."""
        self.close_files()
        if self._lock_fd >= 0:
            osfile.close(self._lock_fd)
            self._lock_fd = -1

    def _refuse_foreign(self) -> None:
        if self.out.is_symlink() or (self.out.exists() and not self.out.is_dir()):
            raise InputError(f"OUT {shown(str(self.out))} is not a folder: name a new or an empty one")
        if self.out.is_dir() and any(self.out.iterdir()):
            raise InputError(
                f"OUT {shown(str(self.out))} is not empty and holds no unfinished run: "
                "name a new folder, or replace its checkpoint with --overwrite"
            )

    def _check_space(self, *, overwrite: bool) -> None:
        there = next(p for p in (self.out, *self.out.absolute().parents) if p.exists())
        kept = 0
        for shard in self.shards:
            for path in (shard.final, shard.partial):
                with contextlib.suppress(OSError):
                    kept += path.stat().st_blocks * 512
        if overwrite:  # shards of other names go too
            kept = sum(p.stat().st_blocks * 512 for p in self.out.glob("*.safetensors")) if self.out.is_dir() else 0
        needed = sum(shard.layout.file_bytes for shard in self.shards) - kept + _DISK_RESERVE_BYTES
        free = shutil.disk_usage(there).free
        if needed > free:
            raise DiskSpaceError(
                f"OUT {shown(str(self.out))}: the result needs {format_bytes(needed)}, {format_bytes(free)} are free: "
                "free space or choose another OUT"
            )

    def _lock(self) -> None:
        self._lock_fd = osfile.open_output(self.state / "lock")
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with contextlib.suppress(OSError, ValueError):
                holder = os.pread(self._lock_fd, 100, 0).decode("ascii", "replace").strip()
                osfile.close(self._lock_fd)
                self._lock_fd = -1
                raise LockedError(
                    f"OUT {shown(str(self.out))} is held by another run ({shown(holder)}): wait for it or stop it"
                ) from error
            raise
        os.ftruncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, f"pid {os.getpid()} on {os.uname().nodename}\n".encode(), 0)

    def _clear(self) -> None:
        """Remove an earlier result and its state; other files of OUT stay."""
        # The report goes first: without it no half-cleared OUT passes for a finished one.
        osfile.unlink(self.out / REPORT_NAME)
        for path in [*self.out.glob("*.safetensors.index.json"), *self.out.glob("*.safetensors")]:
            osfile.unlink(path)
        for name in ("run.json", "journal"):
            osfile.unlink(self.state / name)
        shutil.rmtree(self.work, ignore_errors=True)

    def _refuse_changed(self, fingerprint: Fingerprint) -> None:
        path = self.state / "run.json"
        try:
            before = msgspec.json.decode(path.read_bytes(), type=Fingerprint)
        except (OSError, msgspec.MsgspecError) as error:
            raise InputError(f"{shown(str(path))}: unreadable ({error}): start anew with --overwrite") from error
        if changes := fingerprint.differences(before):
            raise InputError(
                f"OUT {shown(str(self.out))} holds a run that differs from this one: {'; '.join(changes)}: "
                "repeat the earlier command, name another OUT, or start anew with --overwrite"
            )

    def _entry(self, line: bytes) -> JournalEntry:
        try:
            return msgspec.json.decode(line, type=JournalEntry)
        except msgspec.MsgspecError as error:
            raise InputError(
                f"{shown(str(self.state / 'journal'))}: a record is not understood ({error}): "
                "start anew with --overwrite"
            ) from error


def refuse_overlap(out: Path, inputs: Mapping[str, Checkpoint]) -> None:
    """Refuse an OUT that is, lies in, contains, or shares files with an input.

    Raises:
        InputError: it does.
    """
    target = out.resolve()
    for side, checkpoint in inputs.items():
        folder = checkpoint.folder.resolve()
        real = {shard.path.resolve().parent for shard in checkpoint.shards} | {folder}
        if target in real or any(parent in real for parent in target.parents) or folder.is_relative_to(target):
            raise InputError(
                f"OUT {shown(str(out))} is, lies in, or contains {side} {shown(checkpoint.given)}: name another folder"
            )
        inodes = {(shard.device, shard.inode) for shard in checkpoint.shards}
        for path in out.glob("*.safetensors") if out.is_dir() else ():
            found = path.stat()
            if (found.st_dev, found.st_ino) in inodes:
                raise InputError(f"{shown(str(path))} is the same file as a shard of {side}: name another OUT")
