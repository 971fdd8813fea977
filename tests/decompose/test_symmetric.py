from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamrepair.decompose.certify import probe_vectors
from streamrepair.decompose.single_copy import SingleCopy
from streamrepair.decompose.symmetric import Seen, SymmetricPair
from streamrepair.errors import NumericalError

Doubles = NDArray[np.float64]


def _symmetric(n: int, seed: int = 0) -> Doubles:
    half = np.random.default_rng(seed).standard_normal((n, n))
    return half + half.T


def _pair(matrix: Doubles) -> SymmetricPair:
    """What is not G's triangle is not to be looked at."""
    return SymmetricPair(np.triu(matrix) + np.tril(np.full_like(matrix, np.nan), -1))


@given(n=st.integers(1, 40), seed=st.integers(0, 1000), quantile=st.floats(-0.2, 1.2))
@settings(max_examples=60, deadline=None)
def test_counts_and_solutions_are_those_of_the_matrix(n: int, seed: int, quantile: float) -> None:
    """2 × 2 pivots included: random indefinite matrices have many."""
    matrix = _symmetric(n, seed)
    values = np.linalg.eigvalsh(matrix)
    c = float(values[0] + quantile * (values[-1] - values[0]) + 1e-3)
    pair, rows = _pair(matrix), np.random.default_rng(seed).standard_normal((3, n))
    assert pair.shift(c) == np.count_nonzero(values > c)
    solved = pair.solve(rows)
    scale = np.abs(solved).max() * (np.abs(matrix).sum(axis=1).max() + abs(c))
    assert np.abs(solved @ (matrix - c * np.eye(n)) - rows).max() <= 1e-13 * n * scale
    np.testing.assert_allclose(pair.times(rows), rows @ matrix, atol=1e-12 * n)


@pytest.mark.parametrize("n", [255, 256, 700])
def test_tiles_of_every_size(n: int) -> None:
    matrix = _symmetric(n)
    values = np.linalg.eigvalsh(matrix)
    pair = _pair(matrix)
    for place in (0, n // 3, n - 2):
        assert pair.shift(0.5 * (values[place] + values[place + 1])) == n - 1 - place
    assert pair.shift_error(0.1, probe_vectors(n)) >= 0.0
    pair.restore()
    np.testing.assert_array_equal(pair.times(np.eye(n)[:3]), matrix[:3])


def test_the_error_of_spoiled_factors_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = _pair(_symmetric(300))
    pair.shift(0.1)
    sound = pair.shift_error(0.1, probe_vectors(300))
    pair._array[200, 100] *= 1.01
    assert sound < 1e-10
    assert pair.shift_error(0.1, probe_vectors(300)) > 1e-5


def test_a_shift_that_is_an_eigenvalue_is_refused() -> None:
    with pytest.raises(NumericalError):
        _pair(np.zeros((4, 4))).shift(0.0)


@given(seed=st.integers(0, 100), deflated=st.integers(0, 20))
@settings(max_examples=30, deadline=None)
def test_cholesky_proves_that_no_more_lie_above(seed: int, deflated: int) -> None:
    values, vectors = np.linalg.eigh(_symmetric(60, seed))
    values, matrix = np.abs(values), (vectors * np.abs(values)) @ vectors.T
    order = np.argsort(values)[::-1]
    top, rows = values[order[:deflated]], vectors.T[order[:deflated]]
    following = values[order[deflated]]
    probes = probe_vectors(60)
    seen = Seen(probes, probes @ matrix)
    assert _pair(matrix).none_above(following * 1.001, top, rows, seen) < 1e-10
    assert _pair(matrix).none_above(following * 0.999, top, rows, seen) == np.inf


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_copy_in_single_precision_multiplies_and_proves(scale: float) -> None:
    n, kept = 300, 9
    values, vectors = np.linalg.eigh(_symmetric(n))
    values = scale * np.append(np.linspace(0.1, 1.0, n - kept), np.geomspace(1.5, 300.0, kept))
    matrix, probes = (vectors * values) @ vectors.T, probe_vectors(n)
    pair = _pair(matrix)
    copy, rows = SingleCopy(pair), np.random.default_rng(1).standard_normal((16, n))
    seen = Seen(probes, probes @ matrix)

    def off() -> float:
        return float(np.linalg.norm(copy.times(rows) - rows @ matrix) / np.linalg.norm(rows @ matrix))

    assert 1e-9 < off() < 1e-6
    for _ in range(2):  # the factor takes the copy's place, which is filled again when it is asked for
        error = copy.none_above(1.2 * scale, values[-kept:], vectors.T[-kept:], seen)
        assert 1e-9 * scale < error <= 1e-3 * scale
    assert copy.none_above(1.2 * scale, values[1 - kept :], vectors.T[1 - kept :], seen) == np.inf
    assert 1e-9 < off() < 1e-6
    np.testing.assert_allclose(pair.times(rows), rows @ matrix, atol=1e-12 * n * 300 * scale)
