"""What becomes of NaN and infinity in a pair: it is refused, or the user chose that such tensors are passed through.

`finite` finds them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from streamrepair.checkpoint.headers import TensorEntry
from streamrepair.checkpoint.pairing import Side
from streamrepair.engine.finite import first_nonfinite, search
from streamrepair.engine.job import Job
from streamrepair.errors import InputError, shown


class NonFiniteInputError(InputError):
    """A weight of BASE or FT is NaN or infinite: the pair is refused and leaves no output."""


def met_nonfinite(job: Job, piece: memoryview, offset: int, *, of_base: bool) -> str | None:
    """Where a piece is not finite, if the user allowed it.

    Raises:
        NonFiniteInputError: it is not finite and the user did not allow it.
    """
    side = job.task.pairing.base if of_base else job.task.ft
    assert side is not None
    index = first_nonfinite(piece, side.entry.dtype)
    if index is None:
        return None
    return _allowed(job, side, offset // (side.entry.nbytes // side.entry.numel) + index, of_base=of_base)


def _allowed(job: Job, side: Side, index: int, *, of_base: bool) -> str:
    """What is said of an element that is not finite, if the user allowed it.

    Raises:
        NonFiniteInputError: the user did not.
    """
    checkpoint = job.around.base if of_base else job.around.ft
    error = nonfinite_error(checkpoint.shards[side.shard].path, side.entry, index)
    if job.around.settings.on_nonfinite == "copy-ft":
        return error.finding
    raise error


def nonfinite_error(path: Path, entry: TensorEntry, index: int) -> NonFiniteInputError:
    """What is to be said of an element that is not finite."""
    found = f"{shown(str(path))}: tensor {shown(entry.name)} holds NaN or infinity at element {index}, "
    advice = "restore the file, or pass such tensors through with --on-nonfinite copy-ft"
    return NonFiniteInputError(f"{found}expected finite numbers", advice)


def find_nonfinite(job: Job) -> str | None:
    """Search both sides of a pair for NaN and infinity; where one is, if the user allowed it.

    Raises:
        NonFiniteInputError: one is not finite and the user did not allow it.
    """
    for side, of_base in ((job.task.pairing.base, True), (job.task.ft, False)):
        assert side is not None
        if (index := _searched(job, side, of_base=of_base)) is not None:
            return _allowed(job, side, index, of_base=of_base)
    return None


def _searched(job: Job, side: Side, *, of_base: bool) -> int | None:
    return search(partial(job.read, side, of_base=of_base), side.entry, job.around.check_stop)


def check_base(job: Job, base: Side) -> None:
    """Read BASE's side of a tensor that is passed through: no number is made of it, but a broken input is to be known.

    Raises:
        NonFiniteInputError: it holds NaN or infinity. Where the user passes such tensors through, it is not read.
    """
    if job.around.settings.on_nonfinite == "refuse" and (index := _searched(job, base, of_base=True)) is not None:
        _allowed(job, base, index, of_base=True)
