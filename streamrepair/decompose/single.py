"""The Gram route in float32, made exact where it decides: half the time of float64 for reduction and vectors.

Tridiagonal form, in float32, of a float32 Gram matrix gives all eigenvalues to within e, measured on probes, which is
about the distance of two neighbouring values: too blunt to name the median or to count at τ². But it gives approximate
vectors, and a few of them around the median, a few around τ² and the largest span an almost invariant subspace X of
ΔᵀΔ. Its Ritz values, from float64 products with the Gram matrix or, where that is too blunt, with Δ itself in one more
pass, are right to the square of their residual, and

    the eigenvalues of ΔᵀΔ are those Ritz values and n − |X| others, each within e of a value of T outside the window:

add K·XXᵀ to ΔᵀΔ and to Q·T·Qᵀ, with K as wide as a window, and by Weyl the ordered eigenvalues still differ by e at
most, while those of the window have moved out of the way. So wherever the nearest value of T outside is further away
than e, counting Ritz values and values of T counts eigenvalues of ΔᵀΔ. What rests on float32 alone is the direction of
vectors well above τ.

Source: Parlett, The Symmetric Eigenvalue Problem, sections 10.1, 11.5 and 11.7; Mathias 1998 (quadratic residual
bounds); Davis & Kahan 1970.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamrepair.decompose import certify, lapack, twisted
from streamrepair.decompose.arithmetic import Gram, Products
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.operator import PanelSource
from streamrepair.decompose.truncation import (
    LEAST_FLOAT32_VALUE,
    MOST_MIXING,
    Truncation,
    UnresolvedError,
    mixing,
    roots,
)
from streamrepair.errors import NumericalError
from streamrepair.spectral.threshold import HardThreshold, Threshold

Doubles = NDArray[np.float64]
Singles = NDArray[np.float32]

_BESIDE = 12
"""Vectors on either side of the median, at least; likewise of τ² where vectors there might mix."""
_LARGEST = 16
"""Vectors of the largest values, along which float32 errors of the others are largest."""
_WIDEST = 192
"""Vectors of one window at most; a wider one costs more than float64."""
_FACTOR = 2e-5
"""‖G − QTQᵀ‖/λ_max that float32 explains."""
_ORTHONORMALITY = 2e-5
_RESIDUAL = 2e-5
_SKEW = 1e-5
"""Relative change of eigenvalues by reflectors that are orthogonal to float32 only (Ostrowski)."""
_MOST_SLACK = 1e-5
"""Error of G, in units of the median eigenvalue, up to which it serves in place of another pass over Δ."""
_TALL = 2
"""Rows per column from which products with G and Δ together are worth it."""
_LITTLE_MIXING = 0.25 * MOST_MIXING
"""Of float32 vectors on either side of τ²; below it none of them needs to be made exact."""
_MEDIAN = 2e-5
"""Widest bound of the median eigenvalue, relative: half of it is what τ may be off by."""


class SingleTridiagonal:
    """ssytrd on a scaled copy of G, everything after it that is O(n²) in float64.

    Args:
        gram: (n, n) float64, C upper triangle; left as it is.
    """

    def __init__(self, gram: Doubles) -> None:
        largest = float(gram.diagonal().max())
        self._scale = 2.0 ** np.floor(np.log2(largest))  # a power of two: the copy rounds, the scale does not
        self._reflectors: Singles = np.empty(gram.shape, np.float32)
        for start in range(0, len(gram), 256):
            np.multiply(
                gram[start : start + 256],
                1.0 / self._scale,
                out=self._reflectors[start : start + 256],
                casting="same_kind",
            )
        diagonal, off, scales = lapack.tridiagonalise(self._reflectors)
        self._scales = scales
        self._diagonal, self._off = diagonal.astype(np.float64), off.astype(np.float64)
        self._values = lapack.tridiagonal_values(self._diagonal, self._off)
        self.values: Doubles = self._values * self._scale
        """(n,) eigenvalues of T, ascending, in the units of G."""

    def product(self, probes: Doubles) -> Doubles:
        """(p, n) Q·T·Qᵀ·X."""
        rotated = probes.astype(np.float32)
        lapack.rotate_back(self._reflectors, self._scales, rotated, transpose=True)
        image = rotated * self._diagonal
        image[:, :-1] += rotated[:, 1:] * self._off
        image[:, 1:] += rotated[:, :-1] * self._off
        rotated = image.astype(np.float32)
        lapack.rotate_back(self._reflectors, self._scales, rotated)
        images: Doubles = rotated.astype(np.float64) * self._scale
        return images

    def check_count(self, at: float) -> None:
        """Hold that as many values lie above `at` as a Sturm sequence of T finds there.

        Raises:
            NumericalError: they do not.
        """
        place = int(np.clip(np.searchsorted(self.values, at), 1, len(self.values) - 1))
        between = 0.5 * float(self._values[place - 1] + self._values[place])  # nowhere near a value
        counted = certify.sturm_count(self._diagonal, self._off, between)
        certify.check_count(counted, len(self.values) - place, close=0)

    def vectors(self, places: NDArray[np.intp]) -> Singles:
        """(k, n) eigenvectors of the values at these places, as rows; not orthonormal where values are clustered."""
        n = len(self._values)
        rows: Singles = np.empty((len(places), n), np.float32)
        for start in range(0, len(places), twisted.at_once(n)):
            batch = places[start : start + twisted.at_once(n)]
            rows[start : start + len(batch)] = twisted.vectors(self._diagonal, self._off, self._values[batch])
        lapack.rotate_back(self._reflectors, self._scales, rows)
        return rows


class _Slack(NamedTuple):
    """How far products may be from those with ΔᵀΔ: spectral norms of the difference."""

    values: float
    """Of the inner products, which give the Ritz values."""
    residuals: float
    """Of the images."""


@dataclass(frozen=True, slots=True)
class _Windows:
    """Ritz pairs of ΔᵀΔ in the windows, and what T says of the rest."""

    values: Doubles
    """(w,) Ritz values, ascending."""
    vectors: Doubles
    """(w, n) as rows."""
    residuals: Doubles
    """(w, w) inner products of the residuals ΔᵀΔ·y − θ·y."""
    slack: _Slack
    outside: Doubles
    """Values of T at the other places, ascending."""
    blunt: float
    """How far eigenvalues may be from `outside`."""

    def place(self, place: int) -> tuple[float, float]:
        """The eigenvalue with `place` below it, and how far it may be off.

        Raises:
            UnresolvedError: it may not be among the Ritz values.
        """
        value = float(np.sort(np.concatenate([self.values, self.outside]))[place])
        self.clear(value)
        if value not in self.values:
            raise UnresolvedError("the median is not in the window that was made for it")
        return value, self.error(value)

    def clear(self, value: float, unsure: float = 0.0) -> None:
        """Hold that all that lies near `value`, which may itself be off by `unsure`, is in the windows.

        Raises:
            UnresolvedError: it is not.
        """
        if self.outside.size == 0:
            return
        if not value > 0.0:
            raise UnresolvedError("the squared threshold vanishes")
        # K of the module's text is taken as `value`: the coupling of window and rest then moves the rest by ‖R‖²/K.
        coupling = (float(np.trace(self.residuals)) ** 0.5 + len(self.values) ** 0.5 * self.slack.residuals) ** 2
        margin = self.blunt + _SKEW * value + 2.0 * coupling / value + unsure
        nearest = self._distance(value)
        if not nearest > margin:
            raise UnresolvedError(
                f"values outside the window come within {nearest / value:.1e}, {margin / value:.1e} is known"
            )

    def error(self, value: float) -> float:
        """How far a Ritz value near `value` may be from an eigenvalue: ‖R‖₂² over the distance to the values outside.

        R are the residuals of the Ritz vectors that are nearer than those; what comes by way of the other windows is
        smaller by another such quotient.
        """
        nearest = self._distance(value)
        here = np.abs(self.values - value) <= nearest
        if not here.any():
            return self.slack.values
        size = float(np.linalg.eigvalsh(self.residuals[np.ix_(here, here)])[-1]) ** 0.5 + self.slack.residuals
        gap = nearest - self.blunt
        off = min(size, size * size / gap) if gap > 0.0 else size
        return float(self.slack.values + off)

    def _distance(self, value: float) -> float:
        """From the nearest value of T outside."""
        return float(np.abs(self.outside - value).min(initial=np.inf))

    def mixing(self, cut: float) -> float:
        """‖Δ*′ − Δ*‖/‖Δ*‖ to expect of what Ritz vectors on either side of τ² have of each other.

        As `truncation.mixing` has it. Both errors are taken as spread: that of the products over n places, that of the
        span over those of the windows.
        """
        n, w = self.vectors.shape[1], len(self.values)
        each = self.slack.values / (2.0 * n**0.5) + (self.error(cut) - self.slack.values) / w**0.5
        kept, dropped = self.values[self.values > cut], self.values[self.values <= cut]
        if len(kept) == 0:
            return 0.0
        i, j = kept[:, None], dropped[None, :]
        return float(each * np.sqrt(np.sum((i + np.abs(j)) / np.square(i - j)) / kept.sum()))


def truncate(
    source: PanelSource, rule: HardThreshold, *, arithmetic: HostArithmetic, gram: Gram, probes: Doubles
) -> Truncation:
    """Decide and factor one delta, given its float32 Gram matrix.

    Raises:
        UnresolvedError: the error is too large for windows of a reasonable width, or values lie too near τ.
        NumericalError: LAPACK failed, or its answer did not pass the checks.
    """
    assert gram.matrix is not None
    if rule.sigma != "median":
        raise UnresolvedError("this estimator needs more values than the median")
    form = SingleTridiagonal(gram.matrix)
    error = _factor_error(form, gram, probes)
    first = rule.estimate(roots(form.values), source.rows, source.cols)
    if first.s_median**2 < max(LEAST_FLOAT32_VALUE, 2.0 * error):
        raise UnresolvedError(f"bound {error:.1e} against a median eigenvalue of {first.s_median**2:.1e}")
    basis = _Basis.chosen(form, first, error)
    del form
    matrix = _Matrix(source, rule, gram, probes)
    least = float(np.finfo(np.float32).eps) * gram.trace / source.cols  # likewise
    slack = max(certify.spectral_bound(gram.images - gram.exact_images), least)
    tries: list[tuple[Products, _Slack]] = []
    if slack <= _MOST_SLACK * first.s_median**2:
        tries.append((_by_gram(gram.matrix), _Slack(slack, slack)))
    if source.rows >= _TALL * source.cols:
        tries.append((_by_both(gram.matrix, partial(arithmetic.inner_products, source)), _Slack(0.0, slack)))
    tries.append((partial(arithmetic.products, source), _Slack(0.0, 0.0)))
    for by in tries[:-1]:
        with suppress(UnresolvedError):  # by more of the delta itself it may be
            return _decided(basis, by, matrix)
    return _decided(basis, tries[-1], matrix)


def _decided(basis: _Basis, by: tuple[Products, _Slack], matrix: _Matrix) -> Truncation:
    """The decision by Ritz values of products, and how far those may be off."""
    source, rule, gram, probes = matrix
    windows, n = _ritz(*by, basis), source.cols
    median, off = windows.place((n - 1) // 2)
    if not off <= _MEDIAN * median:
        raise UnresolvedError(f"the median eigenvalue is known to {off / median:.1e} only")
    values = np.sort(np.concatenate([windows.values, windows.outside]))
    threshold = rule.estimate(roots(values), source.rows, n)
    cut = threshold.tau * threshold.tau
    windows.clear(cut, cut / median * off)
    margin = windows.error(cut) + cut / median * off
    if close := int(np.count_nonzero(np.abs(windows.values - cut) <= margin)):
        raise UnresolvedError(f"{close} values within {margin:.1e} of the squared threshold")
    turned = mixing(values, threshold.rank_kept, basis.error, basis.exact) + windows.mixing(cut)
    if turned > MOST_MIXING:
        raise UnresolvedError(f"kept and dropped vectors may mix by {turned:.1e}")
    vectors = _assembled(windows, basis, values, threshold.rank_kept)
    top = values[n - threshold.rank_kept :]
    defect, residual = certify.check_vectors(
        vectors, top, probes, gram.exact_images, orthonormal=_ORTHONORMALITY, belonging=_RESIDUAL
    )
    return Truncation(
        values=roots(values),
        threshold=threshold,
        vh=vectors,
        frob_delta_in=gram.trace**0.5,
        backend="gram-float32",
        certificate=certify.Certificate(max(off, margin), defect, residual),
    )


class _Matrix(NamedTuple):
    """What is decided, by what, and what it is held against."""

    source: PanelSource
    rule: HardThreshold
    gram: Gram
    probes: Doubles


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
    """‖ΔᵀΔ − QTQᵀ‖₂."""

    @staticmethod
    def chosen(form: SingleTridiagonal, first: Threshold, error: float) -> _Basis:
        """By the float32 values and the threshold that they give.

        Raises:
            UnresolvedError: windows would have to be too wide.
            NumericalError: the values are not those of T.
        """
        t, n = form.values, len(form.values)
        form.check_count(first.s_median**2)
        cut = first.tau * first.tau  # infinite rather than an OverflowError
        form.check_count(cut)
        middle = _window(t, first.s_median**2, error, _BESIDE)
        mixed = mixing(t, first.rank_kept, error) > _LITTLE_MIXING
        edge = _window(t, cut, error, _BESIDE if mixed else 0)
        places = np.unique(np.concatenate([middle, edge, np.arange(max(0, n - _LARGEST), n)]))
        wanted = np.union1d(places, np.arange(n - first.rank_kept, n))
        exact = slice(int(edge[0]), int(edge[-1]) + 1) if len(edge) else slice(0, 0)
        return _Basis(form.vectors(wanted), np.isin(wanted, places), np.delete(t, places), exact, error)


def _factor_error(form: SingleTridiagonal, gram: Gram, probes: Doubles) -> float:
    """‖ΔᵀΔ − QTQᵀ‖₂: products, reduction and all, from probes that met none of it."""
    values, largest = form.values, float(form.values[-1])
    if not (np.isfinite(values).all() and largest > 0.0):
        raise NumericalError(f"eigenvalues up to {largest} of a matrix of trace {gram.trace}")
    difference = form.product(probes) - gram.exact_images
    certify.check_factor(difference, largest, tolerance=_FACTOR)
    # Few entries can share their rounding with the images that they are held against: there is a least error.
    least = float(np.finfo(np.float32).eps * largest / np.sqrt(len(values)))
    return max(certify.spectral_bound(difference), least) + certify.solver_bound(largest, len(values))


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


def _window(values: Doubles, at: float, error: float, beside: int) -> NDArray[np.intp]:
    """Places of the values that may be near `at`, and at least so many on either side."""
    reach = 4.0 * error + 2.0 * _SKEW * at
    middle = int(np.searchsorted(values, at))
    low = min(int(np.searchsorted(values, at - reach)), middle - beside)
    high = max(int(np.searchsorted(values, at + reach)), middle + beside)
    if high - low > _WIDEST:
        raise UnresolvedError(f"{high - low} values within {reach / at:.1e} of one that decides")
    return np.arange(max(0, low), min(len(values), high))


def _ritz(products: Products, slack: _Slack, basis: _Basis) -> _Windows:
    """Rayleigh–Ritz in float64, in the span of the windows' vectors."""
    rows = basis.rows[basis.windowed].astype(np.float64)
    if not np.isfinite(rows).all():  # LAPACK's QR need not return
        raise NumericalError("vectors of the tridiagonal form are not finite")
    frame: Doubles = np.ascontiguousarray(np.linalg.qr(rows.T)[0].T)
    images, inner = products(frame)
    if not np.isfinite(inner).all():
        raise NumericalError("products with the delta are not finite")
    values, mix = np.linalg.eigh(inner)
    vectors = mix.T @ frame
    residuals = mix.T @ images - values[:, None] * vectors
    return _Windows(values, vectors, residuals @ residuals.T, slack, basis.outside, basis.error)


def _assembled(windows: _Windows, basis: _Basis, values: Doubles, rank: int) -> Singles:
    """(rank, n) kept vectors in the order of `values`: exact ones where there are, float32 ones elsewhere."""
    vectors: Singles = np.empty((rank, basis.rows.shape[1]), np.float32)
    exact = np.isin(values[len(values) - rank :], windows.values)
    plain = basis.rows[~basis.windowed]
    vectors[exact] = windows.vectors[len(windows.values) - int(exact.sum()) :]
    vectors[~exact] = plain[len(plain) - int(rank - exact.sum()) :]
    return vectors
