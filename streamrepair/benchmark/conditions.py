"""The conditions of a measurement: what was asked for, checked before anything is computed, and whether it fits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from streamrepair.benchmark.cases import Case, choose
from streamrepair.decompose.choose import Backend, Estimate
from streamrepair.decompose.convert import STORED_TYPE
from streamrepair.engine import budget, limits
from streamrepair.errors import BudgetError, UsageError
from streamrepair.units import format_apart

DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
"""What --dtype offers."""
BACKENDS: dict[str, tuple[Backend, Estimate]] = {
    "auto": ("auto", "exact"),
    "gram": ("gram", "exact"),
    "randomized": ("randomized", "exact"),
    "fast": ("auto", "fast"),
    "full": ("full", "exact"),
}
"""What --backend offers, and how `ladder.decompose` is told: "fast" is --noise-estimate fast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What is common to all cases."""

    backends: tuple[str, ...]
    """Of BACKENDS."""
    dtype: str
    """BF16, F16 or F32."""
    device: str
    """ "cpu" or "cuda:N"."""
    threads: int
    """Of the reference and of the check."""
    repeats: int
    check: bool
    """Whether to hold results against a float64 SVD."""


def make_conditions(
    *, backends: Sequence[str], dtype: str, device: str, threads: int | None, repeats: int, check: bool
) -> Conditions:
    """The conditions from a command's words.

    Args:
        backends: of BACKENDS; all but "auto", which is one of the others, if empty.
        dtype: of DTYPES. device: as --device.
        threads: one per processor if None, and never more than there are: OpenMP ends the process over a million.

    Raises:
        UsageError: a word is not known, a number is not positive, there is no such device.
    """
    for option, number in (("--threads", threads), ("--repeats", repeats)):
        if number is not None and number < 1:
            raise UsageError(f"{option} is {number}, expected at least 1")
    chosen = choose("--backend", backends, list(BACKENDS)) if backends else list(BACKENDS)[1:]
    (stored,) = choose("--dtype", [dtype], list(DTYPES))
    return Conditions(
        backends=tuple(chosen),
        dtype=DTYPES[stored],
        device=budget.resolve_devices(device)[0],
        threads=min(threads or limits.default_workers(), os.cpu_count() or 1),
        repeats=repeats,
        check=check,
    )


def refuse_too_large(cases: Sequence[Case], conditions: Conditions) -> None:
    """Refuse cases that would not fit.

    Raises:
        BudgetError: the first such case, and what it needs.
    """
    free_bytes = limits.default_ram_bytes()
    for case in cases:
        m, n = max(case.shape), min(case.shape)
        # Base, FT and three outputs as stored; Δ, U, Δ* and what is held against it in float64; n × n of the SVDs.
        stored_bytes = 5 * np.dtype(STORED_TYPE[conditions.dtype]).itemsize * m * n
        least_bytes = stored_bytes + 20 * m * n + 80 * n * n
        needed_bytes = least_bytes + (20 * m * n if conditions.check else 0)
        if needed_bytes > free_bytes:
            remedy = "leave it out, or add --no-check" if least_bytes <= free_bytes else "leave it out"
            needed, free = format_apart(needed_bytes, free_bytes)
            raise BudgetError(
                f"--shape {case.shape[0]}x{case.shape[1]} needs about {needed} of memory, {free} can be had: {remedy}"
            )
