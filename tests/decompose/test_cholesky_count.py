"""The proofs on a NumPy matrix: they are no device's own. The torch one is held to the same in test_device_spectrum."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamrepair.decompose import certify, gram
from streamrepair.decompose.arithmetic import Count, Vectors, on_host
from streamrepair.decompose.cholesky_count import Symmetric, deflation, prove
from streamrepair.errors import NumericalError

Doubles = NDArray[np.float64]


class ArrayMatrix(Symmetric):
    """G in host memory."""

    def __init__(self, matrix: Doubles) -> None:
        self.matrix = matrix

    def residual(self, vectors: Vectors, values: Doubles) -> tuple[float, float]:
        rows = on_host(vectors)
        defect = np.linalg.norm(rows @ rows.T - np.eye(len(rows)))
        residual = rows @ self.matrix - values[:, None] * rows
        scale = np.abs(residual).max() or 1.0
        residual /= scale
        return float(scale * np.linalg.norm(residual @ residual.T) ** 0.5), float(defect)

    def deflated(self, shift: float, vectors: Vectors, values: Doubles, probes: Doubles) -> tuple[bool, Doubles]:
        rows = on_host(vectors)
        formed = shift * np.eye(len(self.matrix)) - self.matrix + rows.T @ (values[:, None] * rows)
        expected = shift * probes - probes @ self.matrix + ((probes @ rows.T) * values) @ rows
        try:
            np.linalg.cholesky(formed)
        except np.linalg.LinAlgError:
            return False, probes @ formed - expected
        return True, probes @ formed - expected


def _with_values(values: Doubles, seed: int = 0) -> Doubles:
    n = len(values)
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]
    matrix = (q * values) @ q.T
    return np.asarray((matrix + matrix.T) / 2)


def _claim(matrix: Doubles) -> tuple[Doubles, Doubles]:
    """Eigenvalues ascending, eigenvectors as rows, by LAPACK."""
    values, columns = np.linalg.eigh(matrix)
    return values, np.ascontiguousarray(columns.T)


def _count(matrix: Doubles, values: Doubles, rows: Doubles, shift: float, bound: float = 0.0) -> Count:
    top = deflation(values, shift, bound).count
    return prove(ArrayMatrix(matrix), values, rows[len(rows) - top :], shift, bound)


VALUES = np.append(np.linspace(0.2, 1.5, 45), [4.0, 5.0, 5.0, 6.0, 90.0])


def test_a_sound_factorisation_is_counted_at_every_shift() -> None:
    matrix = _with_values(VALUES)
    values, rows = _claim(matrix)
    for shift, above in ((0.1, 50), (3.0, 5), (4.5, 4), (50.0, 1), (100.0, 0)):
        assert _count(matrix, values, rows, shift) == Count(above, above)


@given(
    n=st.integers(1, 40), seed=st.integers(0, 10**6), power=st.floats(0.0, 3.0), scale=st.sampled_from([1e-60, 1, 1e60])
)
@settings(max_examples=80, deadline=None)
def test_the_true_count_lies_between_the_two_proofs(n: int, seed: int, power: float, scale: float) -> None:
    truth = np.sort(scale * np.arange(1.0, n + 1) ** -power)
    matrix = _with_values(truth, seed)
    values, rows = _claim(matrix)
    rng = np.random.default_rng(seed)
    for shift in rng.uniform(0.5 * truth[0], 1.2 * truth[-1], 3):
        counted = _count(matrix, values, rows, float(shift))
        assert counted.at_least <= np.count_nonzero(truth > shift) <= counted.at_most
        if np.abs(truth - shift).min() > 1e-11 * truth[-1]:
            assert counted.at_least == counted.at_most


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9])
def test_values_near_the_shift_are_told_apart_down_to_rounding(gap: float) -> None:
    truth = VALUES.copy()
    truth[44:46] = 3.0 * (1.0 - gap), 3.0 * (1.0 + gap)
    matrix = _with_values(truth)
    assert _count(matrix, *_claim(matrix), 3.0) == Count(5, 5)


def test_values_on_the_shift_are_left_open() -> None:
    truth = VALUES.copy()
    truth[44:46] = 3.0
    matrix = _with_values(truth)
    assert _count(matrix, *_claim(matrix), 3.0) == Count(4, 6)


def test_a_bound_on_the_values_widens_what_is_left_open() -> None:
    matrix = _with_values(VALUES)
    values, rows = _claim(matrix)
    assert _count(matrix, values, rows, 4.9, bound=0.2) == Count(2, 4)


def _lowered(values: Doubles, rows: Doubles) -> tuple[Doubles, Doubles]:
    """A value above the shift taken for one below: the deflation lacks its direction."""
    values[45] = 1.6
    return values, rows


def _raised(values: Doubles, rows: Doubles) -> tuple[Doubles, Doubles]:
    values[44] = 3.9
    return values, rows


def _missed(values: Doubles, rows: Doubles) -> tuple[Doubles, Doubles]:
    """One of the equal pair found twice, the largest value lost: values and vectors still belong to each other."""
    values[49], rows[49] = values[48], rows[48]
    return values, rows


def _lost(values: Doubles, rows: Doubles) -> tuple[Doubles, Doubles]:
    """Sound pairs of G, but one above the shift was replaced by nothing: orthonormal, no residual."""
    order = [49, *range(49)]
    values[order[0]] = 0.01
    return np.sort(values), rows[order]


def _turned(values: Doubles, rows: Doubles) -> tuple[Doubles, Doubles]:
    rows[[44, 45]] = rows[[45, 44]]
    return values, rows


def _not_finite(values: Doubles, rows: Doubles) -> tuple[Doubles, Doubles]:
    rows[47, 3] = np.nan
    return values, rows


FAULTS = [_lowered, _raised, _missed, _lost, _turned, _not_finite]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_the_matrixs_is_not_proven(fault: Callable[[Doubles, Doubles], tuple[Doubles, Doubles]]) -> None:
    matrix = _with_values(VALUES)
    values, rows = fault(*_claim(matrix))
    with np.errstate(invalid="ignore"), pytest.raises(NumericalError):
        _count(matrix, values, rows, 3.0)


def test_vectors_of_another_matrix_never_prove_too_few() -> None:
    """Whatever V is, success means that no more values exceed the shift than V has rows."""
    matrix = _with_values(VALUES)
    rng = np.random.default_rng(3)
    for rows_count in range(5):
        rows = np.linalg.qr(rng.standard_normal((50, max(1, rows_count))))[0].T[:rows_count]
        positive, _ = ArrayMatrix(matrix).deflated(3.0, rows, np.full(rows_count, 100.0), certify.probe_vectors(50))
        assert not positive


def test_a_matrix_formed_wrongly_is_noticed() -> None:
    class Faulty(ArrayMatrix):
        def deflated(self, shift: float, vectors: Vectors, values: Doubles, probes: Doubles) -> tuple[bool, Doubles]:
            positive, difference = super().deflated(shift, vectors, values, probes)
            return positive, difference + 1e-9

    matrix = _with_values(VALUES)
    values, rows = _claim(matrix)
    with pytest.raises(NumericalError, match="formed wrongly"):
        prove(Faulty(matrix), values, rows[45:], 3.0, 0.0)


@pytest.mark.parametrize(("largest", "told", "not_told"), [(9e2, 1e-7, 1e-8), (1e8, 1.5e-5, 1e-6)])
def test_what_is_left_open_is_less_than_is_promised_for_large_matrices(
    largest: float, told: float, not_told: float
) -> None:
    """8192 values, s_max/τ = 30 and 10⁴. A gap in λ is twice that in s, where the promise is 1e-5."""
    values = np.append(np.linspace(0.0, 2.0, 8190), [0.0, largest])
    for gap, taken in ((told, 0), (not_told, 1)):
        values[4000] = 1.0 - gap
        others = np.count_nonzero(values > 1.0)
        assert deflation(np.sort(values), 1.0, 0.0).count == others + taken


def test_a_rank_must_lie_where_the_count_does() -> None:
    """Values that a count leaves open are undecidable; a count that misses the rank by more is a fault."""
    assert gram._checked_count(Count(5, 5), 5, 0) == 0
    assert gram._checked_count(Count(4, 6), 5, 0) == 2
    assert gram._checked_count(Count(4, 4), 5, 1) == 1
    for counted in (Count(4, 4), Count(6, 6)):
        with pytest.raises(NumericalError, match="another count finds"):
            gram._checked_count(counted, 5, 0)
