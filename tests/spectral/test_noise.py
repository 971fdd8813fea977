from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamrepair.errors import UsageError
from streamrepair.spectral.noise import lower_median, sigma_from_median, sigma_from_tail

spectra = st.lists(st.floats(0.0, 1e6), min_size=1, max_size=40).map(np.array)


def _values(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.linalg.svd(matrix, compute_uv=False).astype(np.float64)


def _noise_spectrum(m: int, n: int, sigma: float) -> NDArray[np.float64]:
    return _values(sigma * np.random.default_rng(11).standard_normal((m, n)))


@given(spectra)
def test_lower_median_is_torch_median(s: NDArray[np.float64]) -> None:
    assert lower_median(s) == torch.median(torch.from_numpy(s)).item()


def test_lower_median_leaves_its_input_alone() -> None:
    s = np.array([4.0, 1.0, 3.0, 2.0])
    assert lower_median(s) == 2.0
    np.testing.assert_array_equal(s, [4.0, 1.0, 3.0, 2.0])


@pytest.mark.parametrize(("m", "n"), [(401, 401), (499, 307), (97, 1009)])
def test_median_recovers_the_noise_of_an_entry(m: int, n: int) -> None:
    """The fused scale: σ̂/√max(m, n) is the standard deviation of one entry, tall or wide."""
    s = _noise_spectrum(m, n, sigma=0.037)
    sigma_hat = sigma_from_median(lower_median(s), min(m, n) / max(m, n))
    assert sigma_hat / math.sqrt(max(m, n)) == pytest.approx(0.037, rel=0.01)


def test_median_is_little_moved_by_a_planted_signal() -> None:
    rng = np.random.default_rng(3)
    u, v = rng.standard_normal((400, 8)), rng.standard_normal((8, 400))
    s = _values(rng.standard_normal((400, 400)) + u @ v)
    assert sigma_from_median(lower_median(s), 1.0) / 20.0 == pytest.approx(1.0, rel=0.04)


@pytest.mark.parametrize(("r", "lowest"), [(1, 1), (3, 1), (4, 1), (7, 1), (8, 2), (11, 2), (12, 3)])
def test_tail_is_the_mean_of_the_lowest_quarter(r: int, lowest: int) -> None:
    primes = np.array([37.0, 2, 31, 3, 29, 5, 23, 7, 19, 11, 17, 13])[:r]
    assert sigma_from_tail(primes) == pytest.approx(sum(sorted(primes)[:lowest]) / lowest / 0.6745, rel=1e-15)


@pytest.mark.parametrize(("m", "n", "factor"), [(400, 400, 0.2920), (150, 600, 0.9617)])
def test_tail_is_biased_as_the_law_says(m: int, n: int, factor: float) -> None:
    """Not a consistent estimator: the factor is the law's mean √λ over its lowest quarter, divided by 0.6745."""
    assert sigma_from_tail(_noise_spectrum(m, n, sigma=1.0)) / math.sqrt(n) == pytest.approx(factor, rel=0.02)


@given(spectra)
def test_order_does_not_matter(s: NDArray[np.float64]) -> None:
    reversed_s = s[::-1].copy()
    assert lower_median(reversed_s) == lower_median(s)
    assert sigma_from_tail(reversed_s) == sigma_from_tail(s)


@pytest.mark.parametrize("s", [np.array([]), np.ones((2, 2))])
def test_no_spectrum(s: NDArray[np.float64]) -> None:
    with pytest.raises(UsageError, match="expected"):
        lower_median(s)
    with pytest.raises(UsageError, match="expected"):
        sigma_from_tail(s)
