"""What a place of computation has to offer the backends: `host` is NumPy and LAPACK, `device` is torch on a GPU.

The backends decide; an arithmetic only computes. Small results (values, kept vectors, probes) always come back as NumPy
arrays, so that decisions and checks are made by the same code wherever the work was done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from streamrepair.decompose.convert import Raw
from streamrepair.decompose.operator import Panel, PanelSource

Precision = Literal["float32", "float64"]
Doubles = NDArray[np.float64]


class Spectrum(Protocol):
    """A factorised Gram matrix."""

    @property
    def values(self) -> Doubles:
        """(n,) eigenvalues, ascending."""
        ...

    def product(self, probes: Doubles) -> Doubles:
        """The factors multiplied with (p, n) probes: what the factorised matrix makes of them."""
        ...

    def count_above(self, shift: float) -> int:
        """Eigenvalues above `shift`, counted another way than by looking at `values` where there is one."""
        ...

    def top(self, count: int) -> Doubles:
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
    factorise: Callable[[], Spectrum]
    """Factorise G, in place: to be called once."""
    matrix: Doubles | None = None
    """(n, n) G itself, C upper triangle, where it is in host memory: for methods that need no full factorisation."""


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

    def merger(self, vh: Doubles, out_dtype: str) -> Callable[[Panel], tuple[Raw, float]]:
        """A function from a block to its rounded W_base + (Δ·Vᵀ)·V, oriented as stored, and its squared rounding error.

        Formed in float32 for 16-bit outputs, in float64 for wider ones; rounded once.
        """
        ...
