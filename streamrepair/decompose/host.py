"""Arithmetic on the CPU: NumPy for conversions, SciPy's BLAS and LAPACK in place for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np

from streamrepair.decompose import deflated, halves, lapack
from streamrepair.decompose.arithmetic import Gram, Merger, Precision, Vectors, on_host
from streamrepair.decompose.convert import (
    STORED_TYPE,
    Doubles,
    Raw,
    Real,
    RealType,
    difference,
    merge_type,
    narrow,
    widen,
)
from streamrepair.decompose.deflated import Deflated
from streamrepair.decompose.halves import Both, in_halves, in_turn, middle
from streamrepair.decompose.held import Held, HeldDelta
from streamrepair.decompose.operator import Panel, PanelSource, blocks, sampled_squares
from streamrepair.decompose.scratch import Scratch
from streamrepair.decompose.tridiagonal import TridiagonalSpectrum

_FLUSH_ROWS = 8192
"""Rows summed in float32 before the sum is added to the float64 one: longer runs lose digits, shorter ones time."""
_STRIPE_ROWS = 256
"""Rows of a held delta that are widened, or of what lies along a basis that are factored, at once."""
MERGE_ARRAYS = ("coefficients", "merged", "out", "gathered")
"""Names of the merge's arrays in the scratch."""


class HostArithmetic:
    """The CPU.

    Args:
        scratch: the calling worker's working memory; its own by default.
        both: does two pieces of work on a large matrix; one after the other by default.
    """

    precisions: tuple[Precision, ...] = ("float32", "float64")

    def __init__(self, scratch: Scratch | None = None, both: Both = in_turn) -> None:
        self.scratch, self.both = scratch or Scratch(), both

    def gram(self, source: PanelSource, probes: Doubles, precision: Precision) -> Gram:
        """G by ?syrk, block by block in a fixed order; float32 products are summed in float64."""
        n = source.cols
        real: RealType = np.float32 if precision == "float32" else np.float64
        partial: Real = self.scratch.zeros("partial" if precision == "float32" else "gram", (n, n), real)
        total: Doubles = self.scratch.array("gram", (n, n), np.float64) if precision == "float32" else partial
        columns = np.ascontiguousarray(probes.T, real)
        exact = np.zeros((n, len(probes)))
        rows, first, squares = 0, True, 0.0
        for block in blocks(source):
            squares += sampled_squares(block)
            delta = self._delta(block, real)
            self._add_gram(delta, partial, beta=0.0 if partial is not total and rows == 0 else 1.0)
            exact += delta.T @ (delta @ columns)
            rows += len(delta)
            if partial is not total and rows >= _FLUSH_ROWS:
                _flush(partial, total, first=first)
                rows, first = 0, False
        if partial is not total and (rows or first):
            _flush(partial, total, first=first)
        del partial
        self.scratch.release("delta")
        self.scratch.release("partial")
        self.scratch.release("gram")  # from here on it belongs to the result
        images = lapack.times_symmetric(total, probes)
        trace = float(np.trace(total))
        exact_images, weight = np.ascontiguousarray(exact.T), squares**0.5
        return Gram(images, exact_images, trace, weight, lambda: TridiagonalSpectrum(total, self.both), total)

    def _add_gram(self, delta: Real, gram: Real, *, beta: float) -> None:
        """gram ← ΔᵀΔ + beta·gram, upper triangle; from so many columns on in two halves of equally many operations."""
        n = len(gram)
        if not halves.is_cut(n):
            lapack.add_gram(delta, gram, beta=beta)
            return
        h = middle(n)
        left, right = delta[:, :h], delta[:, h:]

        def corners() -> None:
            lapack.add_gram(left, gram[:h, :h], beta=beta)
            lapack.add_gram(right, gram[h:, h:], beta=beta)

        self.both(corners, lambda: lapack.add_product(left.T, right, gram[:h, h:], beta=beta))

    def deflated(self, source: PanelSource, probes: Doubles, basis: Doubles) -> Deflated:
        """The Gram matrix of Δ′ = Δ − (ΔQ)Qᵀ in float64, Q the rows of (r, n) `basis`, and how it is tied to ΔQ.

        Its images of probes are seen another way than by Δ′: of PX, P = I − QQᵀ, under Δ and Δᵀ, then P again.
        """
        n, count = source.cols, len(basis)
        self.scratch.drop("partial", *MERGE_ARRAYS)  # their memory is for what lies along Q
        total: Doubles = self.scratch.zeros("gram", (n, n), np.float64)
        columns = np.ascontiguousarray(_apart(probes, basis).T)
        exact, coupled, factor = np.zeros((n, len(probes))), np.zeros((count, n)), np.zeros((0, count))
        squares = 0.0
        for block in blocks(source):
            squares += sampled_squares(block)
            delta = self._delta(block, np.float64)
            exact += delta.T @ (delta @ columns)
            inside: Doubles = np.zeros((len(delta), count))
            for _ in range(2):  # what rounding leaves along Q the first time would turn the vectors of G′
                along: Doubles = delta @ basis.T
                left, right = (basis.T, along.T) if block.wide else (along, basis)
                lapack.add_product(left, right, delta.T if block.wide else delta, alpha=-1.0)
                inside += along
            lapack.add_product(inside.T, delta, coupled)
            for start in range(0, len(inside), _STRIPE_ROWS):
                stripe = np.concatenate([factor, inside[start : start + _STRIPE_ROWS]])
                factor = np.asarray(np.linalg.qr(stripe, mode="r"), np.float64)
            self._add_gram(delta, total, beta=1.0)
        self.scratch.release("delta")
        self.scratch.release("gram")  # from here on it belongs to the result
        trace = float(np.trace(total))
        # Above all that is left, and no two alike: a cluster's vectors would be dear.
        standing = trace * (2.0 + np.arange(count) / count)
        lapack.add_gram(np.sqrt(standing)[:, None] * basis, total, beta=1.0)
        exact_images = _apart(exact.T, basis) + (standing * (probes @ basis.T)) @ basis
        images = lapack.times_symmetric(total, probes)
        largest, turned = deflated.parts(factor, _apart(coupled, basis))
        moved, weight = deflated.moved(turned), squares**0.5
        factorise = partial(TridiagonalSpectrum, total, self.both)
        return Deflated(Gram(images, exact_images, trace, weight, factorise, total, moved), largest, turned)

    def hold(self, source: PanelSource, probes: Doubles) -> Held:
        """Δ whole in float32, and in float64 its images of probes, in one pass."""
        held: Real | None = None
        exact, trace, squares = np.zeros((source.cols, len(probes))), 0.0, 0.0
        for block in blocks(source):
            squares += sampled_squares(block)
            if held is None:  # in the order in which it is stored
                held = np.empty((source.rows, source.cols), np.float32, order="F" if block.wide else "C")
            delta = held[block.start : block.start + block.rows]
            self._subtract(block, delta.T if block.wide else delta)
            for start in range(0, len(delta), _STRIPE_ROWS):
                # Products in float32 would be those of the operator itself, and show nothing of its error.
                stripe = delta[start : start + _STRIPE_ROWS].astype(np.float64)
                exact += stripe.T @ (stripe @ probes.T)
                trace += float(np.einsum("ij,ij->", stripe, stripe))
        assert held is not None
        return Held(HeldDelta(held, self.both), np.ascontiguousarray(exact.T), trace, squares**0.5)

    def products(self, source: PanelSource, vectors: Doubles) -> tuple[Doubles, Doubles]:
        """(k, n) ΔᵀΔ·v for each row v of `vectors`, and (k, k) inner products vᵀΔᵀΔ·w, in float64, in one pass."""
        images, inner = np.zeros(vectors.shape), np.zeros((len(vectors), len(vectors)))
        for delta, lifted in self._lifted(source, vectors):
            images += lifted.T @ delta
            inner += lifted.T @ lifted
        return images, inner

    def inner_products(self, source: PanelSource, vectors: Doubles, precision: Precision) -> Doubles:
        """(k, k) inner products vᵀΔᵀΔ·w of the rows of (k, n) `vectors`, in one pass.

        In float32 that is the precision of Δ·v; lengths and angles of those are always summed in float64.
        """
        inner = np.zeros((len(vectors), len(vectors)))
        for _, lifted in self._lifted(source, vectors.astype(precision, copy=False)):
            lengths = lifted.astype(np.float64, copy=False)
            inner += lengths.T @ lengths
        return inner

    def _lifted(self, source: PanelSource, vectors: Real) -> Iterator[tuple[Real, Real]]:
        """Δ of each block, in the precision of `vectors`, and its products with their rows, (rows, k)."""
        real: RealType = np.float32 if vectors.dtype == np.float32 else np.float64
        for block in blocks(source):
            delta = self._delta(block, real)
            yield delta, delta @ vectors.T
        self.scratch.release("delta")

    def triangular_factor(self, source: PanelSource) -> Doubles:
        """R by sequential TSQR (Demmel, Grigori, Hoemmen & Langou 2012)."""
        import scipy.linalg  # late: a quarter of a second that most runs need not spend

        r: Doubles = np.zeros((0, source.cols))
        for block in blocks(source):
            stacked = np.concatenate([r, self._delta(block, np.float64)])
            # LAPACK's QR of a matrix with NaN need not return.
            if not np.isfinite(stacked).all():
                return np.full((source.cols, source.cols), np.nan)
            r = scipy.linalg.qr(stacked, mode="r", overwrite_a=True, check_finite=False)[0][: source.cols]
        self.scratch.release("delta")
        return r

    def svd(self, matrix: Doubles, driver: str) -> tuple[Doubles, Doubles, Doubles]:
        """LAPACK's gesdd ("default") or gesvd."""
        return lapack.svd(matrix, divide=driver != "gesvd")

    def merger(self, vh: Vectors, out_dtype: str) -> HostMerger:
        """Two ?gemm per block, the second onto W_base."""
        return HostMerger(on_host(vh), out_dtype, self.scratch, self._delta, self.both)

    def _delta(self, block: Panel, real: RealType) -> Real:
        """Δ of a block, (rows, n), in the scratch's one place for it; a transposed view for a wide one."""
        stored: Real = self.scratch.array("delta", block.ft.shape, real)
        self._subtract(block, stored)
        return stored.T if block.wide else stored

    def _subtract(self, block: Panel, out: Real) -> None:
        """Δ of a block as it is stored, in the precision of `out`."""

        def part(rows: slice) -> None:
            difference(block.ft[rows], block.ft_dtype, block.base[rows], block.base_dtype, out[rows])

        in_halves(part, len(out), out.shape[0 if block.wide else 1], self.both)


def _apart(rows: Doubles, basis: Doubles) -> Doubles:
    """Each of the rows less its parts along the orthonormal rows of `basis`; twice is enough (Kahan and Parlett)."""
    for _ in range(2):
        rows = rows - (rows @ basis.T) @ basis
    return rows


def _flush(partial: Real, total: Doubles, *, first: bool) -> None:
    """A float32 sum onto the float64 one, which it is the first of or not."""
    if first:
        total[:] = partial
    else:
        total += partial


class HostMerger(Merger):
    """The merge of one matrix on the CPU.

    Args:
        delta: gives Δ of a block, tall, in the scratch's one place for it. both: does two halves of a large block.
    """

    def __init__(
        self, vh: Real, out_dtype: str, scratch: Scratch, delta: Callable[[Panel, RealType], Real], both: Both
    ) -> None:
        self._real: RealType = merge_type(out_dtype)
        self._basis: Real = vh.astype(self._real, copy=False)
        self._out_dtype, self._scratch, self._delta, self._both = out_dtype, scratch, delta, both
        self._lost = 0.0

    @property
    def climbed(self) -> tuple[str, ...]:
        """Nothing: there is no other place to go to."""
        return ()

    def lost(self) -> float:
        """Squared rounding error of all blocks so far."""
        return self._lost

    def merged(self, panels: Iterable[Panel]) -> Iterator[tuple[Panel, Raw]]:
        """Each block with its result, in an array that the next one overwrites."""
        for panel in panels:
            for block in panel.blocks():
                yield block, self._merged(block)

    def _merged(self, block: Panel) -> Raw:
        delta, cols = self._delta(block, self._real), self._basis.shape[1]
        coefficients: Real = self._scratch.array("coefficients", (len(delta), len(self._basis)), self._real)
        merged: Real = self._scratch.array("merged", block.base.shape, self._real)
        same = STORED_TYPE[self._out_dtype] is self._real
        out: Raw = merged if same else self._scratch.array("out", merged.shape, STORED_TYPE[self._out_dtype])
        lost: list[float] = []  # of one part or two: either order has the same sum

        def project(rows: slice) -> None:
            with np.errstate(over="ignore", invalid="ignore"):  # `lost` tells
                np.matmul(delta[rows], self._basis.T, out=coefficients[rows])

        def merge(rows: slice) -> None:
            """Rows as stored: of a wide matrix they are columns of what is tall."""
            widen(block.base[rows], block.base_dtype, merged[rows])
            if len(self._basis):
                left, right = (self._basis.T, coefficients.T) if block.wide else (coefficients, self._basis)
                lapack.add_product(left[rows], right, merged[rows])
            if same:
                lost.append(0.0 if np.isfinite(merged[rows]).all() else np.inf)
            else:
                lost.append(narrow(merged[rows], self._out_dtype, out[rows]))

        if len(self._basis):
            in_halves(project, len(delta), cols, self._both)
        in_halves(merge, len(merged), cols, self._both)
        self._lost += sum(lost)
        return out
