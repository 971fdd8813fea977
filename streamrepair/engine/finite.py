"""Whether stored floating-point numbers are all finite, found on their bits: no conversion, no copy of a tensor."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_EXPONENT: dict[
    str, tuple[type[np.unsignedinteger], int]
] = {  # dtype → (integer view, twice the smallest non-finite magnitude)
    "BF16": (np.uint16, 0xFF00),
    "F16": (np.uint16, 0xF800),
    "F32": (np.uint32, 0xFF000000),
    "F64": (np.uint64, 0xFFE0000000000000),
}
_PIECE = 1 << 16


def first_nonfinite(data: memoryview, dtype: str) -> int | None:
    """Index of the first NaN or infinity among stored values, or None; None too for dtypes that are no plain floats."""
    if dtype not in _EXPONENT:
        return None
    kind, limit = _EXPONENT[dtype]
    values: NDArray[np.uint64] = np.frombuffer(data, kind)  # of whichever width: the annotation is the widest
    doubled = np.empty_like(values[:_PIECE])
    for start in range(0, len(values), _PIECE):
        piece = values[start : start + _PIECE]
        # Shifting the sign out leaves the magnitude doubled: one comparison of the maximum decides a piece.
        magnitude = np.left_shift(piece, values.dtype.type(1), out=doubled[: len(piece)])
        if int(magnitude.max()) >= limit:
            return start + int(np.argmax(magnitude >= limit))
    return None
