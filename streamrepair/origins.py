"""BASE and FT of a finished result, opened again and held against what its report says of them.

For `verify --deep`, which recomputes from them, and `verify --repair`, which writes from them.
"""

from __future__ import annotations

from pathlib import Path

from streamrepair.checkpoint.layout import Checkpoint, open_checkpoint
from streamrepair.errors import InputError, shown
from streamrepair.report import CheckpointSummary, Report, restored


def open_origins(report: Report) -> tuple[Checkpoint, Checkpoint]:
    """BASE and FT.

    Raises:
        InputError: one is gone, or its headers are not those that the run read.
    """
    return _opened(report.base, "BASE"), _opened(report.ft, "FT")


def _opened(summary: CheckpointSummary, side: str) -> Checkpoint:
    """What was named then, by its whole path; or by the words it was named with, if it has moved along with us."""
    given, there = restored(summary.given), Path(restored(summary.path))
    if given.endswith((".safetensors", ".index.json")):
        there /= Path(given).name
    try:
        return _same(open_checkpoint(there, side=side), summary, side)
    except InputError as error:
        try:
            return _same(open_checkpoint(given, side=side), summary, side)
        except InputError:
            raise error from None


def _same(found: Checkpoint, summary: CheckpointSummary, side: str) -> Checkpoint:
    if found.header_digest != summary.header_digest:
        raise InputError(
            f"{side} {shown(found.given)}: its headers' digest is {found.header_digest[:23]}…, the report has "
            f"{shown(summary.header_digest[:23])}…: put the checkpoint back that the result was made from"
        )
    return found
