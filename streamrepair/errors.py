"""The one tree of expected failures, each with the exit status the command line gives it.

Every message is one line that names the file or tensor, what was found, what was expected and what to do.
Names from a checkpoint are hostile until `shown` has escaped them.
"""

from __future__ import annotations

import re


class StreamRepairError(Exception):
    """An expected failure; `exit_status` is what the command exits with.

    Args:
        finding: what was found, or the whole message. advice: what to do, apart for whoever has other advice to give.
    """

    exit_status = 1

    def __init__(self, finding: str, advice: str = "") -> None:
        super().__init__(f"{finding}; {advice}" if advice else finding)
        self.finding, self.advice = finding, advice


class UsageError(StreamRepairError, ValueError):
    """The command or call was wrong: an option's value, a pattern that does not compile."""

    exit_status = 2


class InputError(StreamRepairError, ValueError):
    """BASE or FT is malformed, incomplete, non-finite, unsuitable or changed, or OUT holds something else; refused."""

    exit_status = 3


class DamageError(StreamRepairError, ValueError):
    """OUT is not what its report says it is, or no result at all; or a shard did not read back as it was written."""

    exit_status = 4


class BudgetError(StreamRepairError, MemoryError):
    """The work does not fit the memory budget; the message names the smallest budget that works."""

    exit_status = 5


class DiskSpaceError(StreamRepairError, OSError):
    """The result does not fit the disk; nothing was written."""

    exit_status = 5


class OutputError(StreamRepairError, OSError):
    """OUT cannot be written or synced; finished work is kept."""


class NumericalError(StreamRepairError, ArithmeticError):
    """No backend produced a factorisation that passed its check, or the result overflows its dtype."""


class LockedError(StreamRepairError, BlockingIOError):
    """Another live run holds OUT."""

    exit_status = 11


class InterruptedRunError(StreamRepairError, InterruptedError):
    """A signal stopped the run; all finished work is kept and the same command continues it."""

    exit_status = 75


_LONGEST_SHOWN = 200
_ADVICE = re.compile(r" GPU \d+ has | This error may ")


def brief(error: BaseException) -> str:
    """What a library's error says, in one line and without what it goes on to advise.

    torch's are a paragraph: "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …".
    """
    return _ADVICE.split(str(error).partition("\n")[0])[0]


def shown(name: str, longest: int = _LONGEST_SHOWN) -> str:
    """A name from a checkpoint, safe to print: control, ANSI, bidi and surrogate characters escaped, length bounded."""
    escaped = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in name
    )
    if len(escaped) > longest:
        return f"{escaped[:longest]}… ({len(name)} characters)"
    return escaped or "''"
