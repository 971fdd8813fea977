"""A delta of exactly low rank is told from one with noise, without a full SVD, and never the other way round."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from streamrepair.decompose import full, ladder, row_space
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.truncation import NonFiniteDeltaError
from streamrepair.errors import NumericalError
from streamrepair.spectral.threshold import HardThreshold
from tests.decompose.sources import ArraySource, from_delta

RULE = HardThreshold()


def _low_rank(shape: tuple[int, int], rank: int, seed: int = 0) -> NDArray[np.float64]:
    """Whole numbers, so that no rounding makes noise of them."""
    rng = np.random.default_rng(seed)
    return rng.integers(-9, 9, (shape[0], rank)).astype(float) @ rng.integers(-9, 9, (rank, shape[1])).astype(float)


@pytest.mark.parametrize("shape", [(300, 300), (2500, 150), (150, 2500)])
@pytest.mark.parametrize("rank", [1, 4, 60, 75])
def test_low_rank_is_proven_and_the_norm_is_right(shape: tuple[int, int], rank: int) -> None:
    """75 of 150 is half: the lower median is the 75th value from below, and zero."""
    delta = _low_rank(shape, rank)
    truncation = row_space.truncate(from_delta(delta), RULE, thorough=True)
    assert truncation.noise_free
    assert truncation.backend == "row-space"
    assert truncation.frob_delta_in == pytest.approx(float(np.linalg.norm(delta)), rel=1e-12)


@pytest.mark.parametrize("size", [1e190, 1e-190])
def test_no_square_has_to_be_a_number(size: float) -> None:
    delta = size * _low_rank((200, 90), 3)
    truncation = row_space.truncate(from_delta(delta), RULE, thorough=True)
    assert truncation.noise_free
    assert truncation.frob_delta_in == pytest.approx(size * float(np.linalg.norm(delta / size)), rel=1e-12)


@pytest.mark.parametrize("rank", [76, 110, 150])
def test_a_rank_above_half_is_not_taken_for_low(rank: int) -> None:
    with pytest.raises(NumericalError, match="a basis of 75 directions leaves"):
        row_space.truncate(from_delta(_low_rank((400, 150), rank)), RULE, thorough=True)


@pytest.mark.parametrize("depth", [1e-10, 1e-11, 1e-12])
def test_noise_far_below_the_signal_is_noise_all_the_same(depth: float) -> None:
    """Whatever this rung and the reference say of a spectrum, they say the same."""
    noise = np.random.default_rng(1).standard_normal((200, 100))
    signal = _low_rank((200, 100), 3)
    source = from_delta(signal / np.linalg.norm(signal, 2) + depth * noise / np.linalg.norm(noise, 2))
    assert not full.truncate(source, RULE, arithmetic=HostArithmetic()).noise_free
    with pytest.raises(NumericalError):
        row_space.truncate(source, RULE, thorough=True)


def test_the_ladder_needs_no_room_for_the_reference_to_settle_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("full was run")

    monkeypatch.setattr(full, "truncate", refuse)
    for fits in (True, False):
        source = from_delta(_low_rank((700, 400), 150), "F32")
        truncation = ladder.decompose(source, RULE, arithmetic=HostArithmetic(), backend="auto", full_fits=fits)
        assert (truncation.noise_free, truncation.backend) == (True, "row-space")
        assert [reason.partition(":")[0] for reason in truncation.climbed][-3:] == ["gram-float64", "rows", "deflated"]


def test_what_is_not_finite_is_named_so() -> None:
    delta = _low_rank((200, 90), 3)
    delta[150, 3] = np.inf
    with pytest.raises(NonFiniteDeltaError), np.errstate(invalid="ignore"):
        row_space.truncate(from_delta(delta), RULE, thorough=True)


def test_the_same_matrix_gives_the_same_answer_in_any_panels() -> None:
    delta = _low_rank((5000, 40), 7)
    norms = {
        row_space.truncate(ArraySource(np.zeros_like(delta), delta, "F64", panels), RULE, thorough=False).frob_delta_in
        for panels in (1, 2, 3)
    }
    assert len(norms) == 1
