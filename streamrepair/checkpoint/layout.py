"""From what the user names (a folder, a file, an index, a Hub id) to the shards and tensors of a checkpoint.

Which file wins in a folder is decided as transformers decides it. An index is distrusted as `headers` distrusts a
shard: a shard's name in it is a plain file name or refused. Only headers are read; `pairing` holds BASE against FT.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from streamrepair.checkpoint import hub
from streamrepair.checkpoint.headers import (
    LONGEST_JSON_BYTES,
    ShardHeader,
    TensorEntry,
    malformed,
    read_header,
    read_string,
    refuse_not_downloaded,
    walk_object,
)
from streamrepair.checkpoint.osfile import opened_input, read_exactly
from streamrepair.checkpoint.refusals import shown_path
from streamrepair.errors import InputError, shown
from streamrepair.report import REPORT_NAME, STATE

_SHARD, _INDEX = ".safetensors", ".safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".gguf")
_CONVERT = (
    "only safetensors is read and nothing is unpickled; convert it with transformers' "
    "from_pretrained(…).save_pretrained(…)"
)
_ONE_OF = re.compile(r"-\d+-of-(\d+)\.safetensors\Z")
_VARIANT_INDEX = re.compile(r"(.+)\.safetensors\.index\.([\w-]+)\.json")
_LARGEST_METADATA_CHARACTERS = 2**20
_MOST_LISTED = 10


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose every shard has a sound header and holds what the index says it holds."""

    given: str  # as the user named it
    folder: Path  # where the shards and the sidecars lie
    index_name: str | None  # such as model.safetensors.index.json; None without an index
    index_metadata: Mapping[str, object]  # the index's own metadata, total_size among them; {} where there is none
    shards: tuple[ShardHeader, ...]  # sorted by file name
    # Name → position in `shards`, entry; as the index orders them or, without one, as their bytes lie.
    tensors: Mapping[str, tuple[int, TensorEntry]] = field(repr=False)
    unindexed: tuple[str, ...]  # tensors of the shards that the index does not list: ignored, to be reported
    stray_files: tuple[str, ...]  # other *.safetensors of the folder: ignored, to be reported
    whole_folder: bool  # False when one .safetensors file was named: its neighbours are then none of our business

    @property
    def total_bytes(self) -> int:
        """Size of all shards' files."""
        return sum(shard.file_bytes for shard in self.shards)

    @property
    def header_digest(self) -> str:
        """SHA-256 over all shards' header digests."""
        return joined_digest(shard.digest for shard in self.shards)


def joined_digest(digests: Iterable[str]) -> str:
    """One digest of several shards' header digests, in their order."""
    return f"sha256:{hashlib.sha256(''.join(digests).encode()).hexdigest()}"


def open_checkpoint(given: str | Path, *, side: str) -> Checkpoint:
    """The checkpoint at `given`: a folder, one .safetensors file, an *.index.json, or a Hub id (name/repo[@revision]).

    `side` (BASE or FT) begins every message.

    Raises:
        InputError: nothing there that can be read, or any shard or the index is malformed or missing.
    """
    try:
        path = _existing(str(given))
        is_folder = stat.S_ISDIR(_status(path).st_mode)
        _refuse_unfinished(path if is_folder else path.parent)
        main, whole_folder = (_main_file(path), True) if is_folder else (path, path.name.endswith(".index.json"))
        found = _from_main_file(str(given), main, whole_folder=whole_folder)
        for folder in {shard.path.resolve().parent for shard in found.shards}:  # by links, as the Hub's cache has them
            _refuse_unfinished(folder)
        return found
    except InputError as error:
        raise InputError(f"{side}: {error.finding}", error.advice) from error


def _refuse_unfinished(folder: Path) -> None:
    """Refuse what an interrupted run has left: a shard may have its name there, and all else be missing.

    Raises:
        InputError: a run has begun there, and there is no report.
    """
    with contextlib.suppress(OSError):  # what cannot be looked into is told of when it is read
        if (folder / STATE / "run.json").exists() and not (folder / REPORT_NAME).exists():
            raise InputError(
                f"{shown_path(folder)}: is the result of a run that has not finished",
                f"finish it, or, if it is known to be whole, remove its folder {STATE}",
            )


def _refuse_one_of_several(path: Path, *, named: bool) -> None:
    """Refuse a shard that stands for the checkpoint it is a part of: what is made of it would pass for a whole.

    Args:
        named: by the user; otherwise it is the only file of its folder.

    Raises:
        InputError: by its name it is one of several, or an index beside it says so.
    """
    numbered = _ONE_OF.search(path.name)
    if numbered is not None and int(numbered[1]) > 1:
        remedy = "name its folder or its index instead" if named else "fetch the others and the index"
        raise InputError(f"{shown_path(path)}: is one shard of {int(numbered[1])}", remedy)
    for name in _names_in(path.parent) if named else ():
        if name.endswith(_INDEX):
            with contextlib.suppress(InputError):  # a broken index is not what was named
                shards = set(_read_index(path.parent / name)[1].values())
                if path.name in shards and len(shards) > 1:
                    break
    else:
        return
    raise InputError(f"{shown_path(path)}: is one shard of {len(shards)}", f"name its folder or {shown(name)} instead")


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"{shown_path(path)}: cannot be opened ({why})", "check the path, or name a Hub id as owner/name"
        ) from error


def _existing(given: str) -> Path:
    """`given` as a path that exists, after a download if it names a repository of the Hub."""
    path = Path(given)
    if not given:
        raise InputError("the path is empty", "name a folder, a .safetensors file, an index or a Hub id")
    if not os.path.lexists(path) and hub.is_id(given):
        return hub.fetched(given)
    return path


def _main_file(folder: Path) -> Path:
    """The single file or the index that stands for the checkpoint in `folder`, by transformers' order of preference."""
    names = _names_in(folder)
    shards = [name for name in names if name.endswith(_SHARD)]
    indices = [name for name in names if name.endswith(_INDEX)]
    for name in ("model" + _SHARD, "model" + _INDEX):
        if name in names:
            return folder / name
    if len(indices) > 1:
        raise InputError(f"{shown_path(folder)}: has {len(indices)} indices ({_listed(indices)})", "name one of them")
    if indices or len(shards) == 1:
        return folder / (indices or shards)[0]
    if shards:
        _refuse_variant(folder, names)
        raise InputError(
            f"{shown_path(folder)}: has {len(shards)} .safetensors files ({_listed(shards)}) and no index",
            "fetch the missing model.safetensors.index.json, or name one file",
        )
    if parts := _parts(folder):
        raise InputError(
            f"{shown_path(folder)}: has no .safetensors file itself, its subfolders have ({_listed(parts)})",
            "name one of them, and that of the same name on the other side",
        )
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        raise InputError(f"{shown_path(folder)}: has no .safetensors file, only {_listed(pickles)}", _CONVERT)
    raise InputError(f"{shown_path(folder)}: has no .safetensors file and no index", "name a checkpoint's folder")


def _refuse_variant(folder: Path, names: list[str]) -> None:
    """Refuse shards whose index has the variant in another place of its name, as diffusers and transformers save it.

    Raises:
        InputError: there is such an index.
    """
    for name in names:
        if (found := _VARIANT_INDEX.fullmatch(name)) is not None:
            raise InputError(
                f"{shown_path(folder)}: its index {shown(name)} is that of a variant",
                f"copy it to {shown(f'{found[1]}.{found[2]}{_INDEX}')} beside it",
            )


def _parts(folder: Path) -> list[str]:
    """Subfolders that hold weights, as those of a diffusion pipeline do (unet, text_encoder)."""
    found = []
    for name in _names_in(folder):
        with contextlib.suppress(InputError):  # a file, or a folder that cannot be listed
            if any(other.endswith(_SHARD) for other in _names_in(folder / name)):
                found.append(name)
    return found


def _names_in(folder: Path) -> list[str]:
    """File names of `folder`, sorted; hidden ones (.streamrepair, AppleDouble ._model.safetensors) left out."""
    try:
        return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"{shown_path(folder)}: cannot be listed ({error.strerror})", "check its mode") from error


def _from_main_file(given: str, path: Path, *, whole_folder: bool) -> Checkpoint:
    metadata: Mapping[str, object] = {}
    index_name = None
    if path.name.startswith("."):
        raise InputError(
            f"{shown_path(path)}: begins with a dot, and loaders would not see a result of that name",
            "name a link to it that has another",
        )
    if path.name.endswith(_SHARD):
        _refuse_one_of_several(path, named=not whole_folder)
        shards: tuple[ShardHeader, ...] = (read_header(path),)
        weight_map: Mapping[str, str] = {entry.name: path.name for entry in shards[0].tensors}
        if not weight_map:
            raise malformed(f"{shown_path(path)}: has no tensors")
    elif path.name.endswith(".index.json"):
        metadata, weight_map = _read_index(path)
        index_name, shards = path.name, _open_shards(path, set(weight_map.values()))
    elif path.name.endswith(_PICKLES):
        raise InputError(f"{shown_path(path)}: is no safetensors file", _CONVERT)
    else:
        raise InputError(f"{shown_path(path)}: is no folder, .safetensors file or .index.json", "name one of those")
    own = {shard.path.name for shard in shards}
    return Checkpoint(
        given=given,
        folder=path.parent,
        index_name=index_name,
        index_metadata=metadata,
        shards=shards,
        tensors=_tensors(path, shards, weight_map),
        unindexed=tuple(e.name for shard in shards for e in shard.tensors if e.name not in weight_map),
        stray_files=tuple(
            name
            for name in (_names_in(path.parent) if whole_folder else ())
            if name.endswith(_SHARD) and name not in own
        ),
        whole_folder=whole_folder,
    )


def _tensors(
    path: Path, shards: tuple[ShardHeader, ...], weight_map: Mapping[str, str]
) -> dict[str, tuple[int, TensorEntry]]:
    """Where each indexed tensor lies; refuses one that is elsewhere, nowhere or in two shards."""
    found: dict[str, tuple[int, TensorEntry]] = {}
    for position, shard in enumerate(shards):
        for entry in shard.tensors:
            if entry.name in found:
                both = f"{shown(shards[found[entry.name][0]].path.name)} and {shown(shard.path.name)}"
                raise malformed(f"{shown_path(path)}: tensor {shown(entry.name)} is in two shards, {both}")
            found[entry.name] = (position, entry)
    for name, shard_name in weight_map.items():
        actual = shards[found[name][0]].path.name if name in found else None
        if actual != shard_name:
            where = f"it is in {shown(actual)}" if actual is not None else "no shard has it"
            problem = f"tensor {shown(name)} is not in {shown(shard_name)}, where the index puts it; {where}"
            raise malformed(f"{shown_path(path)}: {problem}")
    return {name: found[name] for name in weight_map}


def _open_shards(path: Path, shard_names: set[str]) -> tuple[ShardHeader, ...]:
    """The headers of an index's shards, sorted by name; every missing file is named before any is read."""
    names = sorted(shard_names)
    missing = [name for name in names if _is_missing(path.parent / name)]
    if missing:
        raise InputError(
            f"{shown_path(path)}: {len(missing)} of its {len(names)} shards are missing ({_listed(missing)})",
            "download them into the same folder",
        )
    return tuple(read_header(path.parent / name) for name in names)


def _is_missing(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:  # a dangling link of the Hub's cache too
        return True
    except OSError:  # there is something: read_header says what is wrong with it
        return False
    return False


def _read_index(path: Path) -> tuple[dict[str, object], dict[str, str]]:
    """Metadata, and the weight map: tensor → plain shard name, in the file's order."""
    with opened_input(path) as (fd, status):
        refuse_not_downloaded(read_exactly(fd, min(64, status.st_size), 0))
        if status.st_size > LONGEST_JSON_BYTES:
            raise malformed(f"is {status.st_size} bytes long, an index has at most {LONGEST_JSON_BYTES}")
        try:
            text = read_exactly(fd, status.st_size, 0).decode("utf-8").strip(" \t\r\n")
        except UnicodeDecodeError as error:
            raise malformed(f"is not UTF-8 at byte {error.start}") from error
        return _parse_index(text)


def _parse_index(text: str) -> tuple[dict[str, object], dict[str, str]]:
    weight_map: dict[str, str] = {}
    others: dict[str, object] = {}

    def shard_of(name: str, at: int) -> int:
        weight_map[name], end = read_string(text, at, what=f"the shard of tensor {shown(name)}")
        _check_shard_name(name, weight_map[name])
        return end

    def index_member(key: str, at: int) -> int:
        if key == "weight_map":
            return walk_object(text, at, shard_of, what="weight_map")
        others[key], end = _free_json(key, text, at)
        return end

    if walk_object(text, 0, index_member, what="the index") != len(text):
        raise malformed("has more than one JSON value")
    if not weight_map:
        raise malformed("has no weight_map, or an empty one")
    metadata = others.get("metadata")
    if not isinstance(metadata, dict | None):
        raise malformed(f"metadata is {shown(str(metadata))}, expected an object")
    return metadata or {}, weight_map


def _free_json(key: str, text: str, at: int) -> tuple[object, int]:
    """Any JSON value of an index, and the position after it; bounded in length because nothing else bounds it."""
    try:
        value, length = _FREE_JSON.raw_decode(text[at : at + _LARGEST_METADATA_CHARACTERS])
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # 1e999 or half a surrogate: not to be written
    except (ValueError, RecursionError) as error:
        raise malformed(f"{shown(key)} is broken JSON, too deep or too long") from error
    return value, at + length


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_FREE_JSON = json.JSONDecoder(parse_constant=_refuse_constant)


def _check_shard_name(tensor: str, name: str) -> None:
    """Refuses all but a plain, printable file name: joined to a folder it must stay there, here and in OUT."""
    plain = name.isprintable() and not any(c in name for c in "/\\:") and not name.startswith(".")
    if not plain or not name.endswith(_SHARD):
        raise malformed(
            f"tensor {shown(tensor)}: its shard is named {shown(name)}, expected a plain file name ending in {_SHARD}"
        )


def _listed(names: Iterable[str]) -> str:
    """The first few names, escaped, and how many more there are."""
    names = [shown(name) for name in names]
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more
