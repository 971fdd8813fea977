"""Stored floating-point numbers to and from float32 and float64, in NumPy.

bfloat16 is the upper half of a float32, so widening is a shift and rounding an integer addition; that keeps torch, its
1.4 s of import and 170 MB, out of runs on the CPU. Pieces are sized for the second-level cache, since every step is a
pass over memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Singles = NDArray[np.float32]
Raw = NDArray[Any]
"""Numbers as stored: uint16 bits for BF16, the NumPy type otherwise."""
Real = NDArray[Any]
"""float32 or float64 numbers; which one is the caller's choice, made where the array is."""
RealType = type[np.float32] | type[np.float64]

STORED_TYPE: dict[str, type[np.generic]] = {
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
}
"""How each dtype's bytes are viewed; only BF16's are not numbers to NumPy."""

_PIECE_ELEMENTS = 1 << 16
_HALF_BITS = np.uint32(16)
_LEAST_SQUARES = 1e-30
"""Of a piece in float32: single squares below 1e-38 lose digits, 1e5 of them come to less than this."""


def merge_type(out_dtype: str) -> RealType:
    """What W_base + Δ* is formed in before it is rounded to a stored dtype."""
    return np.float32 if out_dtype in ("BF16", "F16") else np.float64


def power_of_two(value: float) -> float:
    """The largest one that is no larger than a positive value: a scale by it rounds nothing."""
    return float(2.0 ** np.floor(np.log2(value)))


def widen(raw: Raw, dtype: str, out: Real) -> None:
    """out ← the numbers stored in `raw`, exactly (to float64 all are exact, to float32 all but F64's).

    What is not finite passes without a warning.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        for piece in _pieces(out):
            _widen(raw[piece], dtype, out[piece])


def _widen(raw: Raw, dtype: str, out: Real) -> None:
    """`widen` for a piece."""
    if dtype == "BF16" and out.dtype == np.float32:
        bits = out.view(np.uint32)
        bits[...] = raw  # an eighth quicker than a shift that casts
        np.left_shift(bits, _HALF_BITS, out=bits)
    elif dtype == "BF16":
        out[...] = np.left_shift(raw, _HALF_BITS, dtype=np.uint32).view(np.float32)
    else:
        out[...] = raw


def difference(ft: Raw, ft_dtype: str, base: Raw, base_dtype: str, out: Real) -> None:
    """out ← ft − base, subtracted in the precision of `out`, or in float64 if either is stored so.

    float32 holds every bfloat16, float16 and float32 value, so only the subtraction rounds; between values within a
    factor of two it does not (Sterbenz). A float64 weight rounded to float32 first would bury a small delta.
    What is not finite passes without a warning: that is for the reader of the delta to meet.
    """
    work = np.float64 if "F64" in (ft_dtype, base_dtype) else out.dtype
    subtrahend = np.empty(out[: _piece_rows(out)].shape, work)
    minuend = subtrahend[:0] if out.dtype == work else np.empty_like(subtrahend)
    with np.errstate(over="ignore", invalid="ignore"):
        for piece in _pieces(out):
            target = out[piece]
            left = target if target.dtype == work else minuend[: len(target)]
            right = subtrahend[: len(target)]
            _widen(ft[piece], ft_dtype, left)
            _widen(base[piece], base_dtype, right)
            np.subtract(left, right, out=target, casting="same_kind")


def narrow(values: Real, dtype: str, out: Raw) -> float:
    """out ← `values` rounded once, to nearest even, to a stored dtype; returns the sum of squared rounding errors.

    Overflow shows as an infinite sum. `values` are overwritten.
    """
    lost = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for piece in _pieces(out):
            part = values[piece]
            if dtype == "BF16" and part.dtype == np.float32:
                rounded = _rounded_to_bfloat16(part, out[piece])
            else:
                out[piece] = part
                rounded = out[piece].astype(values.dtype)
            np.subtract(part, rounded, out=part)
            lost += _square_sum(part.reshape(-1))
    return lost


def _square_sum(errors: Real) -> float:
    """Sum of squares; in float64 where float32 has no room for them (errors above 1e19 or all below 1e-15)."""
    total = float(np.dot(errors, errors))
    if errors.dtype == np.float32 and not _LEAST_SQUARES < total < np.inf:
        total = float(np.square(errors, dtype=np.float64).sum())
    return total


def _rounded_to_bfloat16(values: Real, out: Raw) -> Real:
    """out ← the upper halves of `values` rounded to nearest even; returns them as float32."""
    bits = values.view(np.uint32)
    rounded = np.right_shift(bits, _HALF_BITS)
    # Half of the last place, less one where the upper half is even: a tie then stays below the carry.
    np.bitwise_and(rounded, np.uint32(1), out=rounded)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    np.right_shift(rounded, _HALF_BITS, out=out, casting="unsafe")
    rounded &= np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def _pieces(array: Raw) -> Iterator[slice]:
    """Slices of whole rows of about _PIECE_ELEMENTS elements."""
    rows = _piece_rows(array)
    for start in range(0, len(array), rows):
        yield slice(start, start + rows)


def _piece_rows(array: Raw) -> int:
    return max(1, _PIECE_ELEMENTS // max(1, array[:1].size))
