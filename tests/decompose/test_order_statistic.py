from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamrepair.decompose.certify import probe_vectors
from streamrepair.decompose.order_statistic import locate
from streamrepair.decompose.symmetric import SymmetricPair
from streamrepair.decompose.truncation import UnresolvedError

N = 240


def _with_values(values: np.ndarray, seed: int = 0) -> SymmetricPair:
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))[0]
    return SymmetricPair((q * values) @ q.T)


@given(place=st.integers(0, N - 1), guess=st.floats(0.05, 4.0), slope=st.sampled_from([1.0, 60.0, 5000.0]))
@example(place=222, guess=0.05078125, slope=1.0)
@settings(max_examples=30, deadline=None)
def test_the_wanted_place_is_found_from_any_guess(place: int, guess: float, slope: float) -> None:
    """Also from far away and with a useless density, and at either end of the spectrum."""
    values = np.sort(np.random.default_rng(1).uniform(0.1, 4.0, N))
    found = locate(_with_values(values), place, guess, slope, tolerance=1e-7, probes=probe_vectors(N))
    assert abs(found.value - values[place]) <= found.bound + 1e-12
    assert found.bound <= 1e-7


def test_a_cluster_at_the_place_is_found_to_the_bound() -> None:
    values = np.sort(np.concatenate([np.linspace(0.1, 1, 110), np.full(20, 1.5), np.linspace(2, 4, 110)]))
    found = locate(_with_values(values), 119, 1.49, 60.0, tolerance=1e-7, probes=probe_vectors(N))
    assert abs(found.value - 1.5) <= found.bound + 1e-12


def test_a_place_that_cannot_be_reached_is_said_so() -> None:
    values = np.linspace(1.0, 2.0, N)
    with pytest.raises(UnresolvedError):
        locate(_with_values(values), N // 2, 50.0, 0.0, tolerance=1e-7, probes=probe_vectors(N))
