"""Which backends are worth trying for a matrix, from its shape alone: results must not depend on a machine's speed."""

from __future__ import annotations

from typing import Literal

Backend = Literal["auto", "full", "gram", "randomized"]
Estimate = Literal["exact", "fast"]

_KRYLOV_LEAST_SIDE: dict[tuple[Backend, Estimate], int] = {
    ("auto", "exact"): 3072,
    ("auto", "fast"): 1536,
    ("randomized", "exact"): 256,
    ("randomized", "fast"): 256,
}
"""Shortest side from which block Krylov is tried; below, the reduction to tridiagonal form is as fast in any case."""


def tries_krylov(backend: Backend, estimate: Estimate, cols: int) -> bool:
    """Whether a matrix with `cols` columns on its short side goes to `randomized` before `gram`."""
    return cols >= _KRYLOV_LEAST_SIDE.get((backend, estimate), cols + 1)
