from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from streamrepair.decompose import certify, gram
from streamrepair.decompose.arithmetic import Count, Gram, on_host
from streamrepair.decompose.device.spectrum import DeviceVectors, EighSpectrum, GramMatrix
from streamrepair.decompose.truncation import UnresolvedError
from streamrepair.errors import NumericalError
from streamrepair.spectral.threshold import HardThreshold
from tests.decompose.test_cholesky_count import VALUES, ArrayMatrix, _with_values

Doubles = NDArray[np.float64]
RULE = HardThreshold()


@pytest.fixture
def matrix() -> Doubles:
    return _with_values(VALUES)


def test_the_proofs_compute_what_numpy_does(matrix: Doubles) -> None:
    values, columns = np.linalg.eigh(matrix)
    rows = columns.T[43:] + 1e-3
    probes = certify.probe_vectors(50)
    device, host = GramMatrix(torch.from_numpy(matrix)), ArrayMatrix(matrix)
    np.testing.assert_allclose(device.residual(rows, values[43:]), host.residual(rows, values[43:]), rtol=1e-10)
    for shift in (1.0, 3.0):
        mine, theirs = (place.deflated(shift, rows, values[43:], probes) for place in (device, host))
        assert mine[0] == theirs[0] == (shift == 3.0)
        assert np.abs(mine[1]).max() < 1e-12
    np.testing.assert_array_equal(matrix, _with_values(VALUES))


@pytest.mark.parametrize("along", ["the largest", "the nearest to the threshold"])
def test_mixing_is_reckoned_from_the_error_along_each_kept_vector(along: str) -> None:
    """What matters is the error that a vector close to τ² meets; its norm alone is the same in both cases."""
    m, n, kept = 240, 60, 12
    values = np.linspace(0.5, 1.5, n)
    values[-kept:] = np.geomspace(40.0, 400.0, kept)
    cut = RULE.estimate(np.sqrt(values), m, n).tau ** 2
    values[-kept - 1 : -kept + 1] = cut * 0.9995, cut * 1.0005
    columns = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n))).Q
    matrix, probes = (columns * values) @ columns.T, certify.probe_vectors(n)
    vector = columns[:, -1] if along == "the largest" else columns[:, -kept]
    images = probes @ matrix
    exact_images = images - 1.2e-4 * np.outer(probes @ vector, vector)
    spectrum = EighSpectrum.of(torch.from_numpy(matrix))
    summed = Gram(images, exact_images, float(values.sum()), 1.0, lambda: spectrum)
    if along == "the largest":
        assert gram.conclude(summed, spectrum, RULE, m, "float32").threshold.rank_kept == kept
    else:
        with pytest.raises(UnresolvedError, match="may mix"):
            gram.conclude(summed, spectrum, RULE, m, "float32")


def test_a_matrix_with_nan_has_no_cholesky_factor(matrix: Doubles) -> None:
    matrix[7, 7] = np.nan
    positive, difference = GramMatrix(torch.from_numpy(matrix)).deflated(
        300.0, np.zeros((0, 50)), np.zeros(0), certify.probe_vectors(50)
    )
    assert not positive
    assert np.isnan(difference).any()


@pytest.mark.parametrize(("shift", "above"), [(0.1, 50), (3.0, 5), (50.0, 1), (100.0, 0)])
def test_counts(matrix: Doubles, shift: float, above: int) -> None:
    assert EighSpectrum.of(torch.from_numpy(matrix)).count_above(shift, 0.0) == Count(above, above)


@pytest.mark.parametrize(("index", "factor"), [(44, 3.0), (45, 0.3), (49, 0.001)])
def test_a_value_moved_across_the_shift_is_noticed_by_the_count(matrix: Doubles, index: int, factor: float) -> None:
    """Which a count of the values themselves would not do. The other vectors and values stay as they are."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(matrix))
    moved = values.clone()
    moved[index] *= factor
    order = torch.argsort(moved)
    spectrum = EighSpectrum(torch.from_numpy(matrix), moved[order], vectors[:, order])
    with pytest.raises(NumericalError):
        spectrum.count_above(3.0, 0.0)


def test_kept_vectors_do_not_hold_the_others_in_memory(matrix: Doubles) -> None:
    top = EighSpectrum.of(torch.from_numpy(matrix)).top(5)
    assert top.rows.untyped_storage().nbytes() == 5 * 50 * 8


def test_vectors_are_read_by_numpy_as_an_array(matrix: Doubles) -> None:
    columns = np.linalg.eigh(matrix)[1]
    vectors = EighSpectrum.of(torch.from_numpy(matrix)).top(3)
    assert (vectors.shape, len(vectors)) == ((3, 50), 3)
    assert on_host(vectors).dtype == np.float64
    np.testing.assert_allclose(np.abs(np.sum(on_host(vectors) * columns.T[-3:], axis=1)), 1.0, rtol=1e-12)
    assert np.asarray(vectors, np.float32).dtype == np.float32


def test_checks_of_vectors_on_the_device_find_what_those_on_the_host_find(matrix: Doubles) -> None:
    probes = certify.probe_vectors(50)
    values, columns = np.linalg.eigh(matrix)
    rows = columns.T[-5:].copy()
    on_device = DeviceVectors(torch.from_numpy(rows))
    images = probes @ matrix
    certify.check_vectors(on_device, values[-5:], probes, images, orthonormal=1e-13, belonging=1e-13)
    np.testing.assert_allclose(on_device.times(probes), rows @ probes.T, atol=1e-13)
    for fault, words in ((1.0 + 1e-7, "orthonormal"), (np.nan, "orthonormal")):
        spoiled = DeviceVectors(torch.from_numpy(rows * np.append(np.ones(4), fault)[:, None]))
        assert spoiled.orthonormality() == pytest.approx(certify.orthonormality(rows * fault), nan_ok=True, rel=1e-3)
        with pytest.raises(NumericalError, match=words):
            certify.check_vectors(spoiled, values[-5:], probes, images)
    with pytest.raises(NumericalError, match="belong"):
        certify.check_vectors(on_device, values[-6:-1], probes, images)


def test_no_vectors_are_orthonormal() -> None:
    none, probes = DeviceVectors(torch.zeros((0, 5), dtype=torch.float64)), np.ones((8, 5))
    assert none.orthonormality() == 0.0
    certify.check_vectors(none, np.zeros(0), probes, probes)


def test_vectors_arrive_in_the_precision_that_is_asked_for() -> None:
    """In stripes, the last of which is no full one."""
    rows = np.random.default_rng(3).standard_normal((601, 40))
    on_device = DeviceVectors(torch.from_numpy(rows))
    assert np.array_equal(np.asarray(on_device), rows)
    assert np.array_equal(np.asarray(on_device, np.float32), rows.astype(np.float32))
