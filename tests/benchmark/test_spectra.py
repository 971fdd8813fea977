"""The synthetic deltas against a float64 SVD of them."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from streamrepair.benchmark.sources import MemorySource
from streamrepair.benchmark.spectra import DELTA_STD, W_STD, Spectrum, pair
from streamrepair.decompose.convert import STORED_TYPE, widen
from streamrepair.decompose.operator import block_rows, blocks
from streamrepair.spectral.threshold import HardThreshold

SHAPES = [(64, 64), (256, 256), (700, 128), (128, 700), (2048, 96)]


def _kept_share(source: MemorySource) -> float:
    s = scipy.linalg.svdvals(source.delta())
    return HardThreshold().estimate(s, source.rows, source.cols).rank_kept / source.cols


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gapped_keeps_its_low_rank(shape: tuple[int, int], dtype: str) -> None:
    n = min(shape)
    assert _kept_share(pair(shape, "gapped", dtype)) == max(1, round(0.03 * n)) / n


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_heavy_keeps_a_tenth_to_three_tenths(shape: tuple[int, int], dtype: str) -> None:
    assert 0.10 <= _kept_share(pair(shape, "heavy", dtype)) <= 0.30


def test_heavy_runs_through_the_threshold() -> None:
    """No gap: several values lie within a tenth of τ, where a gapped spectrum has none."""
    near = {}
    spectra: tuple[Spectrum, ...] = ("gapped", "heavy")
    for spectrum in spectra:
        source = pair((512, 512), spectrum, "BF16")
        s = scipy.linalg.svdvals(source.delta())
        tau = HardThreshold().estimate(s, 512, 512).tau
        near[spectrum] = int(np.count_nonzero(np.abs(s / tau - 1.0) < 0.1))
    assert near["gapped"] == 0
    assert near["heavy"] >= 5


@pytest.mark.parametrize("spectrum", ["gapped", "heavy"])
def test_sizes_are_those_of_a_fine_tune(spectrum: Spectrum) -> None:
    source = pair((300, 200), spectrum, "F32")
    base = np.empty((300, 200))
    widen(source.base, "F32", base)
    assert np.isclose(np.sqrt(np.square(base).mean()), W_STD, rtol=0.02)
    assert np.isclose(np.sqrt(np.square(source.delta()).mean()), DELTA_STD, rtol=0.2)


def test_the_same_numbers_on_every_call_and_others_for_another_spectrum() -> None:
    first, again = pair((96, 64), "heavy", "BF16"), pair((96, 64), "heavy", "BF16")
    assert first.ft.tobytes() == again.ft.tobytes()
    assert first.base.tobytes() != pair((96, 64), "gapped", "BF16").base.tobytes()


@pytest.mark.parametrize(("dtype", "spectrum"), [("BF16", "gapped"), ("F16", "heavy"), ("F32", "heavy")])
def test_a_wide_pair_is_stored_as_asked_and_streams_upright(dtype: str, spectrum: Spectrum) -> None:
    source = pair((64, 5000), spectrum, dtype)
    assert source.ft.shape == source.base.shape == (64, 5000)
    assert source.ft.dtype == STORED_TYPE[dtype]
    assert (source.rows, source.cols, source.wide) == (5000, 64, True)
    found = list(blocks(source))
    assert len(found) == -(-5000 // block_rows(64)) > 1
    assert sum(block.rows for block in found) == 5000
    assert source.delta().shape == (5000, 64)
