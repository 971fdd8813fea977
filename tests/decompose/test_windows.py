from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamrepair.decompose.truncation import UnresolvedError
from streamrepair.decompose.windows import Slack, Windows, ritz
from streamrepair.errors import NumericalError

N, WIDTH, MIDDLE = 90, 24, 45
Doubles = NDArray[np.float64]


def _symmetric(values: Doubles, seed: int) -> Doubles:
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))[0]
    return (q * values) @ q.T


def _values(shape: str, seed: int) -> Doubles:
    rng = np.random.default_rng(seed)
    return {
        "even": np.linspace(1.0, 2.0, N),
        "random": np.sort(rng.uniform(1.0, 2.0, N)),
        "pairs": np.repeat(np.linspace(1.0, 2.0, N // 2), 2),
        "cluster": np.sort(np.r_[np.full(9, 1.5), rng.uniform(1.0, 2.0, N - 9)]),
    }[shape]


def _disturbance(norm: float, seed: int) -> Doubles:
    """(N, N) symmetric, random, of this spectral norm."""
    noise = np.random.default_rng(seed).standard_normal((N, N))
    noise += noise.T
    return norm / float(np.linalg.norm(noise, 2)) * noise


def _windows(exact: Doubles, e: float, *, seed: int = 0, span_noise: float = 0.0, slack: float = 0.0) -> Windows:
    """Windows around the middle, from a matrix that is off by e and products that are off by `slack`."""
    t, vectors = np.linalg.eigh(exact + _disturbance(e, seed))
    places = np.arange(MIDDLE - WIDTH // 2, MIDDLE + WIDTH // 2)
    rows = vectors[:, places].T + span_noise * np.random.default_rng(seed).standard_normal((WIDTH, N))
    seen = exact + _disturbance(slack, seed + 1)

    def products(x: Doubles) -> tuple[Doubles, Doubles]:
        return x @ seen, x @ seen @ x.T

    return ritz(products, Slack(slack, slack), rows, np.delete(t, places), e)


def _assert_claims_hold(windows: Windows, values: Doubles) -> None:
    """At and around the middle: the value within the bound that comes with it, or no claim."""
    for place in (MIDDLE - 4, MIDDLE, MIDDLE + 3):
        try:
            value, bound = windows.place(place)
        except UnresolvedError:
            continue
        assert abs(value - values[place]) <= bound + 1e-13


@given(
    seed=st.integers(0, 10_000),
    off=st.floats(1e-6, 3.0),
    span_noise=st.sampled_from([0.0, 1e-7, 1e-4, 1e-3]),
    slack=st.sampled_from([0.0, 1e-6, 1e-3]),
    shape=st.sampled_from(["even", "random", "pairs", "cluster"]),
)
@settings(max_examples=200, deadline=None)
def test_what_is_claimed_of_a_place_is_so(seed: int, off: float, span_noise: float, slack: float, shape: str) -> None:
    """The eigenvalue at a place, within the bound that comes with it, or no claim; e in units of the mean distance."""
    values = _values(shape, seed)
    exact = _symmetric(values, seed)
    windows = _windows(exact, off / N, seed=seed, span_noise=span_noise, slack=slack)
    _assert_claims_hold(windows, values)


@given(
    seed=st.integers(0, 10_000),
    off=st.floats(1e-6, 3.0),
    slack=st.sampled_from([1e-6, 1e-4, 1e-3]),
    share=st.floats(0.0, 0.5),
    shape=st.sampled_from(["even", "random", "pairs", "cluster"]),
)
@settings(max_examples=100, deadline=None)
def test_inner_products_made_apart_are_off_by_what_they_differ_from_those_of_the_images_by(
    seed: int, off: float, slack: float, share: float, shape: str
) -> None:
    """Where the images are the worse ones, and what is wrong with either has nothing to do with the other.

    Window vectors of a value a thousand times the others have errors in proportion: they spoil no bound of the others.
    """
    values = np.r_[_values(shape, seed)[:-1], 2e3]
    exact = _symmetric(values, seed)
    t, vectors = np.linalg.eigh(exact + _disturbance(off / N, seed))
    places = np.r_[np.arange(MIDDLE - WIDTH // 2, MIDDLE + WIDTH // 2), N - 1]
    scales = np.sqrt(values)  # the errors of products Δ·v are in proportion to their lengths
    images = exact + _disturbance(slack, seed + 1)
    q = np.linalg.eigh(exact)[1]
    inner = exact + (q * scales) @ _disturbance(share * slack, seed + 2) @ (q * scales).T
    by = Slack(0.0, slack, held=True)
    windows = ritz(lambda x: (x @ images, x @ inner @ x.T), by, vectors[:, places].T, np.delete(t, places), off / N)
    assert windows.apart < 4.0 * slack
    _assert_claims_hold(windows, values)


def test_inner_products_that_are_not_of_a_square_bound_nothing() -> None:
    rows = np.eye(N)[:4]
    for inner in (-np.eye(4), np.diag([0.0, 1.0, 1.0, 1.0])):
        windows = ritz(lambda x, inner=inner: (x, inner), Slack(0.0, 0.0, held=True), rows, np.ones(N - 4), 0.0)
        assert windows.apart == windows.error(2.0) == np.inf


@pytest.mark.parametrize("shape", ["even", "random", "pairs", "cluster"])
def test_and_claims_are_made(shape: str) -> None:
    """Whatever the values are like, where T is off by no more than half of their mean distance."""
    for seed in range(5):
        values = _values(shape, seed)
        windows = _windows(_symmetric(values, seed), 0.5 / N, seed=seed, slack=1e-6)
        value, bound = windows.place(MIDDLE)
        assert abs(value - values[MIDDLE]) <= bound < 1e-3


@pytest.mark.parametrize("off", [0.1, 0.5, 1.0])
def test_a_median_that_t_cannot_name_is_known_to_many_digits(off: float) -> None:
    """Off by up to the mean distance of two values: T alone has the wrong one as often as not."""
    values = np.linspace(1.0, 2.0, N)
    windows = _windows(_symmetric(values, 3), off / N)
    value, bound = windows.place(MIDDLE)
    assert bound < 0.1 / N
    assert abs(value - values[MIDDLE]) <= bound


def test_a_value_outside_that_may_be_anywhere_near_spoils_the_claim() -> None:
    values = np.linspace(1.0, 2.0, N)
    windows = _windows(_symmetric(values, 3), 13.0 / N)
    with pytest.raises(UnresolvedError, match="outside the window"):
        windows.place(MIDDLE)


def test_nothing_in_a_window_is_no_error_where_nothing_is_near() -> None:
    """A squared threshold in a gap needs no vectors around it, unless it may itself be off by as much as the gap."""
    values = np.concatenate([np.linspace(1.0, 2.0, N - 5), np.linspace(5.0, 6.0, 5)])
    windows = _windows(_symmetric(values, 4), 1e-4)
    windows.clear(3.0)
    assert windows.error(3.0) == 0.0
    with pytest.raises(UnresolvedError):
        windows.clear(3.0, unsure=1.1)


def test_what_is_not_finite_is_an_error() -> None:
    rows = np.eye(N)[:4]
    for spoilt in (np.full_like(rows, np.nan), rows):
        with pytest.raises(NumericalError, match="not finite"):
            ritz(lambda x: (x, np.full((4, 4), np.inf)), Slack(0.0, 0.0), spoilt, np.ones(N - 4), 0.0)


@pytest.mark.parametrize("slack", [0.0, 1e-6])
def test_inner_products_of_something_else_are_caught(slack: float) -> None:
    """A residual of the values that they give is no measure of these values' error."""
    exact = _symmetric(_values("random", 0), 0)
    t, vectors = np.linalg.eigh(exact)
    places = np.arange(MIDDLE - 12, MIDDLE + 12)
    for off in (0.0, 0.5 * slack, 1e-4):
        wrong = np.zeros((len(places), len(places)))
        wrong[5, 5] = off

        def products(x: Doubles, wrong: Doubles = wrong) -> tuple[Doubles, Doubles]:
            return x @ exact, x @ exact @ x.T + wrong

        if off > slack:
            with pytest.raises(NumericalError, match="inner products"):
                ritz(products, Slack(0.0, slack), vectors[:, places].T, np.delete(t, places), 1e-6)
        else:
            ritz(products, Slack(0.0, slack), vectors[:, places].T, np.delete(t, places), 1e-6)


def test_rows_that_span_less_than_they_are_many_are_no_windows() -> None:
    rows = np.eye(N)[[0, 1, 2, 2]]
    with pytest.raises(UnresolvedError, match="parallel"):
        ritz(lambda x: (x, x @ x.T), Slack(0.0, 0.0), rows, np.ones(N - 4), 0.0)


def test_the_bound_is_by_the_distance_that_is_left() -> None:
    """A residual of 1e-2, a value outside at 0.11 of which 0.1 are unsure: 1e-4 over what is left, not over all."""
    residuals = np.array([[1e-4]])
    windows = Windows(np.array([1.0]), np.eye(1, 5), residuals, Slack(0.0, 0.0), 0.0, np.array([1.11]), 0.08)
    assert windows.error(1.0, 0.02) == pytest.approx(1e-2)
    assert windows.error(1.0) == pytest.approx(1e-4 / (0.11 - 0.08 - 1e-5), rel=1e-6)
