"""The search for NaN and infinity on bits, against NumPy's own answer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from streamrepair.engine.finite import first_nonfinite

WIDTHS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32, "F64": np.uint64}


def _floats(bits: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype])


@pytest.mark.parametrize("dtype", WIDTHS)
@given(data=st.data())
def test_the_first_that_is_not_finite_is_found(dtype: str, data: st.DataObject) -> None:
    """Any bits at all, with those next to infinity among them, on both sides of zero."""
    kind = WIDTHS[dtype]
    infinity = _bits(np.inf, dtype)
    sign = 1 << (8 * kind().itemsize - 1)
    edges = [s + infinity + step for s in (0, sign) for step in (-1, 0, 1)]
    elements = st.sampled_from([0, sign, 1, *edges]) | st.integers(0, 2 * sign - 1)
    bits = data.draw(arrays(kind, st.integers(1, 20), elements=elements))
    bad = np.flatnonzero(~np.isfinite(_floats(bits, dtype)))
    assert first_nonfinite(memoryview(bits.tobytes()), dtype) == (int(bad[0]) if len(bad) else None)


def _bits(value: float, dtype: str) -> int:
    if dtype == "BF16":
        return int(np.float32(value).view(np.uint32)) >> 16
    return int(np.array(value, {"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]).view(WIDTHS[dtype]))


def test_nothing_and_what_is_no_plain_float_are_not_searched() -> None:
    assert first_nonfinite(memoryview(b""), "BF16") is None
    assert first_nonfinite(memoryview(b"\xff" * 8), "F8_E4M3") is None
    assert first_nonfinite(memoryview(b"\xff" * 8), "I64") is None
