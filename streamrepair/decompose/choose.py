"""Which backends are worth trying for a matrix, from its shape alone: results must not depend on a machine's speed."""

from __future__ import annotations

from typing import Literal

Backend = Literal["auto", "full", "gram", "randomized"]
Estimate = Literal["exact", "fast"]

MOST_KEPT = 0.08
"""Share of the rank above which block Krylov is slower than the reduction to tridiagonal form in any case."""
_LEAST_SIDE: dict[tuple[Backend, Estimate], int] = {
    ("auto", "exact"): 4096,
    ("auto", "fast"): 1536,
    ("randomized", "exact"): 256,
    ("randomized", "fast"): 256,
}
"""Shortest side from which block Krylov is tried; below, the reduction is as fast in any case."""
_SHARE_PER_COLUMN = 1e-5
"""With the exact median: it pays up to 4% at 4096 columns, where the reduction is held up by memory up to more."""

MOST_BATCHED_COLUMNS = 1024
"""Longest short side of matrices that a GPU decides in batches: above this one keeps it busy alone."""


def krylov_share(backend: Backend, estimate: Estimate, cols: int) -> float:
    """Share of the rank up to which `randomized` does a matrix with `cols` columns on its short side; 0: not tried."""
    if cols < _LEAST_SIDE.get((backend, estimate), cols + 1):
        return 0.0
    if backend == "auto" and estimate == "exact":
        return min(MOST_KEPT, _SHARE_PER_COLUMN * cols)
    return MOST_KEPT
