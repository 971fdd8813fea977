"""OUT while a run works on it: the lock, the fingerprint, the journal, the shards; what is resumed and what refused.

OUT/.streamrepair/lock        held by the live run (flock: it ends with the process, however that ends)
OUT/.streamrepair/run.json    the fingerprint
OUT/.streamrepair/journal     finished tensors
OUT/.streamrepair/sessions    what every start of the command took
OUT/.streamrepair/sidecars    what is copied beside the weights, before any of it is
OUT/.streamrepair/partial/    shards that are not whole yet
OUT/.streamrepair/made        an empty file: the run made OUT itself, so a refusal removes it again
"""

from __future__ import annotations

import contextlib
import filecmp
import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path, PurePath

import msgspec

from streamrepair.checkpoint import osfile, wholefile
from streamrepair.checkpoint.journal import Journal, records_in
from streamrepair.checkpoint.write import PARTIAL_SUFFIX, ShardFile, ShardLayout
from streamrepair.engine.accounts import Accounts
from streamrepair.errors import DiskSpaceError, InputError, LockedError, shown
from streamrepair.report import (
    REPORT_NAME,
    STATE,
    Fingerprint,
    JournalEntry,
    Report,
    TensorRecord,
    decoded,
    restored,
    storable,
)
from streamrepair.units import format_apart

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_SLACK_BYTES = 4_000_000  # folders, the last block of every file


class _Index(msgspec.Struct):
    """What is read of an index in OUT."""

    weight_map: dict[str, str]


class Workspace:
    """OUT, held by this run from `open` to `close`.

    Args:
        beside_bytes: what will lie beside the shards: sidecars, index, journal, report.
        direct: whether copies may go past the page cache.
    """

    def __init__(
        self, out: Path, layouts: tuple[ShardLayout, ...], *, beside_bytes: int = 0, direct: bool = True
    ) -> None:
        self.out = out
        self.state = out / STATE
        self.work = self.state / "partial"
        self.journal = Journal(self.state / "journal")
        self.accounts = Accounts(self.state / "sessions")
        self.shards = tuple(ShardFile(layout, out=out, work=self.work, direct=direct) for layout in layouts)
        self.damaged: tuple[Path, ...] = ()
        """Sealed shards whose length or header `open` found wrong."""
        self.elsewhere: list[tuple[str, str]] = []
        """Where the run that is continued began to compute, and where this one does, if that is not the same."""
        self._beside_bytes = beside_bytes
        self._lock_fd = -1

    def open(
        self, fingerprint: Fingerprint, *, overwrite: bool, finished: Mapping[str, TensorRecord] | None = None
    ) -> dict[str, TensorRecord]:
        """Take the lock, settle what an earlier run left, reserve the disk; returns the journalled records.

        Args:
            finished: records that the report of a finished result has; a journal that is damaged or lacks some gets
                them again.

        Raises:
            LockedError: a live run holds OUT.
            InputError: OUT holds other things, or a run with other inputs or settings.
            DiskSpaceError: the disk is too small.
            OutputError: OUT cannot be written.
        """
        self._refuse_foreign(overwrite=overwrite)
        self._check_space(overwrite=overwrite)
        made_out = osfile.make_folder(self.out)
        self._lock()
        if made_out:
            osfile.close(osfile.open_output(self.state / "made"))
        entries = self._begin(fingerprint) if overwrite else self._continue(fingerprint, finished)
        self._refuse_unaccounted({entry.name for entry in entries})
        osfile.make_folder(self.work)
        self.accounts.open()
        self.damaged = tuple(shard.final for shard in self.shards if not shard.open())
        for folder in (self.work, self.state):  # names of partial shards; of the journal
            osfile.sync_folder(folder)
        return {entry.name: entry.record for entry in entries}

    def _continue(
        self, fingerprint: Fingerprint, finished: Mapping[str, TensorRecord] | None = None
    ) -> list[JournalEntry]:
        """The journal of the run that OUT holds, which must be of this fingerprint; or of a new one."""
        if (self.state / "run.json").exists():
            self._refuse_changed(fingerprint)
        else:
            self._refuse_unaccounted(frozenset())
            for name in ("journal", "sessions"):
                osfile.unlink(self.state / name)
            wholefile.write_atomic(self.state / "run.json", msgspec.json.format(msgspec.json.encode(fingerprint)))
        if finished:
            return self._mended_journal(finished)
        return [self._entry(line) for line in self.journal.open()]

    def _mended_journal(self, finished: Mapping[str, TensorRecord]) -> list[JournalEntry]:
        """The journal, begun anew from a report's records where it is not the same as they are."""
        of_report = [
            JournalEntry(name, shard.layout.name, finished[name])
            for shard in self.shards
            for name in shard.layout.entries
            if name in finished
        ]
        try:
            entries = [self._entry(line) for line in self.journal.open()]
        except InputError:
            entries = []
        if {entry.name for entry in entries} >= {entry.name for entry in of_report}:
            return entries
        self.journal.close()
        osfile.unlink(self.state / "journal")
        self.journal.open()
        self.journal.append(msgspec.json.encode(entry) for entry in of_report)
        return of_report

    def _begin(self, fingerprint: Fingerprint) -> list[JournalEntry]:
        """With --overwrite: go on with an unfinished run of this very kind, or else clear OUT and begin.

        A batch system repeats the whole command after an interruption: --overwrite must not undo what it has done.
        """
        if (self.state / "run.json").exists() and not (self.out / REPORT_NAME).exists():
            try:
                return self._continue(fingerprint)
            except InputError:  # another run, or a damaged journal: it is what is to be overwritten
                self.journal.close()
                self.elsewhere = []
        osfile.make_folder(self.work)  # what is there goes only where something can be put in its place
        self._clear()
        return self._continue(fingerprint)

    def check_held(self) -> None:
        """Refuse to go on where OUT is not the folder any more that the run began in: another run may be in its place.

        Raises:
            OutputError: it was moved or removed.
        """
        osfile.refuse_replaced(self._lock_fd, self.state / "lock")

    def finish(self) -> None:
        """Remove what only an unfinished run needs."""
        osfile.remove_folder(self.work, with_content=True)

    def discard(self) -> None:
        """Leave OUT as it was found: everything this run and its interrupted forerunners made is removed.

        Raises:
            OutputError: it cannot be removed, or is not what the run began in.
        """
        self.close_files()
        self.check_held()
        made_out = (self.state / "made").exists()
        for shard in self.shards:
            osfile.unlink(shard.final)
        osfile.remove_folder(self.state, with_content=True)
        if made_out:
            osfile.remove_folder(self.out, with_content=False)

    def close_files(self) -> None:
        """Close shards, journal and accounts; the lock stays."""
        for shard in self.shards:
            shard.close()
        self.journal.close()
        self.accounts.close()

    def close(self) -> None:
        """Close everything and let the lock go."""
        self.close_files()
        if self._lock_fd >= 0:
            osfile.close(self._lock_fd)
            self._lock_fd = -1

    def _refuse_foreign(self, *, overwrite: bool) -> None:
        for path in (self.out, self.state, self.work):  # what is written below a link is written elsewhere
            if osfile.is_other_than_folder(path):
                what = f"OUT {shown(str(path))}" if path == self.out else shown(str(path))
                if path == self.out and path.is_dir():
                    raise InputError(f"{what} is a link: name the folder it leads to, {shown(str(path.resolve()))}")
                raise InputError(f"{what} is not a folder: name a new or an empty one as OUT")
        if not self.out.is_dir():
            return
        if not overwrite:
            if not self.state.is_dir() and any(self.out.iterdir()):
                way = "name a new folder"
                if self._earlier_report() is not None:
                    way += ", or replace the result it holds with --overwrite"
                else:
                    way += ", or write beside what it holds with --overwrite"
                raise InputError(f"OUT {shown(str(self.out))} is not empty and holds no unfinished run: {way}")
            return
        own = self._own_weights()
        foreign = sorted({path.name for pattern in _WEIGHTS for path in self.out.glob(pattern)} - own)
        if foreign:
            # Not ours to remove, and beside the result loaders would pick them up.
            raise InputError(
                f"OUT {shown(str(self.out))} holds weights that are not of an earlier run, e.g. {shown(foreign[0])}: "
                "move them away or name another OUT"
            )

    def _refuse_unaccounted(self, journalled: Set[str]) -> None:
        """Refuse a shard that bears the name of one of ours and is none.

        Without a report a run has come no further than its journal, and a shard has its name when all of its tensors
        are there, and no other then. Both names are there where a power cut kept half of a renaming.
        """
        if (self.out / REPORT_NAME).exists():
            return
        for shard in self.shards:
            if not shard.final.exists():
                continue
            whole = shard.layout.entries.keys() <= journalled
            if not whole or (shard.partial.exists() and not filecmp.cmp(shard.final, shard.partial, shallow=False)):
                raise InputError(
                    f"OUT {shown(str(self.out))} holds {shown(shard.final.name)}, which the unfinished run there does "
                    "not account for: move it away or name another OUT"
                )

    def _own_weights(self) -> set[str]:
        """Names of the shards that earlier runs made in OUT, by their report or journal, and of their index.

        Never by the names of the run to come: `model.safetensors` is what anybody's checkpoint is called.
        """
        names: set[str] = set()
        if (report := self._earlier_report()) is not None:
            names |= report.headers.keys()
        with contextlib.suppress(InputError, msgspec.MsgspecError):
            made = {self._entry(line).shard for line in records_in(wholefile.read_whole(self.state / "journal"))}
            names |= {name for name in made if not (self.work / f"{name}{PARTIAL_SUFFIX}").exists()}
        indices = {path.name: _shards_in(path) for path in self.out.glob(_WEIGHTS[1])}
        return names | {name for name, shards in indices.items() if shards and shards <= names}

    def _earlier_report(self) -> Report | None:
        with contextlib.suppress(InputError, msgspec.MsgspecError):
            return decoded(wholefile.read_whole(self.out / REPORT_NAME), Report)
        return None

    def _check_space(self, *, overwrite: bool) -> None:
        there = next(p for p in (self.out, *self.out.absolute().parents) if p.exists())
        kept = 0
        for shard in self.shards:
            for path in (shard.final, shard.partial):
                with contextlib.suppress(OSError):
                    kept += path.stat().st_blocks * 512
        if overwrite:  # shards of other names go too
            kept = sum(p.stat().st_blocks * 512 for p in self.out.glob("*.safetensors")) if self.out.is_dir() else 0
        if not overwrite and (self.out / REPORT_NAME).exists() and all(shard.final.exists() for shard in self.shards):
            return  # a finished result, or one to be mended in its place
        largest = max((shard.layout for shard in self.shards), key=lambda layout: layout.file_bytes)
        if largest.file_bytes > osfile.longest_file_bytes():
            raise DiskSpaceError(
                f"OUT {shown(str(self.out))}: shard {shown(largest.name)} has {largest.file_bytes} bytes, more than a "
                "file may have here: raise the limit on the size of files (ulimit -f)"
            )
        needed = sum(shard.layout.file_bytes for shard in self.shards) - kept
        needed += self._beside_bytes + _SLACK_BYTES
        free = osfile.free_bytes(there)
        if needed > free:
            needs, are = format_apart(needed, free)
            raise DiskSpaceError(
                f"OUT {shown(str(self.out))}: the result needs {needs}, {are} are free: "
                "free space or choose another OUT"
            )

    def _lock(self) -> None:
        path = self.state / "lock"
        while True:
            osfile.make_folder(self.state)
            self._lock_fd = osfile.open_output(path)
            held = osfile.lock(self._lock_fd, path)
            if not held or osfile.is_same_file(self._lock_fd, path):
                break
            # Whoever had it has removed it with all else that a refused run made: it is the lock of nothing.
            osfile.close(self._lock_fd)
        if not held:
            size = min(100, osfile.status(self._lock_fd, path).st_size)
            holder = osfile.read_exactly(self._lock_fd, size, 0).decode("ascii", "replace").strip()
            by = f" ({shown(holder)})" if holder else ""  # it may not have written its name yet
            raise LockedError(f"OUT {shown(str(self.out))} is held by another run{by}: wait for it or stop it")
        osfile.truncate(self._lock_fd, 0, path)
        holder = f"pid {os.getpid()} on {os.uname().nodename}\n"
        osfile.pwrite_all(self._lock_fd, memoryview(holder.encode()), 0, path)

    def _clear(self) -> None:
        """Remove an earlier result and its state; other files of OUT stay."""
        report = self._earlier_report()
        own = self._own_weights()
        # The report goes first: without it no half-cleared OUT passes for a finished one.
        osfile.unlink(self.out / REPORT_NAME)
        for pattern in reversed(_WEIGHTS):  # the index before the shards, for the same reason
            for path in self.out.glob(pattern):
                if path.name in own:
                    osfile.unlink(path)
        # Another model's tokenizer must not be left to this one.
        self._remove({*map(restored, report.sidecars if report is not None else ()), *self._noted_sidecars()})
        osfile.sync_folder(self.out)  # before what tells that they were a run's
        osfile.remove_folder(self.work, with_content=True)
        for name in ("run.json", "journal", "sessions", "sidecars"):
            osfile.unlink(self.state / name)

    def note_sidecars(self, names: Iterable[str]) -> None:
        """Write down what is about to be copied beside the weights; what an earlier start copied besides is removed.

        Until the report lists them nothing else tells that they are a run's. What a finished result has stays.

        Raises:
            OutputError: OUT cannot be written.
        """
        gone = self._noted_sidecars() - {*names}
        if not (self.out / REPORT_NAME).exists():
            self._remove(gone)
            osfile.sync_folder(self.out)
            gone = set()
        wholefile.write_atomic(self.state / "sidecars", msgspec.json.encode([*map(storable, sorted({*names, *gone}))]))

    def _noted_sidecars(self) -> set[str]:
        with contextlib.suppress(InputError, msgspec.MsgspecError):
            return {*map(restored, decoded(wholefile.read_whole(self.state / "sidecars"), list[str]))}
        return set()

    def _remove(self, names: Set[str]) -> None:
        """Remove files of OUT, and folders that this leaves empty. The names are from a file, and may lead anywhere."""
        for name in sorted(names):
            path, parts = self.out / name, PurePath(name).parts
            if "\0" in name or ".." in parts or PurePath(name).is_absolute():
                continue
            if path.parent.resolve().is_relative_to(self.out.resolve()):
                osfile.unlink(path)
                for folder in path.relative_to(self.out).parents[:-1]:
                    osfile.remove_folder(self.out / folder, with_content=False)

    def _refuse_changed(self, fingerprint: Fingerprint) -> None:
        path = self.state / "run.json"
        try:
            before = decoded(wholefile.read_whole(path), Fingerprint)
        except (InputError, msgspec.MsgspecError) as error:
            raise InputError(f"{shown(str(path))}: unreadable ({error}): start anew with --overwrite") from error
        self.elsewhere = fingerprint.elsewhere(before)
        if changes := fingerprint.differences(before):
            raise InputError(
                f"OUT {shown(str(self.out))} holds a run that differs from this one: {'; '.join(changes)}: "
                "repeat the earlier command, name another OUT, or start anew with --overwrite"
            )

    def _entry(self, line: bytes) -> JournalEntry:
        try:
            return decoded(line, JournalEntry)
        except msgspec.MsgspecError as error:
            raise InputError(
                f"{shown(str(self.state / 'journal'))}: a record is not understood ({error}): "
                "start anew with --overwrite"
            ) from error


def _shards_in(index: Path) -> set[str]:
    """The shards that an index names; what is no name of a shard if it cannot be read."""
    try:
        return set(decoded(wholefile.read_whole(index), _Index).weight_map.values())
    except (InputError, msgspec.MsgspecError):
        return {""}
