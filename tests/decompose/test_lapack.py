from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
from numpy.typing import NDArray

from streamrepair.decompose import lapack
from streamrepair.errors import NumericalError

SEVERAL_THREADS = """
import sys, threading
from streamrepair.decompose import lapack

sys.setswitchinterval(1e-6)
start, found = threading.Barrier(8), []


def load():
    start.wait()
    found.append(len(lapack.tables()))


threads = [threading.Thread(target=load) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(found)
"""

REALS = [np.float32, np.float64]
TOLERANCE = {np.float32: 2e-5, np.float64: 1e-13}
SIZES = [1, 2, 3, 64, 201]

RealType = type[np.float32] | type[np.float64]
Doubles = NDArray[np.float64]


def test_several_threads_may_load_the_routines_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL_THREADS], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == (f"{[2] * 8}\n", "")


def _random(shape: tuple[int, int], real: RealType, order: str, seed: int = 0) -> lapack.Real:
    values = np.random.default_rng(seed).standard_normal(shape)
    if real is np.float32:
        return np.array(values, np.float32, order="F" if order == "F" else "C")
    return np.array(values, np.float64, order="F" if order == "F" else "C")


def _symmetric(n: int, seed: int = 0) -> Doubles:
    a = np.random.default_rng(seed).standard_normal((n + 5, n))
    return a.T @ a


@pytest.mark.parametrize("real", REALS)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (1, 4), (7, 1), (40, 13), (13, 40)])
def test_gram_matrices_accumulate_in_the_upper_triangle(real: RealType, order: str, rows: int, n: int) -> None:
    first, second = _random((rows, n), real, order, 1), _random((rows, n), real, order, 2)
    gram = _random((n, n), real, "C")
    gram.fill(7)
    lapack.add_gram(first, gram, beta=0.0)
    lapack.add_gram(second, gram, beta=1.0)
    expected = first.T.astype(np.float64) @ first + second.T.astype(np.float64) @ second
    upper = np.triu_indices(n)
    np.testing.assert_allclose(gram[upper], expected[upper], rtol=0, atol=TOLERANCE[real] * rows)
    assert np.all(gram[np.tril_indices(n, -1)] == 7)


@pytest.mark.parametrize("real", REALS)
@pytest.mark.parametrize("left_order", ["C", "F"])
@pytest.mark.parametrize("right_order", ["C", "F"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 4), (1, 3, 1), (31, 17, 23)])
def test_products_are_added_whatever_the_layout(
    real: RealType, left_order: str, right_order: str, shape: tuple[int, int, int]
) -> None:
    rows, k, cols = shape
    left, right = _random((rows, k), real, left_order, 1), _random((k, cols), real, right_order, 2)
    out = _random((rows, cols), real, "C", 3)
    expected = out + left.astype(np.float64) @ right
    lapack.add_product(left, right, out)
    np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE[real] * (k + 1))


@pytest.mark.parametrize("n", SIZES)
def test_eigenvalues_are_those_of_eigh(n: int) -> None:
    matrix = _symmetric(n)
    diagonal, off, _ = lapack.tridiagonalise(matrix.copy())
    assert (diagonal.shape, off.shape) == ((n,), (n - 1,))
    values = lapack.tridiagonal_values(diagonal, off)
    expected = np.linalg.eigvalsh(matrix)
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-13 * expected[-1])


@pytest.mark.parametrize("n", SIZES)
def test_only_the_upper_triangle_is_read(n: int) -> None:
    matrix = _symmetric(n)
    spoiled = np.triu(matrix) + np.tril(np.full((n, n), np.nan), -1)
    diagonal, off, scales = lapack.tridiagonalise(spoiled)
    expected = lapack.tridiagonalise(matrix)
    for mine, other in zip((diagonal, off, scales[: n - 1]), expected, strict=True):
        np.testing.assert_array_equal(mine, other[: len(mine)])


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_top_vectors_belong_to_the_top_values(n: int, share: float) -> None:
    matrix, count = _symmetric(n), max(1, int(share * n))
    reflectors = matrix.copy()
    diagonal, off, scales = lapack.tridiagonalise(reflectors)
    vectors = lapack.tridiagonal_vectors(diagonal, off, count)
    lapack.rotate_back(reflectors, scales, vectors)
    values = np.linalg.eigvalsh(matrix)[n - count :]
    assert vectors.shape == (count, n)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(count), atol=1e-12)
    np.testing.assert_allclose(vectors @ matrix, values[:, None] * vectors, atol=1e-12 * values[-1])


@pytest.mark.parametrize("n", SIZES)
def test_rotating_forth_and_back_is_the_identity(n: int) -> None:
    reflectors = _symmetric(n)
    matrix = reflectors.copy()
    diagonal, off, scales = lapack.tridiagonalise(reflectors)
    vectors = np.random.default_rng(1).standard_normal((3, n))
    turned = vectors.copy()
    lapack.rotate_back(reflectors, scales, turned, transpose=True)
    tridiagonal = np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)
    image = np.ascontiguousarray(turned @ tridiagonal)
    lapack.rotate_back(reflectors, scales, image)
    np.testing.assert_allclose(image, vectors @ matrix, atol=1e-12 * np.abs(matrix).max() * n)
    lapack.rotate_back(reflectors, scales, turned)
    np.testing.assert_allclose(turned, vectors, atol=1e-13 * n)


@pytest.mark.parametrize("n", SIZES)
def test_symmetric_products_read_the_upper_triangle_only(n: int) -> None:
    matrix = _symmetric(n)
    vectors = np.random.default_rng(1).standard_normal((4, n))
    spoiled = np.triu(matrix) + np.tril(np.full((n, n), np.nan), -1)
    np.testing.assert_allclose(lapack.times_symmetric(spoiled, vectors), vectors @ matrix, rtol=0, atol=1e-12 * n * n)


def test_a_diagonal_and_a_zero_matrix() -> None:
    """No reflector has anything to do; T may split at every place."""
    for matrix in (np.diag([3.0, 1.0, 2.0]), np.zeros((3, 3))):
        diagonal, off, _ = lapack.tridiagonalise(matrix.copy())
        np.testing.assert_array_equal(lapack.tridiagonal_values(diagonal, off), np.sort(np.diag(matrix)))
        vectors = lapack.tridiagonal_vectors(diagonal, off, 3)
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(3), atol=1e-15)


def test_more_vectors_than_there_are_is_lapacks_error() -> None:
    with pytest.raises(NumericalError, match="stemr"):
        lapack.tridiagonal_vectors(np.ones(3), np.ones(2), 4)


def test_inputs_of_the_tridiagonal_routines_are_left_alone() -> None:
    diagonal, off = np.array([4.0, 2.0, 3.0]), np.array([1.0, 0.5])
    lapack.tridiagonal_values(diagonal, off)
    lapack.tridiagonal_vectors(diagonal, off, 2)
    np.testing.assert_array_equal(diagonal, [4.0, 2.0, 3.0])
    np.testing.assert_array_equal(off, [1.0, 0.5])


@pytest.mark.parametrize("n", SIZES)
def test_tridiagonal_matrices_are_factored(n: int) -> None:
    diagonal, off, _ = lapack.tridiagonalise(_symmetric(n))
    pivots, lower = diagonal.copy(), np.append(off, 0.0)
    assert lapack.factor_tridiagonal(pivots, lower)
    factor = np.eye(n) + np.diag(lower[:-1], -1)
    matrix = np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)
    np.testing.assert_allclose(factor * pivots @ factor.T, matrix, rtol=0, atol=1e-13 * diagonal.max())


def test_a_tridiagonal_matrix_that_is_not_positive_definite_has_no_factor() -> None:
    assert not lapack.factor_tridiagonal(np.array([1.0, 1.0]), np.array([2.0, 0.0]))


@pytest.mark.parametrize("n", SIZES)
def test_twisted_vectors_are_unit_eigenvectors(n: int) -> None:
    diagonal, off, _ = lapack.tridiagonalise(_symmetric(n))
    matrix = np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)
    values: Doubles = np.linalg.eigvalsh(matrix)[-5:].astype(np.float64)
    lower, found = np.append(off, 0.0), np.full((len(values), n), 7.0)
    assert lapack.factor_tridiagonal(diagonal, lower)
    lapack.twisted_vectors(diagonal, lower, values, found)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-13)
    np.testing.assert_allclose(found @ matrix, values[:, None] * found, rtol=0, atol=1e-12 * values[-1])


@pytest.mark.parametrize("divide", [True, False], ids=["gesdd", "gesvd"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (64, 64), (40, 17), (17, 40), (201, 201)])
def test_svd_is_thin_descending_and_leaves_its_matrix(shape: tuple[int, int], divide: bool) -> None:
    matrix = np.random.default_rng(7).standard_normal(shape)
    before = matrix.copy()
    u, s, vh = lapack.svd(matrix, divide=divide)
    k = min(shape)
    assert np.array_equal(matrix, before)
    assert (u.shape, s.shape, vh.shape) == ((shape[0], k), (k,), (k, shape[1]))
    assert np.allclose(s, np.linalg.svd(matrix, compute_uv=False), rtol=1e-12, atol=1e-12)
    assert np.abs((u * s) @ vh - matrix).max() <= 1e-12
    assert np.abs(u.T @ u - np.eye(k)).max() <= 1e-13 * k + 1e-14
    assert np.abs(vh @ vh.T - np.eye(k)).max() <= 1e-13 * k + 1e-14


@pytest.mark.parametrize("divide", [True, False], ids=["gesdd", "gesvd"])
def test_other_threads_run_while_a_matrix_is_decomposed(divide: bool) -> None:
    """A signal is heard by the interpreter only, which waits for whoever holds its lock."""
    matrix = np.random.default_rng(8).standard_normal((600, 600))
    done, began, turns = threading.Event(), threading.Event(), 0

    def decompose() -> None:
        began.wait()
        lapack.svd(matrix, divide=divide)
        done.set()

    thread = threading.Thread(target=decompose)
    thread.start()
    began.set()
    while not done.wait(0.001):
        turns += 1
    thread.join()
    assert turns > 10
