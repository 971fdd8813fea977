"""What a place of computation has to offer the backends: `host` is NumPy and LAPACK, `device` is torch on a GPU.

The backends decide; an arithmetic only computes. Small results (values, probes) always come back as NumPy arrays, so
that decisions and checks are made by the same code wherever the work was done. Kept vectors stay where they were made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import DTypeLike

from streamrepair.decompose.convert import Doubles, Raw, Real
from streamrepair.decompose.operator import Panel, PanelSource
from streamrepair.errors import NumericalError, brief

Precision = Literal["float32", "float64"]
Products = Callable[[Doubles], tuple[Doubles, Doubles]]
"""(k, n) rows → their images under ΔᵀΔ, and (k, k) inner products of rows and images."""


class ResidentVectors(Protocol):
    """(k, n) float64 vectors as rows in a device's memory; NumPy reads them as an array, by way of a copy."""

    @property
    def shape(self) -> tuple[int, int]:
        """(k, n)."""
        ...

    def __len__(self) -> int:
        """k."""
        ...

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> Doubles:
        """A copy in host memory."""
        ...

    def times(self, columns: Doubles) -> Doubles:
        """(k, p) inner products with the rows of (p, n) `columns`."""
        ...

    def orthonormality(self) -> float:
        """Norm of the largest row of VVᵀ − I; NaN if a vector is not finite."""
        ...


Vectors = Real | ResidentVectors
"""(k, n) vectors as rows, in whichever memory they were made; float64, or float32 from a float32 reduction."""


def on_host(vectors: Vectors) -> Real:
    """The vectors in host memory; as they are if they lie there."""
    return np.asarray(vectors)


def rescued(vectors: Vectors) -> Real:
    """`on_host`, of vectors whose device failed.

    Raises:
        NumericalError: it broke for good, and does not give them.
    """
    try:
        return on_host(vectors)
    except RuntimeError as error:
        raise NumericalError(f"the kept vectors are lost with their device ({brief(error)})") from error


@dataclass(frozen=True, slots=True)
class Count:
    """How many eigenvalues exceed a shift, as far as that was proven."""

    at_least: int
    at_most: int


class Spectrum(Protocol):
    """A factorised Gram matrix."""

    @property
    def values(self) -> Doubles:
        """(n,) eigenvalues, ascending."""
        ...

    def product(self, probes: Doubles) -> Doubles:
        """The factors multiplied with (p, n) probes: what the factorised matrix makes of them."""
        ...

    def count_above(self, shift: float, bound: float) -> Count:
        """Eigenvalues above `shift`, counted another way than by looking at `values`.

        Args:
            bound: how far any of `values` may be off; those nearer to the shift may be left open by the count.

        Raises:
            NumericalError: nothing could be proven.
        """
        ...

    def top(self, count: int) -> Vectors:
        """(count, n) eigenvectors of the largest values, as rows, in the order of `values`."""
        ...


@dataclass(frozen=True, slots=True)
class Gram:
    """G = ΔᵀΔ, not yet factorised, and what its checks need."""

    images: Doubles
    """(p, n) G·X for the probes X."""
    exact_images: Doubles
    """(p, n) Δᵀ(ΔX), formed without G."""
    trace: float
    """‖Δ‖_F²."""
    weight: float
    """About ‖W_ft‖_F: what rounding of the result is to be held against."""
    factorise: Callable[[], Spectrum]
    """Factorise G, in place: to be called once."""
    matrix: Doubles | None = None
    """(n, n) G itself, C upper triangle, where it is in host memory: for methods that need no full factorisation."""
    moved: float = 0.0
    """How far its eigenvalues are from those asked for beyond what the images tell."""


class GramBatch(Protocol):
    """Gram matrices of one n, not yet factorised."""

    @property
    def members(self) -> list[Gram]:
        """Each with what its checks need; its `factorise` is for it alone."""
        ...

    def factorise(self, which: list[int]) -> list[Spectrum | NumericalError]:
        """Factorise some members at once; an error for each one that could not be."""
        ...


@runtime_checkable
class BatchArithmetic(Protocol):
    """A place that takes many matrices of one shape at once."""

    def grams(self, sources: Sequence[PanelSource], probes: Doubles, precision: Precision) -> GramBatch:
        """The Gram matrices of equally large deltas, in one pass over all of them.

        Raises:
            NumericalError: no memory for so many.
        """
        ...


class Merger(Protocol):
    """The second pass over one matrix: W_base + (Δ·Vᵀ)·V, rounded once."""

    def merged(self, panels: Iterable[Panel]) -> Iterator[tuple[Panel, Raw]]:
        """Each block of the panels with its result, oriented as stored and valid until the next is asked for.

        The next panel may be asked for before the last result of the one before is given.
        """
        ...

    def lost(self) -> float:
        """Squared rounding error of all blocks so far, ‖·‖_F²; not finite if a value overflowed."""
        ...

    @property
    def climbed(self) -> tuple[str, ...]:
        """Why work was moved to another place, if it was."""
        ...


class Arithmetic(Protocol):
    """Streaming linear algebra on one device."""

    precisions: tuple[Precision, ...]
    """Precisions worth trying for a Gram matrix, cheapest first."""

    def gram(self, source: PanelSource, probes: Doubles, precision: Precision) -> Gram:
        """G and its images, in one pass."""
        ...

    def triangular_factor(self, source: PanelSource) -> Doubles:
        """(n, n) R of Δ = Q·R in float64, in one pass; not finite if Δ is not."""
        ...

    def svd(self, matrix: Doubles, driver: str) -> tuple[Doubles, Doubles, Doubles]:
        """U, s (descending) and Vᵀ of a square matrix by the named driver ("default" or "gesvd")."""
        ...

    def merger(self, vh: Vectors, out_dtype: str) -> Merger:
        """The merge of a delta's kept part, formed in float32 for 16-bit outputs and in float64 for wider ones."""
        ...
