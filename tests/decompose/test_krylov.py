from __future__ import annotations

import math

import numpy as np
import pytest

from streamrepair.decompose.krylov import BlockLanczos, Density
from streamrepair.errors import NumericalError
from streamrepair.spectral import marchenko_pastur


def _noise(n: int, beta: float) -> np.ndarray:
    m = round(n / beta)
    x = np.random.default_rng(0).standard_normal((m, n)) / math.sqrt(m)
    return np.asarray(x.T @ x)


def test_ritz_pairs_are_eigenpairs_and_their_residuals_are_true() -> None:
    values = np.concatenate([np.linspace(0, 1, 380), [3.0, 3.0, 4.0, 9.0, 9.0, 9.0, 20.0]])
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((387, 387)))[0]
    matrix = (q * values) @ q.T
    lanczos = BlockLanczos(lambda rows: rows @ matrix, 387, block=8, capacity=120, seed=1)
    while not lanczos.full:
        lanczos.extend()
    ritz = lanczos.ritz()
    np.testing.assert_allclose(ritz.values[:7], values[::-1][:7], rtol=1e-10)
    rows = lanczos.vectors(ritz.coefficients)
    assert np.abs(rows @ rows.T - np.eye(len(rows))).max() < 1e-12
    residuals = np.linalg.norm(rows @ matrix - ritz.values[:, None] * rows, axis=1)
    np.testing.assert_allclose(ritz.residuals, residuals, atol=1e-12)
    np.testing.assert_allclose(ritz.weights.sum(axis=0), 1.0)


def test_a_matrix_of_low_rank_exhausts_the_basis_without_harm() -> None:
    matrix = np.diag(np.r_[np.arange(1.0, 6.0), np.zeros(95)])
    lanczos = BlockLanczos(lambda rows: rows @ matrix, 100, block=4, capacity=40, seed=1)
    while not lanczos.full:
        lanczos.extend()
    ritz = lanczos.ritz()
    np.testing.assert_allclose(ritz.values[:6], [5, 4, 3, 2, 1, 0], atol=1e-12)


def test_the_complement_of_a_subspace_is_not_left() -> None:
    matrix = np.diag(np.arange(1.0, 101.0))
    lanczos = BlockLanczos(lambda rows: rows @ matrix, 100, block=4, capacity=60, seed=1, without=np.eye(100)[-10:])
    while not lanczos.full:
        lanczos.extend()
    assert 89.0 < lanczos.ritz().values[0] <= 90.0 + 1e-9


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.1])
def test_the_median_of_noise_is_estimated_to_a_few_percent(beta: float) -> None:
    """The oracle is the Marchenko–Pastur law; at β = 1 its density has a pole at 0."""
    n = 600
    matrix = _noise(n, beta)
    lanczos = BlockLanczos(lambda rows: rows @ matrix, n, block=16, capacity=13 * 16, seed=3)
    for _ in range(12):
        lanczos.extend()
    density = Density.of(lanczos.ritz(), n)
    median = density.at((n - 1) // 2)
    assert median == pytest.approx(marchenko_pastur.median(beta), rel=0.06)
    assert density.spread(median) < 0.03 * n
    exact = np.count_nonzero(np.abs(np.linalg.eigvalsh(matrix) - median) < 0.1 * median) / (0.2 * median)
    assert density.slope(median) == pytest.approx(exact, rel=0.35)


def test_an_operator_that_is_not_finite_is_refused() -> None:
    lanczos = BlockLanczos(lambda rows: rows * np.nan, 50, block=4, capacity=20, seed=1)
    with pytest.raises(NumericalError):
        lanczos.extend()
