"""The fixed grid of blocks that sums are formed in; no torch, so that a plan can be made without loading it."""

from __future__ import annotations

_BLOCK_ELEMENTS = 1 << 23
_LEAST_ROWS, _MOST_ROWS = 256, 2048


def block_rows(cols: int) -> int:
    """Rows of a block of a tall matrix with `cols` columns: set by the shape, so that budgets change no numbers."""
    rows = 1 << max(0, (_BLOCK_ELEMENTS // max(1, cols)).bit_length() - 1)
    return min(_MOST_ROWS, max(_LEAST_ROWS, rows))
