"""Which backends are worth trying for a matrix: by predicted seconds, at the shipped speeds.

Not at those that were measured: the bytes of a result must not depend on the machine that was calibrated, or on the
day.
"""

from __future__ import annotations

from collections.abc import Callable
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
FEW = 0.03
"""Share of the rank that is kept where few are."""
_MOST_HELD_ROWS = 4
"""Rows per column of a delta that is held whole: in float32 16n² bytes, where G and its copy take 12n²."""
_LEAST_HELD = 0.04
"""Where fewer may be kept no delta is held: that more are is told late, when the first block's count was too low."""
_LESS = 0.15
"""By how much products with Δ have to be quicker than those with G, if few values are kept."""

LEFT_AS_A_MATTER_OF_COURSE = ("gram-float32", "randomized", "rows", "deflated", "row-space")
"""How the names of ways begin that `ladder` leaves for a better one though nothing failed."""

MOST_BATCHED_COLUMNS = 1024
"""Longest short side of matrices that a GPU decides in batches: above this one keeps it busy alone."""


_SHARES = tuple(percent / 200 for percent in range(1, round(200 * MOST_KEPT) + 1))


@cache
def krylov_share(backend: Backend, estimate: Estimate, cols: int) -> float:
    """Share of the rank up to which `randomized` does a matrix with `cols` columns on its short side; 0: not tried."""
    least = _LEAST_COLUMNS if estimate == "exact" else _LEAST_FAST_COLUMNS
    if backend not in ("auto", "randomized") or cols < least:
        return 0.0
    if backend == "randomized":
        return MOST_KEPT
    method = "fast" if estimate == "fast" else "randomized"

    def quicker(share: float) -> bool:
        # Of a square matrix: what follows from the other side is the same for both.
        krylov, reduction = (speed.predicted(cols, cols, name, speed.CPU, share).factor_s for name in (method, "gram"))
        return (1.0 + _IN_VAIN) * krylov <= reduction

    return _largest(quicker)


@cache
def held_share(backend: Backend, estimate: Estimate, rows: int, cols: int) -> float:
    """The same for `matrix_free`, by a delta that is held in float32 in place of a Gram matrix."""
    if backend not in ("auto", "randomized") or estimate == "exact" or cols < _LEAST_FAST_COLUMNS:
        return 0.0

    def seconds(method: str, share: float) -> float:
        return speed.predicted(rows, cols, method, speed.CPU, share).total_s

    if rows > _MOST_HELD_ROWS * cols or (1.0 + _LESS) * seconds("held", FEW) > seconds("fast", FEW):
        return 0.0
    if backend == "randomized":
        return MOST_KEPT
    return _largest(lambda share: (1.0 + _IN_VAIN) * seconds("held", share) <= seconds("gram", share), _LEAST_HELD)


def _largest(quicker: Callable[[float], bool], least: float = _LEAST_KEPT) -> float:
    """The largest share at which a method is quicker; 0 if it is less than is worth trying for."""
    share = max((share for share in _SHARES if quicker(share)), default=0.0)
    return share if share >= least else 0.0
