"""Work on large matrices in two fixed halves, so that a thread with nothing to do can take one of them.

Cut by shape alone: the numbers are the same whether one thread does both or two do one each.
"""

from __future__ import annotations

from collections.abc import Callable

LEAST_COLUMNS = 2048
"""Short side from which work is cut; below, matrices are many, and every thread has its own."""

Work = Callable[[], object]
Both = Callable[[Work, Work], None]
"""Does two pieces of work that touch nothing in common; returns when both are done."""


def in_turn(first: Work, second: Work) -> None:
    """One after the other."""
    first()
    second()


def is_cut(cols: int) -> bool:
    """Whether a matrix with so many columns on its short side is large enough."""
    return cols >= LEAST_COLUMNS


def middle(length: int) -> int:
    """Where to cut: at a multiple of 64, so that both halves keep whole cache lines."""
    return length // 2 // 64 * 64


def in_halves(work: Callable[[slice], object], length: int, cols: int, both: Both) -> None:
    """Work on all of `length` rows, in two halves if the matrix, `cols` on its short side, is large."""
    cut = middle(length) if is_cut(cols) else 0
    if cut == 0:
        work(slice(0, length))
        return
    both(lambda: work(slice(0, cut)), lambda: work(slice(cut, length)))
