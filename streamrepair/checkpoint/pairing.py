"""Pairs the tensors of BASE and FT: what is to be done with each name, and why. Pure: headers in, decisions out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from streamrepair.checkpoint.headers import ShardHeader, TensorEntry
from streamrepair.checkpoint.layout import Checkpoint
from streamrepair.checkpoint.naming import is_adapter, same_by_another_name
from streamrepair.errors import InputError, UsageError, shown

FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes whose values are the weights themselves; 8-bit and narrower floats mean something only with their scales."""
_NO_CODES = (*FLOATS, "BOOL", "I64", "U64", "C64")
"""Dtypes that no quantised weight is stored in; wide integers are positions and counters."""
_COUNTERS = ("_index", "_ids")
"""What ends the names of integer buffers that are no weights: relative_position_index, position_ids."""
_INDICES = ("indices", "codes")
"""What the places in a codebook are called (VPTQ, AQLM)."""
LEAST_ELEMENTS = 1024
"""Smaller matrices are passed through: the law of large random matrices says nothing about them."""

NOT_IN_BASE = "not in the base checkpoint"
"""Why a tensor of FT alone is kept."""
SHAPES_DIFFER = "shapes differ"

Intent = Literal["repair", "keep", "drop"]


@dataclass(frozen=True, slots=True)
class Side:
    """One side's tensor and the file it lies in."""

    shard: ShardHeader
    entry: TensorEntry


@dataclass(frozen=True, slots=True)
class Pairing:
    """What is intended for one tensor name."""

    name: str
    intent: Intent
    reason: str
    """Why, in words for the report."""
    base: Side | None
    """Its tensor has another name where FT's is a copy of FT's tensor of that name (`copies`)."""
    ft: Side | None
    kind: str = ""
    """The reason without numbers of the tensor's own, where it has such."""


class _Refusal(NamedTuple):
    """Why a tensor is passed through."""

    kind: str
    own: str = ""
    """Numbers of the tensor's own."""

    @property
    def reason(self) -> str:
        return f"{self.kind}: {self.own}" if self.own else self.kind


@dataclass(frozen=True, slots=True)
class Selection:
    """--include and --exclude: regular expressions searched in tensor names."""

    include: str | None = None
    exclude: str | None = None

    def refusal(self, name: str) -> str | None:
        """Why the user does not want this tensor repaired, or None.

        Raises:
            UsageError: a pattern does not compile.
        """
        if self.include is not None and not _pattern("--include", self.include).search(name):
            return f"not included by {self.include!r}"
        if self.exclude is not None and _pattern("--exclude", self.exclude).search(name):
            return f"excluded by {self.exclude!r}"
        return None


def pair(
    base: Checkpoint, ft: Checkpoint, selection: Selection, copies: Mapping[str, str] | None = None
) -> tuple[Pairing, ...]:
    """Every tensor name of both sides exactly once: FT's in file order, then those only BASE has.

    Args:
        copies: tensor that only FT has → the one of FT that it is a copy of, if they are known.

    Raises:
        InputError: the two share no tensor name at all.
        UsageError: a pattern does not compile.
    """
    if not any(name in base.tensors for name in ft.tensors):
        raise InputError(
            f"BASE {shown(base.given)} and FT {shown(ft.given)} have no tensor name in common "
            f"(BASE has {_first(base)}, FT has {_first(ft)}): {_remedy(base, ft)}"
        )
    selection.refusal("")  # a pattern that does not compile is refused even where nothing would be matched
    pairings = [*_of_ft(base, ft, selection, copies or {})]
    written = {pairing.name for pairing in pairings}
    for name, (shard, entry) in base.tensors.items():
        if name not in written:
            pairings.append(
                Pairing(name, "drop", "not in the fine-tuned checkpoint", Side(base.shards[shard], entry), None)
            )
    return tuple(pairings)


def _remedy(base: Checkpoint, ft: Checkpoint) -> str:
    """What to do about two checkpoints without a name in common."""
    for side, checkpoint in (("BASE", base), ("FT", ft)):
        if is_adapter(checkpoint.tensors):
            return f"{side} is an adapter: merge it into its base (peft: merge_and_unload), and name what that saves"
    if (found := same_by_another_name(ft.tensors, base.tensors)) is not None:
        name, other = map(shown, found)
        return f"{other} in BASE seems to be {name} in FT: save one of them by the class of model that saved the other"
    return "name a checkpoint and one that was fine-tuned from it"


def _of_ft(base: Checkpoint, ft: Checkpoint, selection: Selection, copies: Mapping[str, str]) -> Iterator[Pairing]:
    codes = _codes(ft)

    def verdict(entry: TensorEntry, other: TensorEntry | None) -> _Refusal | None:
        refusal = _refusal(entry, other) or _refusal_of_scales(entry, codes) or _refusal_of_biases(entry, ft)
        if refusal is None and (unwanted := selection.refusal(entry.name)) is not None:
            refusal = _Refusal(unwanted)
        return refusal

    for position, shard in enumerate(ft.shards):
        for entry in shard.tensors:
            side = Side(shard, entry)
            if ft.tensors.get(entry.name) != (position, entry):
                # In the shard, not in the index: loaders ignore it, but the shard is rewritten as it is.
                yield Pairing(entry.name, "keep", "not listed in the index", None, side)
                continue
            twin = copies.get(entry.name)
            if twin is not None and verdict(ft.tensors[twin][1], base.tensors[twin][1]) is not None:
                twin = None  # what it copies stays as it is, and so does it
            found = base.tensors.get(twin or entry.name)
            other = Side(base.shards[found[0]], found[1]) if found else None
            refusal = verdict(entry, other.entry if other else None)
            if refusal is None:
                yield Pairing(entry.name, "repair", "", other, side)
            else:
                yield Pairing(entry.name, "keep", refusal.reason, other, side, refusal.kind)


def _refusal(ft: TensorEntry, base: TensorEntry | None) -> _Refusal | None:
    """Why a tensor is passed through, or None if it is a pair of matrices."""
    if base is None:
        return _Refusal(NOT_IN_BASE)
    if (other := _of_other_dtype(ft, base)) is not None:
        return other
    if ft.shape != base.shape:
        return _Refusal(SHAPES_DIFFER, f"{list(base.shape)} in base, {list(ft.shape)} fine-tuned")
    return _of_no_kind(ft, base)


def _codes(ft: Checkpoint) -> dict[str, str]:
    """Module → a quantised weight in it, by the last part of its name: the module is its name up to the last dot."""
    found: dict[str, str] = {}
    for name, (_, entry) in ft.tensors.items():
        module, _, own = name.rpartition(".")
        if module and len(entry.shape) >= 2 and entry.dtype not in _NO_CODES and not own.endswith(_COUNTERS):
            found.setdefault(module, own)
    return found


def _refusal_of_scales(entry: TensorEntry, codes: dict[str, str]) -> _Refusal | None:
    """Why a matrix is passed through that means nothing without the codes beside it, which are; or None.

    The scales and zero points of FP8 blocks, GPTQ, AWQ, HQQ and the like are matrices of plain floats. FT's codes with
    other scales than FT's would be neither checkpoint's weight.
    """
    module = entry.name.rpartition(".")[0]
    own = codes.get(module)
    if own is None and (around := codes.get(module.rpartition(".")[0])) in _INDICES:
        own = around  # of a codebook in a module of its own; masks of bytes have weights of attention in such, too
    return None if own is None else _Refusal(f"belongs to the quantised {shown(own)} beside it")


def _refusal_of_biases(entry: TensorEntry, ft: Checkpoint) -> _Refusal | None:
    """Why a matrix is passed through that is the biases of experts, which are; or None."""
    stem = re.sub(r"[._]bias\Z", "", entry.name)
    found = ft.tensors.get(stem) or ft.tensors.get(f"{stem}.weight")
    if stem == entry.name or found is None or len(found[1].shape) < 3:
        return None
    return _Refusal(f"biases of the {len(found[1].shape)}-D weight beside it")


def is_repairable(ft: TensorEntry, base: TensorEntry) -> bool:
    """Whether these are a pair of matrices, as far as dtypes and shapes tell."""
    return _refusal(ft, base) is None


def is_of_no_kind(pairing: Pairing) -> bool:
    """Whether both sides have the tensor alike, and it is nothing that is ever repaired."""
    ft, base = pairing.ft, pairing.base
    if ft is None or base is None:
        return False
    if ft.entry.shape != base.entry.shape:  # a quantised weight has a shape of its own
        return _of_other_dtype(ft.entry, base.entry) is not None
    return _of_no_kind(ft.entry, base.entry) is not None


def _of_other_dtype(ft: TensorEntry, base: TensorEntry) -> _Refusal | None:
    """Why tensors of these dtypes are not repaired, or None."""
    for side, entry in (("base", base), ("fine-tuned", ft)):
        if entry.dtype not in FLOATS:
            return _Refusal(f"dtype {entry.dtype} ({side}) is not a plain floating-point weight")
    return None


def _of_no_kind(ft: TensorEntry, base: TensorEntry) -> _Refusal | None:
    """Why tensors of these dtypes and this shape are not repaired, or None if they are."""
    if (other := _of_other_dtype(ft, base)) is not None:
        return other
    if len(ft.shape) != 2:
        return _Refusal(f"{len(ft.shape)}-D, not a matrix")
    if ft.numel < LEAST_ELEMENTS:
        return _Refusal("tiny", f"{ft.numel} elements, fewer than {LEAST_ELEMENTS}")
    return None


def _pattern(option: str, pattern: str) -> re.Pattern[str]:
    if not pattern:  # of a variable that is not set, mostly
        raise UsageError(f"{option} is empty, which every name matches: give a regular expression, or leave it out")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:  # a{99999999999}; ten thousand brackets
        raise UsageError(f"{option} {pattern!r} is not a regular expression: {error}") from error


def _first(checkpoint: Checkpoint) -> str:
    names = [shown(name) for name in checkpoint.tensors]
    return ", ".join(names[:2]) + (", …" if len(names) > 2 else "")
