"""The first code of the command: signals mean "interrupted" from here on, while the rest is still being imported.

Imports nothing that takes time. Once a run works, `cli` puts its own handlers in place of these.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from streamrepair.streams import ENDING, end_process

_INTERRUPTED = 75  # as InterruptedRunError has it, which is not imported yet


def main() -> NoReturn:
    """Run the command line and end the process with its exit status.

    The interpreter's own end is left out: it takes the handlers away first, so that a signal would still kill what is
    done, and a worker that is in torch's C++ meanwhile takes the process down with it.
    """
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and a shell's background leave it
            signal.signal(number, _end)
    gc.disable()  # nothing of what is imported is garbage: to look for it is a tenth of the start
    from streamrepair.cli import main as run

    gc.enable()
    status = run()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(status)


def _end(number: int, _frame: FrameType | None) -> None:
    """Nothing is in work that could be left half done: what only looks, such as verify, can be cut off anywhere."""
    name = signal.Signals(number).name
    end_process(f"interrupted by {name}: the same command begins again", _INTERRUPTED)
