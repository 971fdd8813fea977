"""The files beside the weights that make a folder loadable: configuration, tokenizer, chat template, custom code.

They come from FT, byte for byte (but for the dtype that config.json states, where the output's differs), and are never
imported or executed.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streamrepair.checkpoint import osfile, refusals, wholefile
from streamrepair.checkpoint.beside import is_missed, is_wanted
from streamrepair.checkpoint.layout import Checkpoint
from streamrepair.checkpoint.write import digest_of
from streamrepair.errors import InputError, OutputError
from streamrepair.report import REPORT_NAME, STATE

_DEEPEST = 3
"""Levels of folders that are looked into, the checkpoint's own among them."""
_LARGEST_BYTES = 1 << 28


def sidecars(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Relative paths of the sidecar files in a checkpoint's folder, sorted.

    A checkpoint given as one file has them only if a config.json lies beside it: any folder may hold a weights file.

    Raises:
        InputError: the folder cannot be listed.
    """
    return tuple(sorted(name for name, regular in _found(checkpoint) if regular and _is_carried(name)))


def not_carried(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Files below a checkpoint's folder that are not copied though loading might need them, sorted.

    Raises:
        InputError: the folder cannot be listed.
    """
    return tuple(sorted(name for name, regular in _found(checkpoint) if regular and not _is_carried(name)))


def _is_carried(path: str) -> bool:
    return is_wanted(path.rpartition("/")[2])


def left_beside(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What is named as a sidecar and is no file, sorted: links that lead nowhere or in circles, FIFOs, devices.

    And folders (with a slash at the end) that cannot be listed, lie deeper than is looked, or are links.

    Raises:
        InputError: the folder cannot be listed.
    """
    return tuple(sorted(name for name, regular in _found(checkpoint) if not regular))


def _found(checkpoint: Checkpoint) -> Iterator[tuple[str, bool]]:
    """Relative paths of what is carried along or missed, and whether there is a regular file.

    Of a folder that cannot be listed its own.
    """
    folder = checkpoint.folder
    if checkpoint.whole_folder or stat.S_ISREG(_mode(folder / "config.json")):
        yield from _walk(folder, "", 1)


def _walk(folder: Path, prefix: str, depth: int) -> Iterator[tuple[str, bool]]:
    try:
        entries = os.scandir(folder)
    except OSError as error:
        if prefix:
            yield prefix, False  # lost+found and the like are no reason to refuse the weights
            return
        raise InputError(
            f"{refusals.shown_path(folder)}: cannot be listed ({error.strerror})", "check its mode"
        ) from error
    with entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            mode = _mode(folder / name)
            if stat.S_ISDIR(mode):
                # checkpoint-500 and the like are whole checkpoints of their own, and so is what we made, or are making.
                own = name.startswith(("checkpoint-", "runs", "original", "onnx")) or _is_result(folder / name)
                if own:
                    continue
                if entry.is_symlink() or depth == _DEEPEST:  # a link may lead anywhere, and round in circles
                    yield f"{prefix}{name}/", False
                else:
                    yield from _walk(folder / name, f"{prefix}{name}/", depth + 1)
            elif is_wanted(name):
                yield prefix + name, stat.S_ISREG(mode)
            elif is_missed(prefix + name) and stat.S_ISREG(mode):
                yield prefix + name, True


def _mode(path: Path) -> int:
    """Of what a path leads to; 0 if that cannot be told: is_file raises for links into what may not be searched."""
    with contextlib.suppress(OSError):
        return path.stat().st_mode
    return 0


def _is_result(folder: Path) -> bool:
    with contextlib.suppress(OSError):  # what cannot be looked into is told of when it is listed
        return (folder / STATE).is_dir() or (folder / REPORT_NAME).is_file()
    return False


def stated_model(checkpoint: Checkpoint) -> str | None:
    """The kind of model that config.json beside the weights states; None if it states none, or cannot be read."""
    with contextlib.suppress(InputError):
        settings = _settings(wholefile.read_whole(checkpoint.folder / "config.json", _LARGEST_BYTES))
        kind = settings.get("model_type") if settings else None
        return kind if isinstance(kind, str) else None
    return None


def check_sidecars(checkpoint: Checkpoint, names: tuple[str, ...]) -> int:
    """Open every sidecar and look at its size, so that none stops the run once the weights are done; their bytes.

    Raises:
        InputError: one cannot be read or is too large.
    """
    return sum(wholefile.check_readable(checkpoint.folder / name, _LARGEST_BYTES) for name in names)


def copy_sidecars(checkpoint: Checkpoint, names: tuple[str, ...], out: Path, *, dtype: str | None) -> dict[str, str]:
    """Copy sidecars into `out`, each whole or not at all; the digests of what was written.

    Args:
        dtype: what config.json is to state as the weights' dtype, or None to leave it.

    Raises:
        InputError: one cannot be read.
        OutputError: one cannot be written.
    """
    digests = {}
    for name in names:
        data = _content(checkpoint, name, dtype)
        target = out / name
        if target.parent != out:
            osfile.make_folder(target.parent)
            if not target.parent.resolve().is_relative_to(out.resolve()):
                raise OutputError(f"{refusals.shown_path(target.parent)}: leads out of OUT by a link: remove the link")
        wholefile.write_atomic(target, data)
        digests[name] = digest_of(data)
    return digests


def differing(checkpoint: Checkpoint, out: Path, *, dtype: str | None) -> tuple[str, ...]:
    """The sidecars that are there in `out` and are not what `copy_sidecars` would make of them now.

    Raises:
        InputError: one cannot be read.
    """
    there = (name for name in sidecars(checkpoint) if (out / name).exists())
    return tuple(name for name in there if not _is_copy(out / name, _content(checkpoint, name, dtype)))


def _is_copy(path: Path, data: bytes) -> bool:
    try:
        return wholefile.read_whole(path, _LARGEST_BYTES) == data
    except InputError:
        return False


def _content(checkpoint: Checkpoint, name: str, dtype: str | None) -> bytes:
    data = wholefile.read_whole(checkpoint.folder / name, _LARGEST_BYTES)
    return _with_dtype(data, dtype) if name == "config.json" and dtype is not None else data


def _settings(data: bytes) -> dict[str, Any] | None:
    """What a config.json holds; None where that is no JSON, or no object."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(config := json.loads(data), dict):
            return config
    return None


def _with_dtype(data: bytes, dtype: str) -> bytes:
    if (config := _settings(data)) is None:
        return data
    parts = [config]
    while parts:
        part = parts.pop()
        # Multimodal models state it again for each of their parts, and for parts of those.
        parts += (v for k, v in part.items() if k.endswith("_config") and isinstance(v, dict))
        for key in ("dtype", "torch_dtype"):
            if isinstance(part.get(key), str):
                part[key] = dtype
    return (json.dumps(config, indent=2) + "\n").encode()
