"""Whether stored floating-point numbers are all finite, found on their bits: no conversion, no copy of a tensor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from streamrepair.checkpoint import osfile
from streamrepair.checkpoint.headers import TensorEntry
from streamrepair.engine.memory import PIECE_BYTES

_FLOATS: dict[str, tuple[type[np.unsignedinteger], type[np.signedinteger], int]] = {
    "BF16": (np.uint16, np.int16, 0x7F80),
    "F16": (np.uint16, np.int16, 0x7C00),
    "F32": (np.uint32, np.int32, 0x7F800000),
    "F64": (np.uint64, np.int64, 0x7FF0000000000000),
}
"""dtype → integers of its width, and infinity's bits: what is not below them, sign apart, is not finite."""


def first_nonfinite(data: memoryview, dtype: str) -> int | None:
    """Index of the first NaN or infinity among stored values, or None; None too for dtypes that are no plain floats."""
    if dtype not in _FLOATS or not data:
        return None
    unsigned, signed, infinity = _FLOATS[dtype]
    values: NDArray[np.uint64] = np.frombuffer(data, unsigned)  # of whichever width: the annotation is the widest
    sign = 1 << (8 * values.itemsize - 1)
    # Two maxima, no temporary: by their sign bit negative numbers are the least of one view, the greatest of the other.
    if int(values.view(signed).max()) < infinity and int(values.max()) < sign + infinity:
        return None
    return int(np.argmax((values & unsigned(sign - 1)) >= infinity))


def search(read: Callable[[int, memoryview], None], entry: TensorEntry, check_stop: Callable[[], None]) -> int | None:
    """Index of the first element of a tensor on disk that is not finite, or None; other dtypes are not read.

    Args:
        read: fills a buffer from an offset in the tensor. check_stop: raises to abandon the search.
    """
    if entry.dtype not in _FLOATS or entry.numel == 0:
        return None
    buffer = memoryview(bytearray(min(PIECE_BYTES, entry.nbytes)))
    for offset, length in osfile.chunks(entry.nbytes, PIECE_BYTES):
        check_stop()
        read(offset, buffer[:length])
        index = first_nonfinite(buffer[:length], entry.dtype)
        if index is not None:
            return offset // entry.item_bytes + index
    return None


def is_searched(entry: TensorEntry) -> bool:
    """Whether `search` reads a tensor of that dtype."""
    return entry.dtype in _FLOATS
