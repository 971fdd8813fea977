"""Which shapes are measured: named by the user, or those of a checkpoint's matrices, from its headers. No weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from streamrepair.benchmark.spectra import LEAST_SIDE, SPECTRA, Spectrum
from streamrepair.checkpoint.layout import open_checkpoint
from streamrepair.checkpoint.pairing import FLOATS, Selection, pair
from streamrepair.errors import InputError, UsageError, shown

DEFAULT_SHAPES = ((1024, 1024), (4096, 1024))
_SHAPE = re.compile(r"([0-9]{1,9})[xX×]([0-9]{1,9})")
Word = TypeVar("Word", bound=str)


@dataclass(frozen=True, slots=True)
class Case:
    """One matrix to measure on."""

    shape: tuple[int, int]
    """As stored: (rows, columns)."""
    spectrum: Spectrum
    count: int = 1
    """How many matrices of a checkpoint have this shape."""


def make_cases(
    *, shapes: Sequence[str], spectra: Sequence[str], base: str | None = None, ft: str | None = None
) -> tuple[Case, ...]:
    """Every shape with every spectrum, smallest first.

    Args:
        shapes: such as "4096x1024"; with those of BASE (and FT), or DEFAULT_SHAPES where neither is named.
        spectra: of SPECTRA; both if empty.

    Raises:
        UsageError: a shape or a spectrum is not understood.
        InputError: a checkpoint is malformed or has no matrix to measure on.
    """
    counts = Counter(dict.fromkeys(map(parse_shape, shapes), 1))
    if base is not None:
        counts.update(_checkpoint_shapes(base, ft))
    if not counts:
        counts.update(DEFAULT_SHAPES)
    chosen = choose("--spectrum", spectra, SPECTRA)
    ordered = sorted(counts, key=lambda shape: (max(shape) * min(shape) ** 2, shape))
    return tuple(Case(shape, spectrum, counts[shape]) for shape in ordered for spectrum in chosen)


def parse_shape(text: str) -> tuple[int, int]:
    """(4096, 1024) from "4096x1024".

    Raises:
        UsageError: it is no shape, or a side is shorter than LEAST_SIDE.
    """
    match = _SHAPE.fullmatch(text.strip())
    if match is None or min(int(match[1]), int(match[2])) < LEAST_SIDE:
        raise UsageError(
            f"--shape {shown(text)} is not understood: "
            f"write ROWSxCOLUMNS, both at least {LEAST_SIDE}, such as 4096x1024"
        )
    return int(match[1]), int(match[2])


def choose(option: str, words: Sequence[str], known: Sequence[Word]) -> tuple[Word, ...]:
    """The chosen words, commas split and repeats dropped; all that are known if none is chosen.

    Raises:
        UsageError: a word is not known.
    """
    offered: dict[str, Word] = {word: word for word in known}
    chosen = list(dict.fromkeys(part.strip() for word in words for part in word.split(",")))
    for word in chosen:
        if word not in offered:
            raise UsageError(f"{option} {shown(word)}: expected one of {', '.join(known)}")
    return tuple(offered[word] for word in chosen) or tuple(known)


def _checkpoint_shapes(base: str, ft: str | None) -> Counter[tuple[int, int]]:
    """How many matrices of each shape a repair of the pair would decompose, or one checkpoint holds."""
    first = open_checkpoint(base, side="BASE" if ft is not None else "checkpoint")
    if ft is None:
        entries = [entry for _, entry in first.tensors.values() if entry.dtype in FLOATS and len(entry.shape) == 2]
    else:
        pairings = pair(first, open_checkpoint(ft, side="FT"), Selection())
        entries = [one.ft.entry for one in pairings if one.intent == "repair" and one.ft is not None]
    found = Counter((e.shape[0], e.shape[1]) for e in entries if min(e.shape) >= LEAST_SIDE)
    if not found:
        holder = f"{shown(base)} has" if ft is None else f"a repair of {shown(ft)} against {shown(base)} computes"
        raise InputError(f"{holder} no matrix with sides of {LEAST_SIDE} or more: name shapes with --shape")
    return found
