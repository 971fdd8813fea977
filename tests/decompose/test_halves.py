"""Large matrices in two halves: the same numbers whoever does them, and those of one piece to rounding."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from streamrepair.decompose import halves, householder, ladder
from streamrepair.decompose.halves import Work
from streamrepair.decompose.host import HostArithmetic
from streamrepair.spectral.threshold import HardThreshold
from tests.decompose.sources import ArraySource, fine_tuned, low_rank_plus_noise, with_spectrum

RULE = HardThreshold()


def _at_once(first: Work, second: Work) -> None:
    thread = threading.Thread(target=second)
    thread.start()
    first()
    thread.join()


def _merged(source: ArraySource, arithmetic: HostArithmetic, out_dtype: str) -> tuple[np.ndarray, ...]:
    found = ladder.decompose(source, RULE, arithmetic=arithmetic, backend="gram", sharp=out_dtype == "F32")
    merger = arithmetic.merger(found.vh, out_dtype)
    blocks = [raw.copy() for _, raw in merger.merged(source.panels())]
    return found.values, np.asarray(found.vh), np.concatenate(blocks, axis=int(source.wide)), np.array(merger.lost())


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize(("m", "n"), [(333, 333), (1511, 300)])
def test_numbers_do_not_depend_on_who_does_a_half(
    m: int, n: int, dtype: str, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fine_tuned(low_rank_plus_noise(m, n, 90), dtype)
    source = source.transposed() if turned else source
    whole = _merged(source, HostArithmetic(), dtype)
    monkeypatch.setattr(halves, "LEAST_COLUMNS", 64)
    monkeypatch.setattr(householder, "_LEAST_COLUMNS", 64)
    monkeypatch.setattr(householder, "_HALVED_VECTORS", 64)
    in_turn, at_once = (_merged(source, HostArithmetic(both=both), dtype) for both in (halves.in_turn, _at_once))
    for one, other in zip(in_turn, at_once, strict=True):
        np.testing.assert_array_equal(one, other)
    # Values are roots of eigenvalues, whose error is one share of the largest: a small one's root may be all error.
    np.testing.assert_allclose(in_turn[0] ** 2, whole[0] ** 2, rtol=0, atol=3e-6 * whole[0][-1] ** 2)
    differing = np.count_nonzero(in_turn[2] != whole[2])
    if dtype == "BF16":
        assert differing <= 1e-3 * whole[2].size
    assert in_turn[3] == pytest.approx(whole[3], rel=1e-3)


@pytest.mark.parametrize("turned", [False, True])
def test_deltas_are_halved_by_the_matrix_however_few_rows_a_block_has(
    turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past 4096 columns a block has fewer than `LEAST_COLUMNS` rows."""
    monkeypatch.setattr(halves, "LEAST_COLUMNS", 290)
    cut: list[int] = []

    def counting(first: Work, second: Work) -> None:
        cut.append(1)
        halves.in_turn(first, second)

    source = fine_tuned(low_rank_plus_noise(2048 + 200, 300, 3), "F32")  # two blocks
    source = source.transposed() if turned else source
    HostArithmetic(both=counting).inner_products(source, np.ones((1, 300)), "float64")
    assert len(cut) == 2


def test_a_half_that_is_not_done_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks see a Gram matrix of which a corner is missing."""
    monkeypatch.setattr(halves, "LEAST_COLUMNS", 64)
    calls: list[int] = []

    def forgetful(first: Work, second: Work) -> None:
        first()
        calls.append(1)
        if len(calls) != 2:  # the first is Δ's, the second G's
            second()

    source = fine_tuned(with_spectrum(np.geomspace(0.1, 9.0, 300), 300), "BF16")
    found = ladder.decompose(source, RULE, arithmetic=HostArithmetic(both=forgetful), backend="gram")
    assert found.backend != "gram-float32"
    assert found.climbed
