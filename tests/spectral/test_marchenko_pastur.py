from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from streamrepair.errors import UsageError
from streamrepair.spectral.marchenko_pastur import cdf, lower_edge, median, pdf, upper_edge

# Both sides of the switch between series and closed form (1/16), next to 1, the shapes of real matrices.
BETAS = [1e-8, 1e-4, 1e-2, 0.0624999, 0.0625, 0.25, 1 / 3, 0.5, 0.9, 1 - 1e-9, 1.0]
betas = st.floats(1e-9, 1.0)


def _mass_by_quadrature(theta: float, beta: float) -> float:
    """The law's mass below λ = 1 + β − 2√β·cos θ, integrated in θ, where the integrand is smooth."""
    root = math.sqrt(beta)

    def density(t: float) -> float:
        # sin²t / λ with both as half-angle products: finite at t = 0 for β = 1 too.
        lam = (1 - root) ** 2 + 4 * root * math.sin(t / 2) ** 2
        return 2 / math.pi * (math.sin(t) ** 2 / lam if lam else 1.0)

    # sin²t / λ rises within |t| ~ 1 − √β; without these breakpoints quad steps over the layer when β is next to 1.
    layer = [edge for edge in (1 - root) * 10.0 ** np.arange(12) if 0.0 < edge < theta]
    return float(quad(density, 0.0, theta, points=layer or None, epsabs=2e-14, epsrel=2e-14, limit=400)[0])


def _eigenvalue(theta: float, beta: float) -> float:
    return lower_edge(beta) + 4 * math.sqrt(beta) * math.sin(theta / 2) ** 2


@pytest.mark.parametrize("beta", BETAS)
def test_cdf_matches_quadrature(beta: float) -> None:
    """A float64 λ knows its place in a support of width 4√β only to ε/√β, hence the tolerance."""
    for theta in (0.05, 0.4, 1.0, 1.7, 2.5, 3.1):
        expected = _mass_by_quadrature(theta, beta)
        assert float(cdf(_eigenvalue(theta, beta), beta)) == pytest.approx(
            expected, abs=1e-13 + 1e-15 / math.sqrt(beta)
        )


@pytest.mark.parametrize("beta", BETAS)
def test_median_matches_quadrature(beta: float) -> None:
    """θ of the median is recovered from (λ − λ₋)/(4√β), whose own rounding is ε/√β."""
    theta = 2 * math.asin(math.sqrt((median(beta) - lower_edge(beta)) / (4 * math.sqrt(beta))))
    assert _mass_by_quadrature(theta, beta) == pytest.approx(0.5, abs=1e-13 + 1e-15 / math.sqrt(beta))


def test_median_of_a_square_matrix() -> None:
    """At β = 1 the median is 4·sin²(θ/2) with θ + sin θ = π/2: checked at the root, without our code."""
    theta = 2 * math.asin(math.sqrt(median(1.0)) / 2)
    assert theta + math.sin(theta) == pytest.approx(math.pi / 2, rel=1e-14)


@pytest.mark.parametrize("beta", [1e-8, 1e-6, 1e-5])
def test_median_of_a_very_thin_matrix(beta: float) -> None:
    """λ = 1 − β/3 + O(β²): the mass at θ = π/2 + δ is ½ + (2δ + 4√β/3)/π to first order, so δ = −2√β/3."""
    assert 1.0 - median(beta) == pytest.approx(beta / 3, rel=3 * beta + 1e-15 / beta)


def test_median_is_continuous_where_the_series_takes_over() -> None:
    below, above = math.nextafter(1 / 16, 0.0), 1 / 16
    assert median(below) == pytest.approx(median(above), rel=1e-14)


@pytest.mark.parametrize("beta", [0.01, 0.25, 0.7])
def test_pdf_is_the_derivative_of_the_cdf(beta: float) -> None:
    low, high = lower_edge(beta), upper_edge(beta)
    lam = low + (high - low) * np.linspace(0.05, 0.95, 19)
    step = 1e-5 * (high - low)
    slope = (cdf(lam + step, beta) - cdf(lam - step, beta)) / (2 * step)
    np.testing.assert_allclose(pdf(lam, beta), slope, rtol=1e-6)


@pytest.mark.parametrize("beta", [1e-4, 0.3, 1.0])
def test_outside_the_support(beta: float) -> None:
    low, high = lower_edge(beta), upper_edge(beta)
    outside = np.array([-1.0, low - 1e-6, high + 1e-6, 50.0])
    np.testing.assert_array_equal(pdf(outside, beta), 0.0)
    np.testing.assert_array_equal(cdf(outside, beta), [0.0, 0.0, 1.0, 1.0])
    assert float(pdf(high, beta)) == 0.0


def test_pole_at_zero_for_square_matrices() -> None:
    """At β = 1 the density is √((4 − λ)/λ)/(2π): 1/(π√λ) near 0, with mass 2√λ/π below λ."""
    assert float(pdf(0.0, 1.0)) == math.inf
    tiny = 1e-300
    assert float(pdf(tiny, 1.0)) == pytest.approx(1 / (math.pi * math.sqrt(tiny)), rel=1e-12)
    assert float(cdf(tiny, 1.0)) == pytest.approx(2 * math.sqrt(tiny) / math.pi, rel=1e-12)


def test_shapes_and_nan_pass_through() -> None:
    assert pdf(np.ones((2, 3)), 0.5).shape == cdf(np.ones((2, 3)), 0.5).shape == (2, 3)
    assert math.isnan(float(pdf(math.nan, 0.5)))
    assert math.isnan(float(cdf(math.nan, 0.5)))


@given(betas)
def test_half_the_law_lies_below_the_median(beta: float) -> None:
    assert lower_edge(beta) < median(beta) < upper_edge(beta)
    assert float(cdf(median(beta), beta)) == pytest.approx(0.5, abs=1e-14 + 1e-15 / math.sqrt(beta))


@given(betas, st.floats(-0.2, 1.2), st.floats(-0.2, 1.2))
def test_cdf_is_monotone(beta: float, first: float, second: float) -> None:
    low, width = lower_edge(beta), upper_edge(beta) - lower_edge(beta)
    shares = cdf(low + width * np.array(sorted((first, second))), beta)
    assert 0.0 <= shares[0] <= shares[1] + 1e-15 <= 1.0 + 1e-15


@pytest.mark.parametrize(("m", "n"), [(400, 400), (300, 600), (150, 1500)])
def test_spectrum_of_gaussian_noise_follows_the_law(m: int, n: int) -> None:
    """Kolmogorov distance: eigenvalues repel each other, so it falls like 1/r, not like 1/√r as for a sample."""
    noise = np.random.default_rng(7).standard_normal((m, n)) / math.sqrt(max(m, n))
    eigenvalues = np.linalg.eigvalsh(noise @ noise.T).astype(np.float64)
    share = cdf(eigenvalues, m / n)
    ranks = np.arange(m + 1) / m
    assert max(np.abs(share - ranks[:-1]).max(), np.abs(share - ranks[1:]).max()) < 5 / m


@pytest.mark.parametrize("beta", [0.0, -0.1, 1.0000001, math.nan, math.inf])
def test_no_aspect_ratio(beta: float) -> None:
    for refuse in (median, lower_edge, upper_edge):
        with pytest.raises(UsageError, match="0 < beta <= 1"):
            refuse(beta)
    with pytest.raises(UsageError):
        cdf(1.0, beta)
    with pytest.raises(UsageError):
        pdf(1.0, beta)
