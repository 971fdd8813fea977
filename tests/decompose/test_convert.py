from __future__ import annotations

import numpy as np
import pytest
import torch

from streamrepair.decompose.convert import Raw, Real, difference, narrow, widen

ALL_16_BITS = np.arange(1 << 16, dtype=np.uint16)
LARGEST_BFLOAT16 = 0x7F7F


def _as_bfloat16(values: Real) -> Raw:
    out = np.empty(values.shape, np.uint16)
    narrow(values.copy(), "BF16", out)
    return out


def _by_torch(values: Real) -> Raw:
    bits: Raw = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    return bits


@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_every_bfloat16_widens_as_in_torch(real: type[np.float32] | type[np.float64]) -> None:
    out = np.empty(len(ALL_16_BITS), real)
    widen(ALL_16_BITS, "BF16", out)
    expected = torch.from_numpy(ALL_16_BITS).view(torch.bfloat16).to(torch.float32).numpy()
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(np.signbit(out), np.signbit(expected))


def test_every_finite_bfloat16_survives_the_way_there_and_back() -> None:
    values = np.empty(len(ALL_16_BITS), np.float32)
    widen(ALL_16_BITS, "BF16", values)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(_as_bfloat16(values[finite]), ALL_16_BITS[finite])


@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_every_float16_widens_exactly(real: type[np.float32] | type[np.float64]) -> None:
    halves = ALL_16_BITS.view(np.float16)
    out = np.empty(len(halves), real)
    widen(halves, "F16", out)
    np.testing.assert_array_equal(out.astype(np.float16), halves)


def test_random_bit_patterns_narrow_as_in_torch() -> None:
    """Normal, subnormal and huge numbers of either sign; all finite."""
    bits = np.random.default_rng(1).integers(0, 1 << 32, 400_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    np.testing.assert_array_equal(_as_bfloat16(values), _by_torch(values))


def test_ties_and_their_neighbours_narrow_as_in_torch() -> None:
    """Every half-way point between two bfloat16 numbers, and the float32 numbers on either side of it."""
    upper = np.arange(LARGEST_BFLOAT16 + 1, dtype=np.uint32) << np.uint32(16)
    for low in (0x7FFF, 0x8000, 0x8001):
        values = (upper | np.uint32(low)).view(np.float32)
        for signed in (values, -values):
            np.testing.assert_array_equal(_as_bfloat16(signed), _by_torch(signed))


def test_overflow_to_infinity_shows_as_an_infinite_loss() -> None:
    values = np.array([3.4e38, 1.0], np.float32)
    out = np.empty(2, np.uint16)
    assert narrow(values, "BF16", out) == np.inf
    assert out[0] == 0x7F80


@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_float16_overflow_shows_as_an_infinite_loss(real: type[np.float32] | type[np.float64]) -> None:
    out = np.empty(2, np.float16)
    assert narrow(np.array([1e5, 1.0], real), "F16", out) == np.inf


def test_float16_narrows_to_nearest_even_including_subnormals() -> None:
    values = np.random.default_rng(2).standard_normal(50_000).astype(np.float32)
    values *= np.float32(2.0) ** np.random.default_rng(3).integers(-30, 10, len(values)).astype(np.float32)
    out = np.empty(len(values), np.float16)
    lost = narrow(values.copy(), "F16", out)
    np.testing.assert_array_equal(out, torch.from_numpy(values).to(torch.float16).numpy())
    assert lost == pytest.approx(float(np.sum((values - out.astype(np.float64)) ** 2)), rel=1e-4)


def test_loss_is_the_sum_of_squared_rounding_errors() -> None:
    """Over several pieces, so that each enters once."""
    values = np.random.default_rng(4).standard_normal((700, 301)).astype(np.float32)
    out = np.empty(values.shape, np.uint16)
    lost = narrow(values.copy(), "BF16", out)
    rounded = np.empty(values.shape)
    widen(out, "BF16", rounded)
    assert lost == pytest.approx(float(np.sum((values - rounded) ** 2)), rel=1e-5)


@pytest.mark.parametrize("size", [1e-43, 1e-39, 1e-22, 1e22, 1e37])
def test_loss_counts_errors_whose_squares_float32_cannot_hold(size: float) -> None:
    """Neither infinite, which would pass for an overflow of the values, nor zero, which would pass for exact."""
    values = (size * np.random.default_rng(6).uniform(1, 2, (70, 50))).astype(np.float32)
    out = np.empty(values.shape, np.uint16)
    lost = narrow(values.copy(), "BF16", out)
    rounded = np.empty(values.shape)
    widen(out, "BF16", rounded)
    assert lost == pytest.approx(float(np.sum((values - rounded) ** 2)), rel=1e-5, abs=0)
    assert 0 < lost < np.inf


def test_float64_narrows_to_float32_in_one_rounding() -> None:
    values = np.random.default_rng(5).standard_normal(1000)
    out = np.empty(1000, np.float32)
    lost = narrow(values.copy(), "F32", out)
    np.testing.assert_array_equal(out, values.astype(np.float32))
    assert lost == pytest.approx(float(np.sum((values - out) ** 2)), rel=1e-12)


@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("ft_dtype", "base_dtype"), [("BF16", "BF16"), ("F16", "BF16"), ("F32", "F16"), ("F64", "F32")]
)
def test_difference_of_any_two_dtypes(
    real: type[np.float32] | type[np.float64], ft_dtype: str, base_dtype: str
) -> None:
    ft, ft_values = _stored(ft_dtype, seed=6)
    base, base_values = _stored(base_dtype, seed=7)
    out = np.empty(ft.shape, real)
    difference(ft, ft_dtype, base, base_dtype, out)
    np.testing.assert_array_equal(out, (ft_values - base_values).astype(real))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_column_blocks_are_read_where_they_lie(dtype: str) -> None:
    """A wide weight's panels are slices of its columns, not contiguous."""
    ft, ft_values = _stored(dtype, seed=8)
    base, base_values = _stored(dtype, seed=9)
    columns = slice(11, 200)
    out = np.empty((len(ft), 189))
    difference(ft[:, columns], dtype, base[:, columns], dtype, out)
    np.testing.assert_array_equal(out, (ft_values - base_values)[:, columns])


def test_a_small_delta_of_float64_weights_is_not_lost_on_the_way_to_float32() -> None:
    base = np.random.default_rng(10).standard_normal((50, 40))
    delta = 1e-12 * np.random.default_rng(11).standard_normal((50, 40))
    ft = base + delta
    out = np.empty(base.shape, np.float32)
    difference(ft, "F64", base, "F64", out)
    np.testing.assert_array_equal(out, (ft - base).astype(np.float32))


def test_subtraction_of_neighbouring_bfloat16_numbers_is_exact_in_float32() -> None:
    ft = ALL_16_BITS[:LARGEST_BFLOAT16]
    base = ALL_16_BITS[1 : LARGEST_BFLOAT16 + 1]
    single, double = np.empty(len(ft), np.float32), np.empty(len(ft))
    difference(ft, "BF16", base, "BF16", single)
    difference(ft, "BF16", base, "BF16", double)
    np.testing.assert_array_equal(single, double)


def _stored(dtype: str, seed: int) -> tuple[Raw, Real]:
    """(300, 301) normal numbers as stored, and in float64; several pieces long."""
    values = np.random.default_rng(seed).standard_normal((300, 301)).astype(np.float32)
    if dtype == "BF16":
        bits = _by_torch(values)
        return bits, (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    raw = values.astype({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype])
    return raw, raw.astype(np.float64)
