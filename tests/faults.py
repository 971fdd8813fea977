"""A kernel that misbehaves on demand: stands in for `os` in the one module through which the engine touches files."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

WRITING = ("pwrite", "fsync", "replace", "unlink", "makedirs", "ftruncate", "posix_fallocate")
"""What changes the disk."""
ALL = (*WRITING, "open", "pread", "preadv", "fstat", "statvfs", "rmdir")
"""Every call that the engine makes, but for close, whose failure means nothing after a sync."""

Fault = Callable[[int, str], "str | None"]
"""Gets a call's number (from 1) and name; raises, kills, returns SHORT to have it done by half, or None."""
SHORT = "short"


class Kernel:
    """The `os` module, with every named call passed to `fault` first.

    Args:
        names: the calls to watch. fault: what becomes of them.
    """

    def __init__(self, names: tuple[str, ...], fault: Fault) -> None:
        self._names, self._fault = names, fault
        self.calls: list[str] = []
        self._counting = threading.Lock()

    def __getattr__(self, name: str) -> object:
        real = getattr(os, name)
        if name not in self._names:
            return real

        def call(*args: object, **kwargs: object) -> object:
            with self._counting:
                self.calls.append(name)
                number = len(self.calls)
            if self._fault(number, name) == SHORT:
                args = _halved(name, args)
            return real(*args, **kwargs)

        return call


def fails(number: int, error: int, *, ever_after: bool = False) -> Fault:
    """A fault that raises `error` at one call, or from it on."""

    def fault(count: int, name: str) -> None:
        if count == number or (ever_after and count > number):
            raise OSError(error, os.strerror(error))

    return fault


def _halved(name: str, args: tuple[object, ...]) -> tuple[object, ...]:
    """The arguments of a call that moves bytes, for half of them; one byte stays one."""
    match name, args:
        case "pwrite", (fd, data, offset):
            return fd, data[: (len(data) + 1) // 2], offset  # type: ignore[arg-type, index]
        case "pread", (fd, count, offset):
            return fd, (count + 1) // 2, offset  # type: ignore[operator]
        case "preadv", (fd, [buffer], offset):
            return fd, [buffer[: (len(buffer) + 1) // 2]], offset
    return args


def short(number: int, *, ever_after: bool = False) -> Fault:
    """A fault that does one call, or all from it on, by half."""

    def fault(count: int, name: str) -> str | None:
        return SHORT if count == number or (ever_after and count > number) else None

    return fault


def kills(number: int) -> Fault:
    """A fault that ends the process as `kill -9` does, before the call is carried out."""

    def fault(count: int, name: str) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return fault


def none(count: int, name: str) -> None:
    """No fault: the calls are only counted."""
