from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from streamrepair.decompose import certify, lapack, twisted
from streamrepair.decompose.tridiagonal import TridiagonalSpectrum

Doubles = NDArray[np.float64]


def _tridiagonal(n: int, seed: int = 0) -> tuple[Doubles, Doubles]:
    a = np.random.default_rng(seed).standard_normal((2 * n, n))
    diagonal, off, _ = lapack.tridiagonalise(a.T @ a)
    return diagonal, off


def _dense(diagonal: Doubles, off: Doubles) -> Doubles:
    matrix: Doubles = np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)
    return matrix


def _graded(n: int) -> tuple[Doubles, Doubles]:
    """Entries falling by twelve orders of magnitude."""
    fall = np.geomspace(1.0, 1e-12, n)
    return fall, 0.3 * np.sqrt(fall[1:] * fall[:-1])


@pytest.mark.parametrize("n", [1, 2, 3, 50, 400])
def test_all_vectors_against_dstemr(n: int) -> None:
    """More vectors than one batch holds; equal up to sign."""
    diagonal, off = _tridiagonal(n)
    values = lapack.tridiagonal_values(diagonal, off)
    found, expected = twisted.vectors(diagonal, off, values), lapack.tridiagonal_vectors(diagonal, off, n)
    signs = np.sign(np.sum(found * expected, axis=1))
    gaps = np.diff(values).min(initial=values[-1])
    np.testing.assert_allclose(found * signs[:, None], expected, atol=1e-13 * values[-1] / gaps)


@pytest.mark.parametrize("n", [2, 3, 50, 400])
def test_vectors_are_orthonormal_with_a_small_residual(n: int) -> None:
    diagonal, off = _tridiagonal(n, seed=1)
    values: Doubles = np.linalg.eigvalsh(_dense(diagonal, off)).astype(np.float64)
    found = twisted.vectors(diagonal, off, values)
    assert certify.orthonormality(found) < 1e-9
    assert np.abs(found @ _dense(diagonal, off) - values[:, None] * found).max() < 1e-12 * values[-1]


def test_graded_matrices() -> None:
    diagonal, off = _graded(200)
    values = lapack.tridiagonal_values(diagonal, off)[-60:]
    found = twisted.vectors(diagonal, off, values)
    assert certify.orthonormality(found) < 1e-9
    assert np.abs(found @ _dense(diagonal, off) - values[:, None] * found).max() < 1e-14 * values[-1]


def _clustered(case: str) -> tuple[Doubles, Doubles]:
    n = 120
    if case == "diagonal":  # every pivot of an eigenvalue is zero
        return np.repeat([1.0, 2.0], n // 2), np.zeros(n - 1)
    if case == "two equal blocks":
        diagonal, off = _tridiagonal(n // 2)
        return np.tile(diagonal, 2), np.concatenate([off, [0.0], off])
    centre = np.abs(np.arange(n) - (n - 1) / 2)  # Wilkinson: pairs of values that agree to rounding
    return centre, np.ones(n - 1)


@pytest.mark.parametrize("case", ["diagonal", "two equal blocks", "wilkinson"])
def test_clusters_are_seen_by_the_check_of_orthonormality(case: str) -> None:
    diagonal, off = _clustered(case)
    values = lapack.tridiagonal_values(diagonal, off)
    found = twisted.vectors(diagonal, off, values)
    assert not certify.orthonormality(found) <= certify.ORTHONORMALITY


@pytest.mark.parametrize("case", ["diagonal", "two equal blocks", "wilkinson"])
def test_host_takes_clusters_to_mrrr(case: str) -> None:
    matrix = _dense(*_clustered(case))
    q = np.linalg.qr(np.random.default_rng(2).standard_normal(matrix.shape))[0]
    rotated = q @ matrix @ q.T
    spectrum = TridiagonalSpectrum(rotated.copy())
    found = spectrum.top(100)
    assert certify.orthonormality(found) < 1e-12
    assert np.abs(found @ rotated - spectrum.values[-100:, None] * found).max() < 1e-12 * np.abs(matrix).max() * 100


def test_host_uses_clusters_free_vectors_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing clusters, dstemr is not asked."""

    def refuse(*_: object) -> None:
        raise AssertionError("dstemr was called")

    monkeypatch.setattr(lapack, "tridiagonal_vectors", refuse)
    a = np.random.default_rng(3).standard_normal((300, 100))
    assert TridiagonalSpectrum(a.T @ a).top(60).shape == (60, 100)
