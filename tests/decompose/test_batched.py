from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from streamrepair.decompose import gram
from streamrepair.decompose.arithmetic import on_host
from streamrepair.decompose.batched import truncate_batch
from streamrepair.decompose.device import DeviceArithmetic
from streamrepair.decompose.device.rates import Rates
from streamrepair.decompose.truncation import NonFiniteDeltaError, Truncation, UnresolvedError
from streamrepair.errors import NumericalError
from tests.decompose.memory_faults import BRIEFLY, MESSAGE, above
from tests.decompose.sources import ArraySource, fine_tuned, from_delta, low_rank_plus_noise
from tests.decompose.test_backends import RULE, _check, _heavy

DEVICE = DeviceArithmetic("cpu", measured=Rates(1.0, 1.0))
ROWS, COLS = 2_500, 48


def _batch(count: int = 5) -> list[ArraySource]:
    """Different ranks and spectra, several blocks, one of them stored wide."""
    sources = [fine_tuned(low_rank_plus_noise(ROWS, COLS, 1 + i, seed=i), "BF16") for i in range(count - 2)]
    return [*sources, fine_tuned(_heavy(ROWS, COLS, 0.6), "BF16"), sources[0].transposed()]


def _same(one: Truncation, other: Truncation) -> None:
    assert one.threshold.rank_kept == other.threshold.rank_kept
    assert one.threshold.tau == pytest.approx(other.threshold.tau, rel=1e-12)
    assert (one.backend, one.undecidable) == (other.backend, other.undecidable)
    np.testing.assert_allclose(one.values, other.values, rtol=1e-9)
    mine, theirs = on_host(one.vh), on_host(other.vh)
    np.testing.assert_allclose(mine.T @ mine, theirs.T @ theirs, atol=1e-9)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_batch_says_what_each_member_would_alone(precision: Any) -> None:
    sources = _batch()
    results = truncate_batch(sources, RULE, DEVICE, precision=precision)
    assert len({result.threshold.rank_kept for result in results if isinstance(result, Truncation)}) >= 4
    for source, result in zip(sources, results, strict=True):
        assert isinstance(result, Truncation)
        _check(source, result)
        if precision == "float64":
            _same(result, gram.truncate(source, RULE, arithmetic=DEVICE, precision=precision))


def test_the_smallest_batches() -> None:
    (source,) = sources = _batch()[:1]
    assert truncate_batch([], RULE, DEVICE) == []
    (result,) = truncate_batch(sources, RULE, DEVICE)
    assert isinstance(result, Truncation)
    _check(source, result)
    (row,) = truncate_batch([from_delta(np.arange(1.0, 9.0)[None, :])], RULE, DEVICE)
    assert isinstance(row, Truncation)
    assert row.threshold.rank_kept == 0


def test_members_that_fail_take_no_other_with_them() -> None:
    sources = _batch()
    delta = low_rank_plus_noise(ROWS, COLS, 3)
    spoiled = delta.copy()
    spoiled[2_400, 7] = np.nan
    empty, low_rank = np.zeros_like(delta), np.outer(np.arange(float(ROWS)), np.ones(COLS))
    mixed = [from_delta(spoiled, "F32"), *sources, from_delta(empty, "F32"), from_delta(low_rank, "F32")]
    results = truncate_batch(mixed, RULE, DEVICE)
    assert isinstance(results[0], NonFiniteDeltaError)
    assert isinstance(results[-2], UnresolvedError)
    assert isinstance(results[-1], UnresolvedError)
    for source, result in zip(sources, results[1:-2], strict=True):
        assert isinstance(result, Truncation)
        _check(source, result)


def test_a_batch_that_eigh_gives_up_on_is_factorised_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.linalg.eigh
    third = gram_of(_batch()[2])

    def stubborn(matrix: torch.Tensor) -> Any:
        if matrix.ndim == 3 or torch.allclose(matrix, third):
            raise torch.linalg.LinAlgError("failed to converge")  # type: ignore[attr-defined]
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    results = truncate_batch(_batch(), RULE, DEVICE)
    assert [isinstance(result, Truncation) for result in results] == [True, True, False, True, True]
    assert "converge" in str(results[2])


def gram_of(source: ArraySource) -> torch.Tensor:
    delta = source.delta()
    return torch.from_numpy(delta.T @ delta)


def _swapped(values: torch.Tensor, vectors: torch.Tensor) -> None:
    vectors[1] = vectors[1].flip(1)


def _nan(values: torch.Tensor, vectors: torch.Tensor) -> None:
    values[1, 3] = float("nan")


def _untouched(values: torch.Tensor, vectors: torch.Tensor) -> None:
    """As batched solvers have been seen to do: the diagonal and unit vectors."""
    vectors[1] = torch.eye(COLS, dtype=torch.float64)


def _raised(values: torch.Tensor, vectors: torch.Tensor) -> None:
    values[1, -3] = 0.99 * values[1, -2]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fault", [_swapped, _nan, _untouched, _raised])
def test_a_wrong_member_is_caught_and_the_others_are_not(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[..., None]
) -> None:
    original = torch.linalg.eigh

    def faulty(matrix: torch.Tensor) -> Any:
        values, vectors = original(matrix)
        fault(values, vectors)
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", faulty)
    results = truncate_batch(_batch(), RULE, DEVICE)
    assert [isinstance(result, Truncation) for result in results] == [True, False, True, True, True]


def test_a_batch_without_memory_is_halved() -> None:
    """Five Δ of a block in float64 are 3.9 MB together; two of them fit."""
    sources = _batch()
    with above(2_000_000) as memory:
        results = truncate_batch(sources, RULE, DEVICE)
    assert memory.failures >= 1
    for source, result in zip(sources, results, strict=True):
        assert isinstance(result, Truncation)
        _check(source, result)


def test_a_single_matrix_without_memory_is_an_error_that_holds_no_memory() -> None:
    with above(10_000):
        results = truncate_batch(_batch(), RULE, DEVICE)
    assert [str(result) for result in results] == [BRIEFLY] * 5
    for result in results:
        assert isinstance(result, NumericalError)
        assert result.__traceback__ is result.__cause__ is result.__context__ is None


def test_where_the_sound_members_cannot_be_gathered_each_is_factorised_where_it_lies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sources = _batch()
    mixed = [from_delta(np.full((ROWS, COLS), np.nan), "F32"), *sources]
    original = torch.Tensor.__getitem__

    def full(self: torch.Tensor, which: Any) -> Any:
        if isinstance(which, list):
            raise torch.OutOfMemoryError(MESSAGE)
        return original(self, which)

    monkeypatch.setattr(torch.Tensor, "__getitem__", full)
    results = truncate_batch(mixed, RULE, DEVICE)
    assert isinstance(results[0], NonFiniteDeltaError)
    for source, result in zip(sources, results[1:], strict=True):
        assert isinstance(result, Truncation)
        _check(source, result)


def test_what_is_returned_holds_its_vectors_only() -> None:
    for result in truncate_batch(_batch(), RULE, DEVICE):
        assert isinstance(result, Truncation)
        rows = result.vh.rows  # type: ignore[union-attr]
        assert rows.untyped_storage().nbytes() == 8 * result.threshold.rank_kept * COLS


def test_matrices_of_different_shapes_are_no_batch() -> None:
    with pytest.raises(AssertionError, match="one shape"):
        truncate_batch([_batch()[0], from_delta(np.ones((10, 4)))], RULE, DEVICE)
