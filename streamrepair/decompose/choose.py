"""Which backends are worth trying for a matrix: by predicted seconds, at the shipped speeds.

Not at those that were measured: the bytes of a result must not depend on the machine that was calibrated, or on the
day.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

from streamrepair.decompose import speed

Backend = Literal["auto", "full", "gram", "randomized"]
Estimate = Literal["exact", "fast"]

MOST_KEPT = 0.08
"""Share of the rank up to which block Krylov has room for its basis."""
_LEAST_KEPT = 0.02
"""Where it would not be quicker for so few it is not tried."""
_LEAST_COLUMNS = 256
"""Below this a basis is no smaller than the matrix."""
_LEAST_FAST_COLUMNS = 512
"""Likewise: the start block is the same for all matrices of that n, and one that is unlucky with diagonal deltas would
have its interval for τ miss with most of them."""
_IN_VAIN = 0.25
"""By how much it has to be quicker: most matrices keep more, and to find that out costs 0.2 of 5 seconds at 4096²."""

MOST_BATCHED_COLUMNS = 1024
"""Longest short side of matrices that a GPU decides in batches: above this one keeps it busy alone."""


@cache
def krylov_share(backend: Backend, estimate: Estimate, cols: int) -> float:
    """Share of the rank up to which `randomized` does a matrix with `cols` columns on its short side; 0: not tried."""
    least = _LEAST_COLUMNS if estimate == "exact" else _LEAST_FAST_COLUMNS
    if backend not in ("auto", "randomized") or cols < least:
        return 0.0
    if backend == "randomized":
        return MOST_KEPT
    method = "fast" if estimate == "fast" else "randomized"
    shares = [percent / 200 for percent in range(1, round(200 * MOST_KEPT) + 1)]
    share = max((share for share in shares if _quicker(method, cols, share)), default=0.0)
    return share if share >= _LEAST_KEPT else 0.0


def _quicker(method: str, cols: int, share: float) -> bool:
    # Of a square matrix: what follows from the other side is the same for both.
    krylov, reduction = (speed.predicted(cols, cols, name, speed.CPU, share).factor_s for name in (method, "gram"))
    return (1.0 + _IN_VAIN) * krylov <= reduction
