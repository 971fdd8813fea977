"""Back-transformation in blocks against LAPACK's, and against the reflectors one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from streamrepair.decompose import householder, lapack


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [2, 3, 64, 65, 66, 129, 300])
@pytest.mark.parametrize("count", [1, 7, 90])
def test_vectors_are_turned_as_by_lapack(n: int, count: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(householder, "_LEAST_COLUMNS", 0)
    monkeypatch.setattr(householder, "_LEAST_VECTORS", 0)
    rng = np.random.default_rng(n)
    matrix = rng.standard_normal((n, n)).astype(dtype)
    matrix += matrix.T
    _, _, scales = lapack.tridiagonalise(matrix)
    before = matrix.copy()
    rows = rng.standard_normal((count, n)).astype(dtype)
    expected = rows.copy()
    lapack.rotate_back(matrix, scales, expected)
    householder.rotate_back(matrix, scales, rows)
    np.testing.assert_allclose(rows, expected, atol=20 * n**0.5 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(matrix, before)


def test_columns_that_need_no_reflector(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix that is tridiagonal in parts: τ = 0 there, in the middle of a block as at its ends."""
    monkeypatch.setattr(householder, "_LEAST_COLUMNS", 0)
    monkeypatch.setattr(householder, "_LEAST_VECTORS", 0)
    n, rng = 150, np.random.default_rng(0)
    matrix = np.diag(rng.standard_normal(n)) + np.diag(np.ones(n - 1), 1) + np.diag(np.ones(n - 1), -1)
    for start in (20, 60, 100):
        block = rng.standard_normal((12, 12))
        matrix[start : start + 12, start : start + 12] += block + block.T
    form, dense = matrix.copy(), matrix
    diagonal, off, scales = lapack.tridiagonalise(form)
    assert 20 < np.count_nonzero(scales == 0.0) < n - 20
    rows = np.eye(n)
    householder.rotate_back(form, scales, rows)
    tridiagonal = np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)
    np.testing.assert_allclose(rows.T @ tridiagonal @ rows, dense, atol=1e-12)


def test_where_there_are_few_lapack_does_it() -> None:
    n, rng = 800, np.random.default_rng(0)
    matrix = rng.standard_normal((n, n))
    matrix += matrix.T
    _, _, scales = lapack.tridiagonalise(matrix)
    for count in (householder._LEAST_VECTORS - 1, householder._LEAST_VECTORS):
        rows = rng.standard_normal((count, n))
        expected, turned = rows.copy(), rows.copy()
        lapack.rotate_back(matrix, scales, expected)
        householder.rotate_back(matrix, scales, turned)
        assert np.array_equal(turned, expected) == (count < householder._LEAST_VECTORS)
        np.testing.assert_allclose(turned, expected, atol=1e-12)
