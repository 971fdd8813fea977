"""The first code of the command: signals mean "interrupted" from here on, while the rest is still being imported.

Imports nothing that takes time. Once a run works, `cli` puts its own handlers in place of these.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from types import FrameType

from streamrepair.streams import end_process

_INTERRUPTED = 75  # as InterruptedRunError has it, which is not imported yet


def main() -> int:
    """Run the command line; returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _end)
    gc.disable()  # nothing of what is imported is garbage: to look for it is a tenth of the start
    from streamrepair.cli import main as run

    gc.enable()
    try:
        status = run()
    finally:
        gc.freeze()  # nor is it at the end, when the interpreter would look once more
    return _ended(status)


def _ended(status: int) -> int:
    """The exit status; the process ends here if a worker is left in the middle of its work.

    One that is in torch's C++ when the interpreter ends takes the process down with it: aborted, with another status.
    """
    import contextlib
    import threading

    if any(thread.daemon for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):
                stream.flush()
        os._exit(status)
    return status


def _end(number: int, _frame: FrameType | None) -> None:
    """Nothing is in work that could be left half done: what only looks, such as verify, can be cut off anywhere."""
    name = signal.Signals(number).name
    end_process(f"interrupted by {name}: the same command begins again", _INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
