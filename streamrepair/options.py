"""Values of options as a caller may give them, held against what they can be.

What `Settings` holds is checked by `Settings.check`.
"""

from __future__ import annotations

import os
from numbers import Integral, Real
from pathlib import Path

from streamrepair.errors import UsageError, shown
from streamrepair.units import parse_bytes

Source = str | os.PathLike[str]
"""A path, or for an input a Hub id."""
Size = int | str
"""Bytes, or text such as "16GB"."""


def path_text(name: str, path: object) -> str:
    """A path as text.

    Raises:
        UsageError: it is none.
    """
    if isinstance(path, bytes | str | os.PathLike):
        return os.fsdecode(path)
    raise UsageError(f"{name} is {shown(repr(path))}, expected a path")


def output_path(name: str, path: object) -> Path:
    """A path that something is written to; the empty one is not the current folder.

    Raises:
        UsageError: it is none.
    """
    text = path_text(name, path)
    try:
        meant = bool(text) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # no bytes that could be a name
        meant = False
    if not meant:
        raise UsageError(f"{name} is {shown(repr(text))}, expected a path")
    return Path(text)


def size_bytes(name: str, size: object) -> int:
    """A size in bytes.

    Raises:
        UsageError: it is no positive number of bytes and no text that says one.
    """
    if isinstance(size, str):
        try:
            return parse_bytes(size)
        except UsageError as error:
            raise UsageError(f"--{name}: {error}") from error
    if isinstance(size, Integral) and not isinstance(size, bool) and int(size) > 0:
        return int(size)
    raise UsageError(f'--{name} is {shown(repr(size))}, expected a positive number of bytes or text such as "16GB"')


def plain_number(number: float) -> float:
    """A number of NumPy's as one of Python's, which JSON can hold; all else as it is, for others to check."""
    return float(number) if isinstance(number, Real) and not isinstance(number, int) else number


def check_flag(name: str, flag: object) -> None:
    """Refuse what is neither true nor false: "no" would be true.

    Raises:
        UsageError: it is no bool.
    """
    if not isinstance(flag, bool):
        raise UsageError(f"--{name} is {shown(repr(flag))}, expected True or False")


def check_count(name: str, count: object) -> None:
    """Refuse what is no number of things.

    Raises:
        UsageError: it is no whole number, or less than 1.
    """
    if not isinstance(count, Integral) or isinstance(count, bool) or int(count) < 1:
        raise UsageError(f"--{name} is {shown(repr(count))}, expected a whole number, at least 1")
