"""Lanes: one per worker of a run, each the device that it works on ("cpu" or "cuda:0")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Place = Literal["cpu", "cuda"]
"""The kind of device that a unit is for: any of its workers may take it."""
PLACES: tuple[Place, ...] = ("cuda", "cpu")


def workers_at(lanes: Sequence[str], place: str) -> int:
    """How many workers take the units of a place ("cpu" or "cuda")."""
    return sum((lane == "cpu") == (place == "cpu") for lane in lanes)


def lane_names(lanes: Sequence[str]) -> list[str]:
    """What each worker is called: a GPU by its name, the CPU's by number."""
    return [f"cpu {lanes[:i].count('cpu')}" if lane == "cpu" else lane for i, lane in enumerate(lanes)]
