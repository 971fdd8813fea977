"""Who is told how a run goes on: a progress bar, a caller from Python, nobody."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from streamrepair.engine.plan import Plan


@runtime_checkable
class Watcher(Protocol):
    """Who is told how a run goes on."""

    def begin(self, plan: Plan, done_bytes: int) -> None:
        """The work starts; so many output bytes were finished by an earlier run."""
        ...

    def advance(self, done_bytes: int) -> None:
        """So many more output bytes are done."""
        ...

    def warn(self, message: str) -> None:
        """Something the user should know."""
        ...

    def note(self, message: str) -> None:
        """Something the user may like to know."""
        ...

    def end(self) -> None:
        """The work is over, one way or another."""
        ...
