"""What is written beside the weights, looked at before any work: hours of it must not end at a sidecar or a path."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath

from streamrepair.checkpoint.refusals import shown_path
from streamrepair.errors import InputError, UsageError, shown
from streamrepair.report import REPORT_NAME


def check_beside(beside: Mapping[str, Path], out: Path) -> None:
    """Refuse a file beside the result that could not be written, or that would take the place of another of the run's.

    Args:
        beside: option → the file that it names; the second copy of the report may be the first one.

    Raises:
        UsageError: its folder is missing or not writable, it cannot be looked up, is no regular file, lies in OUT, or
            two options name it.
    """
    for option, path in beside.items():
        name = f"{option} {shown(str(path))}"
        try:
            _check(option, name, path, out)
        except OSError as error:
            raise UsageError(f"{name} cannot be looked up ({error.strerror}): name another place") from error
    places: dict[Path, str] = {}
    for option, path in beside.items():
        first = places.setdefault(path.absolute().parent.resolve() / path.name, option)
        if first != option:
            raise UsageError(f"{first} and {option} are both {shown(str(path))}: name two files")


def check_places(out: Path, names: Iterable[str]) -> None:
    """Refuse an OUT in which something else has the place of a file that is copied there once the weights are done.

    Raises:
        InputError: a folder is where a file goes, or a file or a link where a folder does; or nobody may look there.
    """
    try:
        for name in names:
            for part in reversed(PurePath(name).parents[:-1]):
                folder = out / part
                if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                    raise InputError(f"{shown_path(folder)}: is in the place of a folder of FT's: move it away")
            if (out / name).is_dir() and not (out / name).is_symlink():
                raise InputError(f"{shown_path(out / name)}: is in the place of a file of FT's: move it away")
    except PermissionError as error:
        raise InputError(f"OUT {shown_path(out)} cannot be looked into ({error.strerror}): name another OUT") from error


def _check(option: str, name: str, path: Path, out: Path) -> None:
    if path.is_dir():
        raise UsageError(f"{name} is a folder, expected a file's name: name a file in it")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UsageError(f"{name} is a link, FIFO or device, and would be replaced by a file: name a file")
    folder = path.absolute().parent
    target, own = folder.resolve() / path.name, out.resolve()
    is_report = option == "--report" and target == own / REPORT_NAME
    if target.is_relative_to(own) and not is_report:
        raise UsageError(f"{name} lies in OUT, which holds the result's own files: name another place")
    if is_report:
        return  # the run makes its folder, and writes it anyway
    if not folder.is_dir():
        raise UsageError(f"{name}: the folder {shown(str(folder))} does not exist: create it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{name}: the folder {shown(str(folder))} is not writable: name another place")
