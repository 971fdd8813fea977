"""What is written beside the weights, looked at before any work: hours of it must not end at a sidecar or a path."""

from __future__ import annotations

import os
from pathlib import Path

from streamrepair.errors import UsageError, shown
from streamrepair.report import REPORT_NAME


def check_report_path(report: Path, out: Path) -> None:
    """Refuse a second copy of the report that could not be written, or that would take the place of OUT's own files.

    Raises:
        UsageError: its folder is missing or not writable, it is no regular file, or it lies in OUT.
    """
    name = f"--report {shown(str(report))}"
    if report.is_dir():
        raise UsageError(f"{name} is a folder, expected a file's name: name a file in it")
    if report.is_symlink() or (report.exists() and not report.is_file()):
        raise UsageError(
            f"{name} is a link, FIFO or device, and would be replaced by a file: name a file, or use --json"
        )
    folder = report.absolute().parent
    target, own = folder.resolve() / report.name, out.resolve()
    if target.is_relative_to(own) and target != own / REPORT_NAME:
        raise UsageError(f"{name} lies in OUT, which holds the result's own files: name another place")
    if target == own / REPORT_NAME:
        return  # the run makes its folder, and writes it anyway
    if not folder.is_dir():
        raise UsageError(f"{name}: the folder {shown(str(folder))} does not exist: create it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{name}: the folder {shown(str(folder))} is not writable: name another place")
