"""What the work on a result took, over every session that it took: time, bytes, peaks, and what was warned of.

A session is one start of the command. With every commit it writes how far it has come, so that a killed one is missed
by seconds; of each session the last line counts. Only the report needs them: damage to the file costs nothing else.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from streamrepair.checkpoint import osfile
from streamrepair.checkpoint.journal import Journal
from streamrepair.engine.timeline import FILES
from streamrepair.errors import InputError
from streamrepair.report import ResourceUse, Session, Timings, decoded

_LINE_BYTES = 700
"""Of a line but for its workers; about 400, with small numbers."""
_USE_BYTES = 160
"""Of a worker in a line; about 120."""


class _Line(msgspec.Struct, frozen=True):
    """A line of the file."""

    number: int
    session: Session


class Accounts:
    """The sessions of a result, kept in a file of checked lines.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._journal = path, Journal(path)
        self._sessions: dict[int, Session] = {}
        self._number = 0

    def open(self) -> None:
        """Read what earlier sessions left.

        Raises:
            OutputError: the file cannot be opened.
        """
        try:
            lines = [decoded(line, _Line) for line in self._journal.open()]
        except (InputError, msgspec.MsgspecError):
            self._journal.close()
            osfile.unlink(self._path)
            lines = []
            self._journal.open()
        self._sessions = {line.number: line.session for line in lines}
        self._number = max(self._sessions, default=0) + 1

    def record(self, session: Session) -> None:
        """Write how far the present session has come.

        Raises:
            OutputError: the device refused.
        """
        self._sessions[self._number] = session
        self._journal.append([msgspec.json.encode(_Line(self._number, session))])

    @property
    def sessions(self) -> list[Session]:
        """All of them, in order."""
        return [self._sessions[number] for number in sorted(self._sessions)]

    def close(self) -> None:
        """Release the file."""
        self._journal.close()


def most_bytes(lanes: int, commits: int) -> int:
    """At most so many bytes a session with so many workers and commits adds to the file, marks included.

    But for its warnings: there are few, and the disk's slack has room for them.
    """
    return commits * (_LINE_BYTES + _USE_BYTES * lanes)


def summed(sessions: list[Session]) -> Timings:
    """The times and bytes of all sessions together."""
    totals = {name: sum(getattr(s.timings, name) for s in sessions) for name in Timings.__struct_fields__}
    return msgspec.convert({name: round(total, 4) for name, total in totals.items()}, Timings)


def summed_uses(sessions: list[Session]) -> tuple[ResourceUse, ...]:
    """Who was busy or waited in all sessions together: each worker by its name, then the files."""
    found: dict[str, ResourceUse] = {}
    for use in sorted((use for session in sessions for use in session.utilisation), key=lambda use: use.name == FILES):
        before = found.get(use.name, ResourceUse(name=use.name, busy_s=0.0, waiting_s={}, idle_s=0.0))
        kinds = before.waiting_s | use.waiting_s
        found[use.name] = ResourceUse(
            name=use.name,
            busy_s=round(before.busy_s + use.busy_s, 4),
            waiting_s={k: round(before.waiting_s.get(k, 0.0) + use.waiting_s.get(k, 0.0), 4) for k in kinds},
            idle_s=round(before.idle_s + use.idle_s, 4),
        )
    return tuple(found.values())
