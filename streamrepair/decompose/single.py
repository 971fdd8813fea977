"""The Gram route in float32, made exact where it decides: half the time of float64 for reduction and vectors.

Tridiagonal form, in float32, of a float32 Gram matrix gives all eigenvalues to within e, measured on probes, which is
about the distance of two neighbouring values: too blunt to name the median or to count at τ². But it gives approximate
vectors, and in the span of those around the median, around τ² and of the largest values `windows` finds exact values.
What rests on float32 alone is the direction of vectors well above τ.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from streamrepair.decompose import certify, lapack, twisted
from streamrepair.decompose.arithmetic import Gram, Products
from streamrepair.decompose.convert import Doubles, Singles
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.operator import PanelSource
from streamrepair.decompose.symmetric import Seen
from streamrepair.decompose.tridiagonal import SingleTridiagonal
from streamrepair.decompose.truncation import (
    LEAST_FLOAT32_VALUE,
    Truncation,
    UnresolvedError,
    errors_along,
    mixing,
    most_mixing,
    refuse_estimator,
    refuse_mixing,
    roots,
)
from streamrepair.decompose.windows import SKEW, Slack, Windows, ritz
from streamrepair.errors import NumericalError
from streamrepair.spectral.threshold import HardThreshold, Threshold

_BESIDE = 12
"""Vectors on either side of the median, at least; likewise of τ² where vectors there might mix."""
_FURTHEST = 64
"""Vectors on either side of the median at most; with more float64 is quicker."""
_COUPLED = 0.04
"""‖R‖² of the vectors around the median, in units of e², as it was seen on many spectra: a guess that is checked."""
_HOPELESS = 4
"""Times that width: where no more than that seems to be needed it is tried, as ‖R‖² is less in graded spectra."""
_LARGEST = 16
"""Vectors of the largest values, along which float32 errors of the others are largest."""
_WIDEST = 192
"""Vectors of one window at most; a wider one costs more than float64."""
_FACTOR = 2e-5
"""‖G − QTQᵀ‖/λ_max that float32 explains."""
_ORTHONORMALITY = 2e-5
_RESIDUAL = 2e-5
_MOST_SLACK = 1e-5
"""Error of G, in units of the median eigenvalue, up to which it serves in place of another pass over Δ."""
_MOST_MEASURED = 4e-4
"""Likewise, up to which float32 products of Δ are tried: they and G differ on windows by a 25th to a 40th of it."""
_TALL = 2
"""Rows per column from which products with G and Δ together are worth it."""
_UNEVEN = 2.0
"""‖H − H′‖₂ of `windows` in units of T's error, which is of noise spread evenly: a reduction's lies along the largest
values. Up to 1.6 was met, up to 4 of ‖ΔᵀΔ − QTQᵀ‖₂ itself, before the windows have taken the largest vectors out."""
_MEDIAN = 2e-5
"""Widest bound of the median eigenvalue, relative: half of it is what τ may be off by."""


def truncate(
    source: PanelSource, rule: HardThreshold, *, arithmetic: HostArithmetic, gram: Gram, probes: Doubles
) -> Truncation:
    """Decide and factor one delta, given its float32 Gram matrix.

    Raises:
        UnresolvedError: the error is too large for windows of a reasonable width, or values lie too near τ.
        NumericalError: LAPACK failed, or its answer did not pass the checks.
    """
    assert gram.matrix is not None
    refuse_estimator(rule)
    form = SingleTridiagonal(gram.matrix, arithmetic.both)
    error, seen = _factor_error(form, gram, probes)
    first = rule.estimate(roots(form.values), source.rows, source.cols)
    if first.s_median**2 < max(LEAST_FLOAT32_VALUE, 2.0 * error):
        raise UnresolvedError(f"bound {error:.1e} against a median eigenvalue of {first.s_median**2:.1e}")
    basis = _Basis.chosen(form, first, error, seen, gram.weight)
    del form
    decided = partial(_decided, basis, source=source, rule=rule, gram=gram, probes=probes)
    least = float(np.finfo(np.float32).eps) * gram.trace / source.cols  # likewise
    slack = max(certify.spectral_bound(gram.images - gram.exact_images), least)
    tries: list[tuple[Products, Slack]] = []
    if slack <= _MOST_SLACK * first.s_median**2:
        tries.append((_by_gram(gram.matrix), Slack(slack, slack)))
    inner = partial(arithmetic.inner_products, source)
    if slack <= _MOST_MEASURED * first.s_median**2:
        tries.append((_by_both(gram.matrix, partial(inner, precision="float32")), Slack(least, slack, held=True)))
    if source.rows >= _TALL * source.cols:
        tries.append((_by_both(gram.matrix, partial(inner, precision="float64")), Slack(0.0, slack)))
    tries.append((partial(arithmetic.products, source), Slack(0.0, 0.0)))
    for by in tries[:-1]:
        with suppress(UnresolvedError):  # by more of the delta itself it may be
            return decided(by)
    return decided(tries[-1])


def _decided(
    basis: _Basis,
    by: tuple[Products, Slack],
    *,
    source: PanelSource,
    rule: HardThreshold,
    gram: Gram,
    probes: Doubles,
) -> Truncation:
    """The decision by Ritz values of products, and how far those may be off."""
    windows, n = basis.windows(*by), source.cols
    median, off = windows.place((n - 1) // 2)
    if not off <= _MEDIAN * median:
        raise UnresolvedError(f"the median eigenvalue is known to {off / median:.1e} only")
    values = np.sort(np.concatenate([windows.values, windows.outside]))
    threshold = rule.estimate(roots(values), source.rows, n)
    cut = threshold.tau * threshold.tau
    unsure = float(cut / median * off)
    windows.clear(cut, unsure)
    margin = windows.error(cut, unsure) + unsure
    if close := int(np.count_nonzero(~(np.abs(windows.values - cut) > margin))):
        raise UnresolvedError(f"{close} values within {margin:.1e} of the squared threshold")
    outside = mixing(values, threshold.rank_kept, basis.errors(threshold.rank_kept), basis.exact)
    top = values[n - threshold.rank_kept :]
    refuse_mixing(outside + windows.mixing(cut), top, gram.weight)
    vectors = _assembled(windows, basis, values, threshold.rank_kept)
    certify.check_vectors(vectors, top, probes, gram.exact_images, orthonormal=_ORTHONORMALITY, belonging=_RESIDUAL)
    return Truncation(
        values=roots(values),
        threshold=threshold,
        vh=vectors,
        frob_delta_in=gram.trace**0.5,
        backend="gram-float32",
    )


@dataclass(frozen=True, slots=True)
class _Basis:
    """Float32 vectors of the values that may be kept and of those in the windows."""

    rows: Singles
    """(k, n), in the order of their values."""
    windowed: NDArray[np.bool_]
    """(k,) which of them belong to windows."""
    outside: Doubles
    """Values of T that no window holds, ascending."""
    exact: slice
    """Places of the window around τ²."""
    error: float
    """‖ΔᵀΔ − QTQᵀ‖₂, if spread evenly."""
    along: Doubles
    """‖(ΔᵀΔ − QTQᵀ)·v‖ of the vectors of the largest values, ascending."""
    blunt: float
    """How far what ΔᵀΔ has outside the windows may be from T's values there."""

    def windows(self, products: Products, slack: Slack) -> Windows:
        """The windows' Ritz pairs."""
        return ritz(products, slack, self.rows[self.windowed], self.outside, self.blunt)

    def errors(self, rank: int) -> Doubles:
        """(rank,) of the vectors of the largest values; of more than were foretold what is to be expected of any."""
        known = self.along[max(0, len(self.along) - rank) :]
        return np.concatenate([np.full(rank - len(known), 0.5 * self.error), known])

    @staticmethod
    def chosen(form: SingleTridiagonal, first: Threshold, error: float, seen: Seen, weight: float) -> _Basis:
        """By the float32 values and the threshold that they give.

        Args:
            error: ‖ΔᵀΔ − QTQᵀ‖₂. seen: what it makes of probes. weight: about ‖W_ft‖_F.

        Raises:
            UnresolvedError: windows would have to be too wide.
            NumericalError: the values are not those of T.
        """
        t, n = form.values, len(form.values)
        form.check_count(first.s_median**2)
        cut = first.tau * first.tau  # infinite rather than an OverflowError
        form.check_count(cut)
        middle = _middle(t, first.s_median**2, error)
        # It comes out at a third to a tenth of that once it is seen what the error does to the vectors.
        mixed = mixing(t, first.rank_kept, 0.5 * error) > most_mixing(t[n - first.rank_kept :], weight)
        edge = _window(t, cut, error, _BESIDE if mixed else 0)
        places = np.unique(np.concatenate([middle, edge, np.arange(max(0, n - _LARGEST), n)]))
        wanted = np.union1d(places, np.arange(n - first.rank_kept, n))
        exact = slice(int(edge[0]), int(edge[-1]) + 1) if len(edge) else slice(0, 0)
        rows, residual = form.vectors(wanted, seen.probes)
        # They may have as much of the vectors of values that are further than `error` away.
        tilt = residual / error + SKEW
        blunt = _UNEVEN * error + tilt * tilt * float(t[-1])
        along = errors_along(rows[len(rows) - first.rank_kept :], seen.images)
        return _Basis(rows, np.isin(wanted, places), np.delete(t, places), exact, error, along, blunt)


def _factor_error(form: SingleTridiagonal, gram: Gram, probes: Doubles) -> tuple[float, Seen]:
    """‖ΔᵀΔ − QTQᵀ‖₂, if spread evenly, products, reduction and all; and what it makes of probes that met none of it."""
    values, largest = form.values, float(form.values[-1])
    if not (np.isfinite(values).all() and largest > 0.0):
        raise NumericalError(f"eigenvalues up to {largest} of a matrix of trace {gram.trace}")
    difference = form.product(probes) - gram.exact_images
    certify.check_factor(difference, largest, tolerance=_FACTOR)
    # Few entries can share their rounding with the images that they are held against: there is a least error.
    least = float(np.finfo(np.float32).eps * largest / np.sqrt(len(values)))
    norm = max(certify.spectral_bound(difference), least) + certify.solver_bound(largest, len(values))
    return norm, Seen(probes, difference)


def _by_gram(matrix: Doubles) -> Products:
    """Images under G, and inner products, of rows."""

    def products(rows: Doubles) -> tuple[Doubles, Doubles]:
        images = lapack.times_symmetric(matrix, rows)
        return images, images @ rows.T

    return products


def _by_both(matrix: Doubles, inner: Callable[[Doubles], Doubles]) -> Products:
    """Images under G, and inner products with the delta itself: half the flops of both with a tall one."""

    def products(rows: Doubles) -> tuple[Doubles, Doubles]:
        return lapack.times_symmetric(matrix, rows), inner(rows)

    return products


def _middle(values: Doubles, at: float, error: float) -> NDArray[np.intp]:
    """Places around the median, as many as its bound needs to become sharp.

    Raises:
        UnresolvedError: too many.
    """
    window = _window(values, at, error, _BESIDE)
    gap = 0.5 * float(values[window[-1]] - values[window[0]])
    if (excess := _COUPLED * error * error / max(gap, error) / (_MEDIAN * at)) > 1.0:
        beside = int(np.ceil(0.75 * len(window) * excess))  # the bound falls as the window's width rises
        if beside > _HOPELESS * _FURTHEST:
            raise UnresolvedError(f"bound {error:.1e} against a median eigenvalue of {at:.1e}")
        window = _window(values, at, error, min(beside, _FURTHEST))
    return window


def _window(values: Doubles, at: float, error: float, beside: int) -> NDArray[np.intp]:
    """Places of the values that may be near `at`, and at least so many on either side."""
    reach = 4.0 * error + 2.0 * SKEW * at
    middle = int(np.searchsorted(values, at))
    low = min(int(np.searchsorted(values, at - reach)), middle - beside)
    high = max(int(np.searchsorted(values, at + reach)), middle + beside)
    if high - low > _WIDEST:
        raise UnresolvedError(f"{high - low} values within {reach / at:.1e} of one that decides")
    return np.arange(max(0, low), min(len(values), high))


def _assembled(windows: Windows, basis: _Basis, values: Doubles, rank: int) -> Singles:
    """(rank, n) kept vectors in the order of `values`: exact ones where there are, float32 ones elsewhere.

    Raises:
        UnresolvedError: more are kept than the float32 values foretold.
    """
    vectors: Singles = np.empty((rank, basis.rows.shape[1]), np.float32)
    exact = np.isin(values[len(values) - rank :], windows.values)
    plain, places = np.flatnonzero(~basis.windowed), np.flatnonzero(~exact)
    if len(places) > len(plain):
        raise UnresolvedError("values between the threshold and its float32 estimate are kept and have no vectors")
    vectors[exact] = windows.vectors[len(windows.values) - int(exact.sum()) :]
    plain = plain[len(plain) - len(places) :]
    for start in range(0, len(places), twisted.AT_ONCE):  # a selection of rows is a copy of them
        part = slice(start, start + twisted.AT_ONCE)
        vectors[places[part]] = basis.rows[plain[part]]
    return vectors
