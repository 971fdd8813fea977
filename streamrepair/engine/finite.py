"""Whether stored floating-point numbers are all finite, found on their bits: no conversion, no copy of a tensor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from streamrepair.checkpoint import osfile
from streamrepair.checkpoint.headers import TensorEntry
from streamrepair.engine.memory import COPY_BYTES

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


def search(read: Callable[[int, memoryview], None], entry: TensorEntry, check_stop: Callable[[], None]) -> int | None:
    """Index of the first element of a tensor on disk that is not finite, or None; other dtypes are not read.

    Args:
        read: fills a buffer from an offset in the tensor. check_stop: raises to abandon the search.
    """
    if entry.dtype not in _EXPONENT or entry.numel == 0:
        return None
    buffer = memoryview(bytearray(min(COPY_BYTES, entry.nbytes)))
    for offset, length in osfile.chunks(entry.nbytes, COPY_BYTES):
        check_stop()
        read(offset, buffer[:length])
        index = first_nonfinite(buffer[:length], entry.dtype)
        if index is not None:
            return offset // (entry.nbytes // entry.numel) + index
    return None


def is_searched(entry: TensorEntry) -> bool:
    """Whether `search` reads a tensor of that dtype."""
    return entry.dtype in _EXPONENT
