"""What becomes of NaN and infinity in a pair: it is refused, or the user chose that such tensors are passed through.

`finite` finds them.
"""

from __future__ import annotations

from functools import partial

from streamrepair.checkpoint.pairing import Side
from streamrepair.engine.finite import first_nonfinite, search
from streamrepair.engine.job import Job
from streamrepair.errors import InputError, shown


class NonFiniteInputError(InputError):
    """A weight of BASE or FT is NaN or infinite: the pair is refused and leaves no output."""


def met_nonfinite(job: Job, piece: memoryview, offset: int) -> str | None:
    """Where a piece of FT's side is not finite, if the user allowed it.

    Raises:
        NonFiniteInputError: it is not finite and the user did not allow it.
    """
    entry = job.task.ft.entry
    index = first_nonfinite(piece, entry.dtype)
    return None if index is None else _allowed(job, job.task.ft, offset // entry.item_bytes + index)


def _allowed(job: Job, side: Side, index: int) -> str:
    """What is said of an element that is not finite, if the user allowed it.

    Raises:
        NonFiniteInputError: the user did not.
    """
    error = nonfinite_error(side, index)
    if job.around.settings.on_nonfinite == "copy-ft":
        return error.finding
    raise error


def nonfinite_error(side: Side, index: int) -> NonFiniteInputError:
    """What is to be said of an element that is not finite."""
    where = f"{shown(str(side.shard.path))}: tensor {shown(side.entry.name)}"
    found = f"{where} holds NaN or infinity at element {index}, expected finite numbers"
    return NonFiniteInputError(found, "restore the file, or pass such tensors through with --on-nonfinite copy-ft")


def find_nonfinite(job: Job) -> str | None:
    """Search both sides of a pair for NaN and infinity; where one is, if the user allowed it.

    Raises:
        NonFiniteInputError: one is not finite and the user did not allow it.
    """
    for side in (job.task.pairing.base, job.task.ft):
        assert side is not None
        if (index := _searched(job, side)) is not None:
            return _allowed(job, side, index)
    return None


def _searched(job: Job, side: Side) -> int | None:
    return search(partial(job.read, side), side.entry, job.around.check_stop)


def check_base(job: Job, base: Side) -> None:
    """Read BASE's side of a tensor that is passed through: no number is made of it, but a broken input is to be known.

    Raises:
        NonFiniteInputError: it holds NaN or infinity. Where the user passes such tensors through, it is not read.
    """
    if job.around.settings.on_nonfinite == "refuse" and (index := _searched(job, base)) is not None:
        _allowed(job, base, index)
