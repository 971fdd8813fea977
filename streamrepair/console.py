"""The process's surroundings: output that fails, the width of the help, and the signals that stop a run."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from streamrepair.engine.stop import StopRequest
from streamrepair.errors import InterruptedRunError, OutputError, StreamRepairError
from streamrepair.streams import ENDING, drop, end_process, hurry, tell

_LEAST_COLUMNS, _MOST_COLUMNS = 40, 500


def bound_columns() -> None:
    """Let the help be laid out for a width in which its layout ends: not so one or two columns, none, or millions."""
    columns = shutil.get_terminal_size().columns
    if "COLUMNS" in os.environ or not _LEAST_COLUMNS <= columns <= _MOST_COLUMNS:
        os.environ["COLUMNS"] = str(min(max(columns, _LEAST_COLUMNS), _MOST_COLUMNS))


@contextlib.contextmanager
def printing(*, worse: bool = False) -> Iterator[None]:
    """Nobody reading our output any more is no failure: the work itself is done.

    Args:
        worse: there is worse to tell, which output that fails must not take the place of.

    Raises:
        OutputError: standard output cannot take it, for lack of space for example.
    """
    try:
        yield
    except BrokenPipeError:
        drop(sys.stdout)
    except OSError as error:
        if isinstance(error, StreamRepairError):
            raise
        drop(sys.stdout)
        if worse:
            return
        raise OutputError(
            f"standard output cannot be written ({error.strerror}): the work itself is done: send the output elsewhere"
        ) from error


@contextlib.contextmanager
def stop_on_signals(stop: StopRequest, *, quiet: bool) -> Iterator[None]:
    """`ENDING` signals ask the run to stop; the second one ends it at once (and it can still be resumed).

    Before the run has begun (imports, headers, a download from the Hub) and once it is over the first one does.
    One that whoever started the process has it ignore stays ignored.
    """
    answer = "stopping: the tensors in hand are finished, which takes 25 s at most; the same again ends at once"
    status = InterruptedRunError.exit_status

    def handle(number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if stop.over:
            end_process(f"interrupted by {name} after the work: the same command tells of it again", status)
        if not stop.heeded:
            end_process(f"interrupted by {name} before any work: the same command begins again", status)
        if stop.requested:
            again = "interrupted again: ended at once; finished work is kept: the same command continues it"
            end_process(again, status)
        stop.request(f"interrupted by {name}")
        hurry(sys.stderr)  # the run ends within its limit whether anybody reads or not
        if not quiet:
            tell(("\n" if os.isatty(2) else "") + answer + "\n")

    before = {number: signal.getsignal(number) for number in ENDING}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
