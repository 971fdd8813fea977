from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamrepair.decompose import certify, lapack
from streamrepair.decompose.certify import PROBES
from streamrepair.decompose.device import DeviceArithmetic
from streamrepair.decompose.device.rates import Rates
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.truncation import UnresolvedError, decide, mixing
from streamrepair.errors import NumericalError
from streamrepair.spectral.threshold import HardThreshold
from tests.decompose.sources import ArraySource, from_delta, with_spectrum

Doubles = NDArray[np.float64]
N = 60


class _Eigen:
    """A Gram matrix, its eigenvectors as rows, and the probes' images."""

    def __init__(self) -> None:
        a = np.random.default_rng(0).standard_normal((90, N))
        self.matrix = a.T @ a
        self.values, vectors = np.linalg.eigh(self.matrix)
        self.vectors: Doubles = np.ascontiguousarray(vectors.T)
        self.probes = certify.probe_vectors(N)
        self.images: Doubles = self.probes @ self.matrix

    def check(self, vectors: Doubles, values: Doubles, **tolerances: float) -> None:
        certify.check_vectors(vectors, values, self.probes, self.images, **tolerances)


@pytest.fixture
def eigen() -> _Eigen:
    return _Eigen()


def test_probes_are_signs_and_the_same_every_time() -> None:
    probes = certify.probe_vectors(50)
    assert probes.shape == (PROBES, 50)
    assert set(np.unique(probes)) == {-1.0, 1.0}
    np.testing.assert_array_equal(probes, certify.probe_vectors(50))


def test_sound_vectors_pass(eigen: _Eigen) -> None:
    eigen.check(eigen.vectors[-7:], eigen.values[-7:], orthonormal=1e-13, belonging=1e-13)


def test_no_vectors_pass(eigen: _Eigen) -> None:
    eigen.check(eigen.vectors[:0], eigen.values[:0])


def test_a_wrong_vector_is_caught(eigen: _Eigen) -> None:
    """Orthonormal, but one belongs to another value."""
    vectors = eigen.vectors[-7:].copy()
    vectors[0] = eigen.vectors[3]
    with pytest.raises(NumericalError, match="belong"):
        eigen.check(vectors, eigen.values[-7:])


def test_vectors_in_the_wrong_order_are_caught(eigen: _Eigen) -> None:
    with pytest.raises(NumericalError, match="belong"):
        eigen.check(eigen.vectors[-7:][::-1], eigen.values[-7:])


def test_a_wrong_vector_far_below_the_largest_value_is_caught() -> None:
    """s_max/s = 1e4, so λ is 1e-8 of the largest: still far more than rounding leaves."""
    values = np.array([1e-8, 1.1e-8, 1.0])
    matrix, vectors = np.diag(values), np.eye(3)[[0, 2]]  # the first is another value's
    probes = certify.probe_vectors(3)
    matrix[0, 0] = 0.2e-8
    with pytest.raises(NumericalError, match="belong"):
        certify.check_vectors(vectors, values[1:], probes, probes @ matrix)


def test_vectors_that_are_not_orthonormal_are_caught(eigen: _Eigen) -> None:
    repeated = np.repeat(eigen.vectors[-1:], 2, axis=0)
    with pytest.raises(NumericalError, match="orthonormal"):
        eigen.check(repeated, eigen.values[[-1, -1]])
    with pytest.raises(NumericalError, match="orthonormal"):
        eigen.check(eigen.vectors[-7:] * (1.0 + 1e-7), eigen.values[-7:])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_caught(eigen: _Eigen, bad: float) -> None:
    vectors = eigen.vectors[-7:].copy()
    vectors[2, 5] = bad
    with np.errstate(invalid="ignore"), pytest.raises(NumericalError, match="orthonormal"):
        eigen.check(vectors, eigen.values[-7:])


def test_values_that_are_off_are_caught(eigen: _Eigen) -> None:
    with pytest.raises(NumericalError, match="belong"):
        eigen.check(eigen.vectors[-7:], eigen.values[-7:] * (1.0 + 1e-6))


def test_a_factorisation_of_another_matrix_is_caught(eigen: _Eigen) -> None:
    largest = float(eigen.values[-1])
    certify.check_factor(eigen.images * (1.0 + 1e-14) - eigen.images, largest)
    wrong = (eigen.vectors.T * (eigen.values + 1e-7 * largest)) @ eigen.vectors
    for difference in (eigen.probes @ wrong - eigen.images, np.full((PROBES, N), np.nan)):
        with pytest.raises(NumericalError, match="misses its matrix"):
            certify.check_factor(difference, largest)


def test_counts_may_differ_only_by_what_rounding_can_move() -> None:
    certify.check_count(5, 5, 0)
    certify.check_count(6, 5, 1)
    with pytest.raises(NumericalError, match="another count finds 6"):
        certify.check_count(6, 5, 0)


def _tridiagonal(n: int, seed: int, grade: float) -> tuple[Doubles, Doubles]:
    rng = np.random.default_rng(seed)
    fall = np.geomspace(1.0, grade, n)
    return rng.standard_normal(n) * fall, rng.standard_normal(n - 1) * np.sqrt(fall[1:] * fall[:-1])


@given(n=st.integers(1, 40), seed=st.integers(0, 10**6), grade=st.sampled_from([1.0, 1e-3, 1e-9, 1e-15]))
@settings(max_examples=60, deadline=None)
def test_sturm_counts_agree_with_eigvalsh(n: int, seed: int, grade: float) -> None:
    diagonal, off = _tridiagonal(n, seed, grade)
    values = np.linalg.eigvalsh(np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1))
    shifts = np.concatenate([0.5 * (values[1:] + values[:-1]), [values[0] - 1.0, values[-1] + 1.0, 0.0]])
    for shift in shifts:
        if np.abs(values - shift).min() > 1e-14 * np.abs(values).max():
            assert certify.sturm_count(diagonal, off, float(shift)) == np.count_nonzero(values > shift)


@pytest.mark.parametrize("n", [1, 2, 3, 40, 300])
@pytest.mark.parametrize("kind", ["graded", "equal", "split", "noise"])
def test_a_place_is_held_to_what_a_stable_solver_may_be_off_by(n: int, kind: str) -> None:
    rng = np.random.default_rng(n)
    s = {
        "graded": np.geomspace(1e-8, 1.0, n),
        "equal": np.ones(n),
        "split": np.r_[np.ones(n - n // 2), [1e6] * (n // 2)],
    }
    delta = with_spectrum(s.get(kind, np.sort(np.abs(rng.standard_normal(n)))), n)
    diagonal, off, _ = lapack.tridiagonalise(delta.T @ delta)
    values, place = lapack.tridiagonal_values(diagonal, off), (n - 1) // 2
    certify.check_place(diagonal, off, values, place)
    for shift in (-1.0, 1.0):
        wrong = values.copy()
        wrong[place] += shift * 10.0 * (certify.solver_bound(values[-1], n) + 4e-16 * values[-1])
        with pytest.raises(NumericalError, match="as counts on either side of it find"):
            certify.check_place(diagonal, off, wrong, place)


def test_sturm_survives_a_zero_pivot_and_a_split_matrix() -> None:
    """A shift that is a diagonal entry makes the first pivot zero."""
    assert certify.sturm_count(np.array([1.0, 1.0]), np.array([1.0]), 1.0) == 1
    assert certify.sturm_count(np.array([3.0, 1.0, 2.0]), np.zeros(2), 1.5) == 2
    assert certify.sturm_count(np.array([3.0]), np.empty(0), 1.0) == 1


SPECTRA: dict[str, Callable[[int, np.random.Generator], Doubles]] = {
    "noise": lambda n, rng: np.sort(rng.uniform(0.5, 1.5, n)),
    "power law": lambda n, rng: np.asarray(np.arange(1, n + 1) ** -rng.uniform(0.2, 1.5), np.float64),
    "geometric": lambda n, rng: np.geomspace(10.0 ** rng.uniform(-4, -1), 1.0, n),
    "outliers": lambda n, rng: np.append(rng.uniform(0.5, 1.5, n - 3), 10.0 ** rng.uniform(1, 3, 3)),
    "clusters": lambda n, rng: rng.uniform(0.5, 2.0) * np.repeat([1.0, 2.0, 5.0], [n - 20, 12, 8]),
}


def _measured_bound_and_error(delta: Doubles) -> tuple[float, float]:
    """The bound on the float32 Gram matrix's eigenvalues, and their largest true error."""
    source, n = from_delta(delta, "F32"), delta.shape[1]
    probes = certify.probe_vectors(n)
    gram = HostArithmetic().gram(source, probes, "float32")
    spectrum = gram.factorise()
    bound = certify.spectral_bound(gram.images - gram.exact_images)
    bound += certify.spectral_bound(spectrum.product(probes) - gram.images)
    bound += certify.solver_bound(float(spectrum.values[-1]), n)
    truth = np.sort(np.linalg.svd(source.delta(), compute_uv=False) ** 2)
    return bound, float(np.abs(spectrum.values - truth).max())


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [(80, 40), (300, 150), (3000, 30), (200, 200)])
def test_the_measured_bound_bounds_every_eigenvalue_of_a_float32_gram_matrix(kind: str, shape: tuple[int, int]) -> None:
    m, n = shape
    for seed in range(6):
        s = SPECTRA[kind](n, np.random.default_rng(seed))
        bound, error = _measured_bound_and_error(with_spectrum(s, m, seed))
        assert error <= bound


@pytest.mark.parametrize("kind", ["one column", "graded columns", "heavy tails", "one row", "common offset"])
def test_the_bound_holds_where_the_error_is_not_spread_evenly(kind: str) -> None:
    """To the factor that `spectral_bound` states."""
    for seed in range(4):
        delta = np.random.default_rng(seed).standard_normal((700, 260))
        if kind == "one column":
            delta[:, 7] *= 300.0
        elif kind == "graded columns":
            delta *= np.geomspace(1.0, 1e3, 260)
        elif kind == "heavy tails":
            delta = np.random.default_rng(seed).standard_t(1.5, delta.shape)
        elif kind == "one row":
            delta[3] *= 300.0
        else:
            delta += 5.0
        bound, error = _measured_bound_and_error(delta)
        assert error <= 1.5 * bound


@pytest.mark.parametrize("sigma", ["median", "tail"])
def test_values_counted_as_close_are_all_that_the_bound_can_move(sigma: str) -> None:
    """Any perturbation within the bound leaves the rank within the undecidable count."""
    rule = HardThreshold(sigma="tail" if sigma == "tail" else "median")
    rng = np.random.default_rng(1)
    n, m = 80, 320
    for _ in range(200):
        values = np.sort(rng.uniform(0.2, 8.0, n))
        bound = 3e-6 * values[n // 4]  # a wider one decides nothing where a value is close
        threshold, close = decide(values, float(bound), rule, m, n)
        moved = np.sort(values + rng.choice([-bound, bound], n))
        other = rule.estimate(np.sqrt(moved), m, n)
        assert abs(other.rank_kept - threshold.rank_kept) <= close


def test_a_median_within_the_bound_of_zero_is_not_resolved() -> None:
    values = np.concatenate([np.full(30, 1e-9), np.full(10, 1.0)])
    with pytest.raises(UnresolvedError):
        decide(values, 1e-9, HardThreshold(), 100, 40)


def test_mixing_grows_as_kept_and_dropped_values_meet() -> None:
    gaps = [1e-1, 1e-3, 1e-5]
    mixed = [mixing(np.array([0.5, 1.0, 1.0 + gap, 4.0]), 2, 1e-7) for gap in gaps]
    assert mixed[0] < mixed[1] < mixed[2]
    assert mixing(np.array([1.0, 2.0]), 0, 1.0) == mixing(np.array([1.0, 2.0]), 2, 1.0) == 0.0


def test_mixing_predicts_what_an_error_does() -> None:
    """The mean over random errors of a given size, within a factor of three."""
    rng = np.random.default_rng(2)
    n, k, size = 50, 10, 1e-8
    s = np.sort(rng.uniform(1.0, 2.0, n))
    s[n - k] = s[n - k - 1] * (1.0 + 1e-4)
    moved = []
    for _ in range(20):
        error = rng.standard_normal((n, n))
        error = size * (error + error.T) / np.linalg.norm(error + error.T, 2)
        vectors = np.linalg.eigh(np.diag(s**2) + error)[1][:, n - k :]
        kept = np.diag(s) @ vectors @ vectors.T
        moved.append(np.linalg.norm(kept - np.diag(np.where(np.arange(n) >= n - k, s, 0.0))))
    relative = float(np.sqrt(np.mean(np.square(moved))) / np.linalg.norm(s[n - k :]))
    assert relative / 3 < mixing(s**2, k, 0.5 * size) < 3 * relative


def test_orthonormality_of_nothing_is_perfect() -> None:
    assert certify.orthonormality(np.empty((0, 5))) == 0.0


def test_the_bound_of_an_exact_product_is_zero() -> None:
    """Small integers: no rounding anywhere."""
    delta = np.random.default_rng(3).integers(-3, 4, (64, 16)).astype(np.float64)
    gram = HostArithmetic().gram(from_delta(delta, "F32"), certify.probe_vectors(16), "float32")
    assert certify.spectral_bound(gram.images - gram.exact_images) == 0.0
    assert gram.trace == np.sum(delta**2)
    assert lapack.times_symmetric(delta.T @ delta, np.eye(16)).tolist() == (delta.T @ delta).tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [5, 256, 700])
def test_orthonormality_is_that_of_all_products_at_once(dtype: type[np.floating], count: int) -> None:
    rows = np.linalg.qr(np.random.default_rng(3).standard_normal((900, count)))[0].T.astype(dtype)
    rows[count // 2] += dtype(0.01) * rows[0]
    products = rows @ rows.T - np.eye(count, dtype=dtype)
    assert certify.orthonormality(rows) == pytest.approx(np.linalg.norm(products, axis=1).max(), rel=1e-5)


@pytest.mark.parametrize("at", [0, 300, 699])
def test_one_vector_that_is_not_finite_is_enough(at: int) -> None:
    rows = np.linalg.qr(np.random.default_rng(4).standard_normal((900, 700)))[0].T
    rows[at, 5] = np.nan
    assert np.isnan(certify.orthonormality(rows))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("place", ["gram", "hold", "device", "batch"])
def test_the_weights_norm_is_known_to_a_tenth(place: str, wide: bool) -> None:
    """Mixing is held against it, by whatever sums G."""
    rng = np.random.default_rng(5)
    base = rng.standard_normal((40, 700) if wide else (700, 40))
    source = ArraySource(base, base + 0.01 * rng.standard_normal(base.shape), "F64")
    probes, norm = certify.probe_vectors(40), float(np.linalg.norm(base))
    device = DeviceArithmetic("cpu", measured=Rates(1.0, 1.0))
    weight = {
        "gram": lambda: HostArithmetic().gram(source, probes, "float32").weight,
        "hold": lambda: HostArithmetic().hold(source, probes).weight,
        "device": lambda: device.gram(source, probes, "float64").weight,
        "batch": lambda: device.grams([source, source], probes, "float32").members[1].weight,
    }[place]()
    assert abs(weight - norm) < 0.1 * norm
