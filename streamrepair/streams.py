"""The standard streams as they are met: closed, full, non-blocking, or a pipe that nobody reads.

Text goes through Python's own layers down to a `Descriptor`, which waits for room by `poll`: signals are heard
meanwhile, and who has asked the run to stop does not wait for a reader. What is said to whom stands elsewhere.

Imports nothing that takes time: `entry` needs it before all else.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals that mean "interrupted": Ctrl-C, a batch system's notices, a terminal that was closed."""
_LOOK_MS = 1000
"""How often a writer looks whether it shall still wait: so long at most it does once that is over."""
_UNSHOWN = "backslashreplace"
_AGAIN_S = 0.01  # after a descriptor that had room refused all the same
speaking = threading.RLock()
"""For whoever writes lines where other threads do: who waits for a stream's own lock, one of C's, hears no signal."""


class Descriptor(io.RawIOBase):
    """A standard descriptor to write to, whether it blocks or not; it is never closed."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._written_to = _own_description(number) if os.isatty(number) else number
        self._discards = self._hurries = self._unread = False

    def fileno(self) -> int:
        """Its number."""
        return self._number

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._number)

    def writable(self) -> bool:
        """It is."""
        return True

    def discard(self) -> None:
        """Take everything from now on, and write nothing."""
        self._discards = True

    def hurry(self) -> None:
        """Give what is written a second from now on, all together, and drop what then finds no room."""
        self._hurries = True

    def write(self, data: ReadableBuffer, /) -> int:
        """Write a part of the data as soon as there is room; returns how much of it need not be written any more."""
        view = memoryview(data).cast("B")
        while not self._discards:
            if _has_room(self._written_to, 0 if self._unread else _LOOK_MS):
                with contextlib.suppress(BlockingIOError):
                    return os.write(self._written_to, view[: select.PIPE_BUF])  # more could block in spite of the room
                time.sleep(_AGAIN_S)
            if self._hurries:
                self._unread = True
                break
        return len(view)


def _own_description(number: int) -> int:
    """A descriptor of the same terminal that does not block, while the caller's stays as it is; else the same one.

    A terminal has room for one byte when `poll` says that it has room, and a stopped one may never have more.
    """
    try:
        return os.open(os.ttyname(number), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return number


def _has_room(number: int, timeout_ms: int) -> bool:
    """Whether a write of PIPE_BUF bytes to a pipe, or of one to a terminal, ends at once, be it with an error."""
    waiting = select.poll()  # a fresh one: a signal handler may ask while the main thread does
    waiting.register(number, select.POLLOUT)
    return bool(waiting.poll(timeout_ms))


def tell(message: str) -> None:
    """Say something on standard error if it has room; for signal handlers, which must neither wait nor fail."""
    with contextlib.suppress(OSError):
        if _has_room(2, 0):
            number = _own_description(2) if os.isatty(2) else 2
            os.write(number, message.encode()[: select.PIPE_BUF])


def end_process(error: str, status: int) -> NoReturn:
    """End at once, from wherever a signal was met, with this status whatever standard error does."""
    try:
        tell(f"error: {error}\n")
    finally:
        os._exit(status)


def prepare() -> None:
    """Open what the caller closed of 0, 1 and 2, and put descriptors that wait under `sys.stdout` and `sys.stderr`.

    Else a weights file gets a number that is free, and messages go into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            _open_nothing(number)
    sys.stdout = _waiting(sys.stdout, sys.__stdout__, 1)
    sys.stderr = _waiting(sys.stderr, sys.__stderr__, 2)


def _open_nothing(number: int) -> None:
    """Open on the lowest free number, which is this one, what has nothing to read and whose writes lead nowhere."""
    try:
        os.open(os.devnull, os.O_RDWR)
    except OSError:  # a container without it: a pipe whose other end is gone does as well
        _, write_end = os.pipe()  # the other one has the number
        if number:
            os.dup2(write_end, number)
        os.close(write_end)


def _waiting(stream: TextIO | None, original: TextIO | None, number: int) -> TextIO:
    """The stream on a `Descriptor`; what somebody else has put there stays there.

    A name that the terminal cannot show must not end the run, in either.
    """
    if stream is not None:
        if stream is not original:
            with contextlib.suppress(AttributeError, OSError):
                stream.reconfigure(errors=_UNSHOWN)  # type: ignore[attr-defined]
            return stream
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(Descriptor(number)),
        encoding=None if stream is None else stream.encoding,
        errors=_UNSHOWN,
        line_buffering=number == 2 or os.isatty(number),
    )


def drop(stream: TextIO) -> None:
    """Let a stream that failed fail no more: what is still buffered would do so at exit."""
    if (descriptor := _descriptor(stream)) is not None:
        descriptor.discard()


def hurry(stream: TextIO) -> None:
    """Let nobody wait any more for a stream that nobody reads; safe in a signal handler."""
    if (descriptor := _descriptor(stream)) is not None:
        descriptor.hurry()


def _descriptor(stream: TextIO) -> Descriptor | None:
    """What lies under a stream that `prepare` made."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, Descriptor) else None
