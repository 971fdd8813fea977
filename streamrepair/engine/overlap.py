"""OUT, and what is written beside it, held against the inputs: nothing that is only read may be written to."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from streamrepair.checkpoint import osfile
from streamrepair.checkpoint.layout import Checkpoint
from streamrepair.checkpoint.sidecars import sidecars
from streamrepair.errors import InputError, UsageError, shown


def refuse_overlap(out: Path, inputs: Mapping[str, Checkpoint], beside: Mapping[str, Path]) -> None:
    """Refuse an OUT that is, lies in, contains, or shares files with an input, and other files in an input.

    The folder of an input that is named as one file is not the input's: OUT may lie in it, but not be it. What is
    read there beside the weights is.

    Args:
        beside: option → the file that it has written.

    Raises:
        InputError: it does.
        UsageError: the path of such an option leads nowhere.
    """
    osfile.is_other_than_folder(out)  # a name that cannot be looked up is told of before it is looked at
    target = _resolved("OUT", out, InputError)
    for side, checkpoint in inputs.items():
        folder = checkpoint.folder.resolve()
        real = {shard.path.resolve().parent for shard in checkpoint.shards} | {folder}
        inside = checkpoint.whole_folder and any(parent in real for parent in target.parents)
        if target in real or inside or folder.is_relative_to(target):
            raise InputError(
                f"OUT {shown(str(out))} is, lies in, or contains {side} {shown(checkpoint.given)}: name another folder"
            )
        files = {shard.path.resolve() for shard in checkpoint.shards}
        files |= {(checkpoint.folder / name).resolve() for name in sidecars(checkpoint)} if beside else set()
        for option, path in beside.items():
            place = _resolved(option, path, UsageError)
            if place in files or (checkpoint.whole_folder and place.is_relative_to(folder)):
                raise InputError(
                    f"{option} {shown(str(path))} lies in {side} {shown(checkpoint.given)}: name another place"
                )
        inodes = {(shard.device, shard.inode) for shard in checkpoint.shards}
        for path in out.glob("*.safetensors") if out.is_dir() else ():
            with contextlib.suppress(OSError):  # a link that leads nowhere
                found = path.stat()
                if (found.st_dev, found.st_ino) in inodes:
                    raise InputError(f"{shown(str(path))} is the same file as a shard of {side}: name another OUT")


def _resolved(name: str, path: Path, refused: type[InputError | UsageError]) -> Path:
    """Where a path leads to.

    Raises:
        InputError, UsageError: nowhere; which of them, `refused` says.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # the current folder was removed; a link in circles
        why = error.strerror if isinstance(error, OSError) else "a link in circles"
        raise refused(f"{name} {shown(str(path))}: leads nowhere ({why}): name another place") from error
