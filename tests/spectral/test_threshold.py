from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamrepair.errors import NumericalError, UsageError
from streamrepair.spectral.marchenko_pastur import median
from streamrepair.spectral.threshold import HardThreshold, aspect_ratio, omega, tau

# Gavish & Donoho 2014, the table of coefficients for an unknown noise level: β → ω(β)/√median(β).
PUBLISHED = {
    0.05: 1.5194, 0.10: 1.6089, 0.15: 1.6896, 0.20: 1.7650, 0.25: 1.8371, 0.30: 1.9061, 0.35: 1.9741,
    0.40: 2.0403, 0.45: 2.1060, 0.50: 2.1711, 0.55: 2.2365, 0.60: 2.3021, 0.65: 2.3679, 0.70: 2.4339,
    0.75: 2.5011, 0.80: 2.5697, 0.85: 2.6399, 0.90: 2.7099, 0.95: 2.7832, 1.00: 2.8582,
}  # fmt: skip

spectra = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40).map(np.array)


def _values(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.linalg.svd(matrix, compute_uv=False).astype(np.float64)


def _coefficient(beta: float) -> float:
    return omega(beta) / math.sqrt(median(beta))


@pytest.mark.parametrize(("beta", "published"), PUBLISHED.items())
def test_published_table(beta: float, published: float) -> None:
    """The authors bisect the median until its bracket is 0.001 wide and take the middle: off by up to 0.0005.

    That moves the coefficient by coefficient·0.0005/(2·median), plus the table's rounding to four decimals. Our median
    is held to 1e-13 by quadrature in its own test.
    """
    exact = _coefficient(beta)
    assert abs(exact - published) <= exact * 0.0005 / (2 * median(beta)) + 0.00005


def test_square_matrices() -> None:
    """2.858362 is exact; a 200,000-point trapezoidal grid over λ misses mass next to 0: 0.22% less (2.852061)."""
    assert omega(1.0) == pytest.approx(4 / math.sqrt(3), rel=1e-15)
    assert _coefficient(1.0) == pytest.approx(2.858362, abs=5e-7)

    lam = np.linspace(0.0, 4.0, 200_001)[1:]
    density = np.concatenate([[0.0], np.sqrt((4.0 - lam) * lam) / (2 * np.pi * lam)])
    mass = np.cumsum((density[1:] + density[:-1]) / 2)
    on_grid = omega(1.0) / math.sqrt(lam[np.searchsorted(mass, mass[-1] / 2)])
    assert on_grid / _coefficient(1.0) - 1 == pytest.approx(-0.0022, abs=5e-5)


def test_omega_of_thin_matrices() -> None:
    assert omega(1e-12) == pytest.approx(math.sqrt(2), rel=1e-11)


@given(st.floats(1e-9, 1.0), st.floats(1e-9, 1.0))
def test_omega_grows_with_beta_and_stays_above_the_bulk(first: float, second: float) -> None:
    low, high = sorted((first, second))
    assert omega(low) <= omega(high) * (1 + 1e-15)
    assert omega(low) > (1 + math.sqrt(low)) * (1 - 1e-15)


@given(st.floats(1e-6, 1e6), st.floats(1e-9, 1.0), st.floats(0.0, 10.0))
def test_tau_is_linear_in_sigma_and_scale(sigma_hat: float, beta: float, scale: float) -> None:
    assert tau(7.0 * sigma_hat, beta) == pytest.approx(7.0 * tau(sigma_hat, beta), rel=1e-14)
    assert tau(sigma_hat, beta, scale=scale) == pytest.approx(scale * tau(sigma_hat, beta), rel=1e-14)


@pytest.mark.parametrize("sigma", ["median", "tail"])
@given(s=spectra, extra=st.integers(0, 50), power=st.integers(-20, 20))
def test_rank_is_invariant_under_scaling_and_transposition(
    sigma: str, s: NDArray[np.float64], extra: int, power: int
) -> None:
    """Powers of two scale without rounding, so that even a value at τ stays on its side."""
    rule = HardThreshold(sigma="tail" if sigma == "tail" else "median")
    m, n = s.size, s.size + extra
    found = rule.estimate(s, m, n)
    assert rule.estimate(s[::-1], n, m) == found
    scaled = rule.estimate(s * 2.0**power, m, n)
    assert (scaled.rank_kept, scaled.nearest_gap) == (found.rank_kept, found.nearest_gap)
    assert scaled.tau == found.tau * 2.0**power


@given(spectra, st.integers(0, 50))
def test_record_agrees_with_its_own_tau(s: NDArray[np.float64], extra: int) -> None:
    found = HardThreshold().estimate(s, s.size, s.size + extra)
    assert found.rank_kept == sum(value > found.tau for value in s)
    assert found.nearest_gap == pytest.approx(min(abs(value / found.tau - 1) for value in s), rel=1e-9, abs=1e-15)
    assert found.s_median in s


@pytest.mark.parametrize(("m", "n"), [(300, 300), (211, 499), (811, 97)])
def test_pure_noise_keeps_nothing_and_planted_spikes_stay(m: int, n: int) -> None:
    """Spikes at twice τ: far above the detection limit β^¼ and, once inflated by the noise, above τ."""
    rng = np.random.default_rng(5)
    noise = 1e-3 * rng.standard_normal((m, n))
    rule = HardThreshold()
    alone = rule.estimate(_values(noise), m, n)
    assert alone.rank_kept == 0
    assert alone.sigma_hat == pytest.approx(1e-3 * math.sqrt(max(m, n)), rel=0.02)

    u, _ = np.linalg.qr(rng.standard_normal((m, 5)))
    v, _ = np.linalg.qr(rng.standard_normal((n, 5)))
    planted = noise + 2 * alone.tau * u @ v.T
    assert rule.estimate(_values(planted), m, n).rank_kept == 5


def test_low_rank_delta_keeps_its_rank() -> None:
    """Half of the values or more are 0, so τ is 0: > keeps the true rank where >= would keep the null directions."""
    found = HardThreshold().estimate(np.array([5.0, 3.0, 0.0, 0.0, 0.0]), 5, 9)
    assert (found.tau, found.rank_kept, found.nearest_gap) == (0.0, 2, math.inf)


def test_a_value_at_tau_is_noise() -> None:
    cut = HardThreshold().estimate(np.array([1.0, 1.0, 1.0, 3.0, 4.0]), 5, 5).tau
    found = HardThreshold().estimate(np.array([1.0, 1.0, 1.0, cut, math.nextafter(cut, math.inf)]), 5, 5)
    assert (found.tau, found.rank_kept, found.nearest_gap) == (cut, 1, 0.0)


def test_scale_moves_the_cut() -> None:
    s = np.array([1.0, 1.0, 1.0, 3.0, 4.0])
    assert [HardThreshold(scale=scale).estimate(s, 5, 5).rank_kept for scale in (0.0, 1.0, 1.2, 2.0)] == [5, 2, 1, 0]


@pytest.mark.parametrize(("m", "n"), [(0, 7), (7, 0), (0, 0)])
def test_empty_matrix(m: int, n: int) -> None:
    found = HardThreshold().estimate(np.array([]), m, n)
    assert (found.tau, found.rank_kept, found.nearest_gap) == (0.0, 0, math.inf)


def test_float32_values_are_widened() -> None:
    s = np.array([1.0, 2.0, 9.0], dtype=np.float32)
    assert HardThreshold().estimate(s.astype(np.float64), 3, 5) == HardThreshold().estimate(s, 3, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e-9])
def test_failed_factorisation_is_refused(bad: float) -> None:
    with pytest.raises(NumericalError, match="4 × 3"):
        HardThreshold().estimate(np.array([2.0, bad, 1.0]), 4, 3)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(UsageError, match=r"expected \(3,\)"):
        HardThreshold().estimate(np.array([2.0, 1.0]), 4, 3)
    with pytest.raises(UsageError, match="both sides positive"):
        aspect_ratio(0, 3)
    with pytest.raises(UsageError, match="'median' or 'tail'"):
        HardThreshold(sigma="mad")  # type: ignore[arg-type]
    for scale in (-1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="finite number >= 0"):
            HardThreshold(scale=scale)
        with pytest.raises(UsageError, match="finite number >= 0"):
            tau(1.0, 0.5, scale=scale)
    with pytest.raises(UsageError, match="0 < beta <= 1"):
        omega(0.0)
