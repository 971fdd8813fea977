"""What is written is held against a few of its rows, computed again: faults of a merge show, rounding does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamrepair.decompose import lapack
from streamrepair.decompose.convert import Real
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.operator import Panel, block_rows
from streamrepair.decompose.spot_check import STRIDE, SpotCheck, WrongMergeError, sampled
from tests.decompose.sources import ArraySource, Doubles, stored

_WIDER = {"BF16": ("F32", 24), "F16": ("F32", 24), "F32": ("F64", 53), "F64": ("F64", 53)}
"""Of an output's dtype, the inputs' and the digits of the precision that it is merged in."""
_HALVES = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}
"""Half a unit in the last place of 1."""


def _vectors(n: int, rank: int, real: type[np.float32 | np.float64], seed: int = 0) -> Real:
    q: Real = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, rank)))[0].T.astype(real)
    return q


def _pair(m: int, n: int, dtype: str, *, weights: float, delta: float, seed: int = 0) -> ArraySource:
    """Normal numbers, with outliers; weights and deltas of these sizes."""
    rng = np.random.default_rng(seed)
    base: Doubles = weights * rng.standard_normal((m, n)) * np.exp(rng.standard_normal((m, 1)))
    ft = base + delta * rng.standard_normal((m, n)) * np.exp(2 * rng.standard_normal((1, n)))
    return ArraySource(stored(base, dtype), stored(ft, dtype), dtype, panel_blocks=1 + seed % 2)


def _checked(source: ArraySource, vh: Real, out_dtype: str) -> None:
    spots = SpotCheck(vh, out_dtype)
    merger = HostArithmetic().merger(vh, out_dtype)
    for block, merged in merger.merged(spots.watched(source.panels())):
        spots.check(block, merged)
    spots.finish()


@given(
    seed=st.integers(0, 1000),
    shape=st.sampled_from([(1, 1), (7, 3), (300, 40), (2500, 30), (5000, 17)]),
    share=st.floats(0.0, 1.0),
    dtypes=st.tuples(*2 * [st.sampled_from(["BF16", "F16", "F32", "F64"])]),
    scale=st.sampled_from([1e-300, 1e-170, 1e-30, 1e-6, 1e-3, 1.0, 1e4, 1e30, 3e37]),
)
@settings(max_examples=400, deadline=None)
def test_rounding_is_no_fault(
    seed: int, shape: tuple[int, int], share: float, dtypes: tuple[str, str], scale: float
) -> None:
    """Whatever the sizes of weights and deltas, subnormal and overflowing ones included, and those with no squares."""
    (dtype, out_dtype), delta = dtypes, scale * 10.0 ** (seed % 7 - 4)
    real = np.float32 if seed % 2 and out_dtype in ("BF16", "F16") else np.float64
    with np.errstate(over="ignore", invalid="ignore"):
        source = _pair(*shape, dtype, weights=scale, delta=delta, seed=seed)
        source = source.transposed() if seed % 3 == 0 else source
        if np.isfinite(source.delta()).all():
            _checked(source, _vectors(shape[1], round(share * shape[1]), real), out_dtype)


@pytest.mark.parametrize("out_dtype", ["BF16", "F16", "F32", "F64"])
def test_a_sum_that_is_rounded_in_many_parts_is_no_fault(out_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a BLAS does it with many vectors: W_base, far larger than Δ, is rounded once for each part of them."""
    rng, shape, (wider, digits) = np.random.default_rng(0), (2000, 256), _WIDER[out_dtype]
    real = np.float32 if out_dtype in ("BF16", "F16") else np.float64
    vh = _vectors(256, 240, real)
    delta: Doubles = 2.0**-digits * 1e3 * rng.standard_normal(shape)
    # Halfway between two results, where there are any, and these as far apart as they can be.
    exact = 1.0 + _HALVES.get(out_dtype, 0.5) + 2.0**-digits * rng.uniform(-8.0, 8.0, shape)
    base = stored(exact - delta @ vh.T @ vh, wider)
    source, original = ArraySource(base, stored(base + delta, wider), wider), lapack.add_product

    def in_parts(left: Real, right: Real, out: Real) -> None:
        for start in range(0, len(right), 6):
            original(left[:, start : start + 6], right[start : start + 6], out)

    monkeypatch.setattr(lapack, "add_product", in_parts)
    _checked(source, vh, out_dtype)


@pytest.mark.parametrize("out_dtype", ["BF16", "F32"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "fault", ["nothing added", "a stretch missing", "twice", "nan", "another block's", "truncated"]
)
def test_a_merge_that_was_not_carried_out_is_caught(
    fault: str, turned: bool, out_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _pair(5000, 60, out_dtype, weights=1e-2, delta=1e-2)
    source = source.transposed() if turned else source
    original, calls = lapack.add_product, list[int]()

    def wrong(left: Real, right: Real, out: Real, *, alpha: float = 1.0, beta: float = 1.0) -> None:
        calls.append(1)
        before = out.copy()
        original(left, right, out, alpha=alpha, beta=beta)
        if fault == "nothing added":
            out[...] = before
        elif fault == "a stretch missing" and len(calls) == 2:
            part = (slice(None), slice(5 * STRIDE, 6 * STRIDE)) if turned else (slice(5 * STRIDE, 6 * STRIDE),)
            out[part] = before[part]
        elif fault == "twice":
            original(left, right, out, alpha=alpha, beta=1.0)
        elif fault == "nan":
            out[3:, 5:] = np.nan
        elif fault == "another block's":
            out[...] = out[:, ::-1] if turned else out[::-1]
        elif fault == "truncated":
            out *= 1.0 - 2.0**-6

    vh = _vectors(60, 20, np.float32 if out_dtype == "BF16" else np.float64)
    _checked(source, vh, out_dtype)
    monkeypatch.setattr(lapack, "add_product", wrong)
    with pytest.raises(WrongMergeError, match="in row"):
        _checked(source, vh, out_dtype)


@pytest.mark.parametrize("missing", [0, 1, 2])
@pytest.mark.parametrize("turned", [False, True])
def test_a_block_that_is_left_out_is_missed(missing: int, turned: bool) -> None:
    source, vh = _pair(5000, 40, "BF16", weights=1e-2, delta=1e-2), _vectors(40, 9, np.float32)
    spots, merger = SpotCheck(vh, "BF16"), HostArithmetic().merger(vh, "BF16")
    source = source.transposed() if turned else source
    for i, (block, merged) in enumerate(merger.merged(spots.watched(source.panels()))):
        if i != missing:
            spots.check(block, merged)
    with pytest.raises(WrongMergeError, match="no result for row"):
        spots.finish()


@pytest.mark.parametrize("spoilt", [False, True])
def test_results_may_come_late_and_in_parts(spoilt: bool) -> None:
    """As a GPU's do: their panel's memory has the next one, and blocks were cut where the device's ran out."""
    source, vh = _pair(6000, 40, "BF16", weights=1e-2, delta=1e-2), _vectors(40, 9, np.float32)
    merged = np.concatenate([raw.copy() for _, raw in HostArithmetic().merger(vh, "BF16").merged(source.panels())])
    if spoilt:
        merged[3000:] = np.roll(merged[3000:], 1, axis=0)
    memory = ArraySource(np.empty((block_rows(40), 40), np.uint16), np.empty((block_rows(40), 40), np.uint16), "BF16")

    def panels() -> Iterator[Panel]:
        for panel in source.panels():
            base, ft = memory.base[: panel.rows], memory.ft[: panel.rows]
            base[:], ft[:] = panel.base, panel.ft
            yield replace(panel, base=base, ft=ft)

    def checked() -> None:
        spots, waiting = SpotCheck(vh, "BF16"), list[Panel]()
        for panel in spots.watched(panels()):
            late, waiting = waiting, [panel.part(i, min(panel.rows, i + 700)) for i in range(0, panel.rows, 700)]
            for block in late:
                spots.check(block, merged[block.start : block.start + block.rows])
        for block in waiting:
            spots.check(block, merged[block.start : block.start + block.rows])
        spots.finish()

    if spoilt:
        with pytest.raises(WrongMergeError):
            checked()
    else:
        checked()


@given(start=st.integers(0, 40).map(lambda i: 256 * i), rows=st.integers(1, 3000))
def test_of_every_stretch_a_row_is_held_and_the_last(start: int, rows: int) -> None:
    places = sampled(start, start + rows)
    assert places[-1] == start + rows - 1
    assert set((places // STRIDE).tolist()) >= set(range(start // STRIDE, (start + rows) // STRIDE))
    assert np.all((places >= start) & (places < start + rows))
