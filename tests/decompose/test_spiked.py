"""Deltas of which a few values are thousands of times the rest, with and without values in between."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from streamrepair.decompose import ladder
from streamrepair.decompose.host import HostArithmetic
from streamrepair.spectral.threshold import HardThreshold
from tests.decompose.sources import from_delta, with_spectrum

Doubles = NDArray[np.float64]


def _in_between(largest: list[float], beside: float, many: int, top: float, seed: int) -> Doubles:
    """Noise; `many` values of `beside` and one of `top` times its mean eigenvalue; and the largest."""
    s = np.sort(np.linalg.svd(np.random.default_rng(seed).standard_normal((400, 360)), compute_uv=False))
    k = len(largest)
    mean = np.mean(s[: -k - many - 1] ** 2)
    s[-k - many - 1 : -k - 1] = np.sqrt(beside * mean) * np.linspace(1.0, 1.02, many)
    s[-k - 1], s[-k:] = np.sqrt(top * mean), np.sqrt(np.array(largest) * mean)
    delta = with_spectrum(s, 400, seed)
    return delta / s[-1] * 5.0


def _one_column(seed: int) -> Doubles:
    rng = np.random.default_rng(seed)
    delta = rng.standard_normal((400, 300))
    delta += 60.0 * np.outer(rng.standard_normal(400), np.eye(300)[3] + np.eye(300)[9]) / 2.0**0.5
    delta[:, 7] *= 1e10
    return delta / 1e10


def _one_row(seed: int) -> Doubles:
    delta = np.random.default_rng(seed).standard_normal((400, 300))
    delta[5] *= 3e4
    return delta


SEVEN, STEEP = [1.2e4, 2e4, 4e4, 8e4, 1.6e5, 3.2e5, 1e6], [3e4, 4e4, 6e4, 1e5, 2e5, 6e5, 6e6]
CASES = {
    "steep": lambda seed: _in_between(STEEP, 450.0, 10, 850.0, seed),
    "few between": lambda seed: _in_between(SEVEN, 100.0, 3, 250.0, seed),
    "a signal between": lambda seed: _in_between(SEVEN, 40.0, 6, 90.0, seed),
    "one column": _one_column,
    "one row": _one_row,
}


@pytest.mark.parametrize("scale", [0.05, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_rank_values_and_vectors_are_those_of_a_float64_svd(case: str, scale: float) -> None:
    rule = HardThreshold(scale=scale)
    for seed in range(9, 13):
        source = from_delta(CASES[case](seed), "BF16")
        delta = source.delta()
        u, s, vh = np.linalg.svd(delta, full_matrices=False)
        exact = rule.estimate(s, *delta.shape)
        found = ladder.decompose(source, rule, arithmetic=HostArithmetic(), backend="gram")
        kept, v = exact.rank_kept, np.asarray(found.vh, np.float64)
        assert found.threshold.rank_kept == kept
        assert found.threshold.tau == pytest.approx(exact.tau, rel=1e-5)
        assert np.linalg.norm(v @ v.T - np.eye(kept)) < 1e-3
        star = (u[:, :kept] * s[:kept]) @ vh[:kept]
        assert np.linalg.norm(delta @ v.T @ v - star) <= 1e-4 * np.linalg.norm(star)
        np.testing.assert_allclose(found.values[-kept:], np.sort(s)[-kept:], rtol=1e-4)
