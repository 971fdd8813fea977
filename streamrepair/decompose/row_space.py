"""Deltas of exactly low rank, settled in little memory: a basis of at most half of the row space that leaves nothing.

The Gram matrix cannot tell a median of zero from its own rounding errors, and the full SVD, which can, needs several
times its memory. But if Δ − ΔQQᵀ vanishes to working precision for some orthonormal Q of k ≤ n/2 columns, then by Weyl
s_{k+1} ≤ ‖Δ − ΔQQᵀ‖, and the median lies at or below s_{k+1}. Q spans ΔᵀS for random S, which squares nothing; that it
was found at random does not matter to the proof, which is the residual, formed in float64.

Source: Halko, Martinsson & Tropp 2011, algorithm 4.1 (range finder) and section 4.3 (judging a basis a posteriori).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from streamrepair.decompose import full, lapack
from streamrepair.decompose.convert import Doubles, difference
from streamrepair.decompose.operator import PanelSource, blocks
from streamrepair.decompose.truncation import NonFiniteDeltaError, Truncation, without_noise
from streamrepair.errors import NumericalError
from streamrepair.spectral.threshold import HardThreshold

_SIZES = (64, 512)
"""Columns of the bases that are tried: merged adapters seldom have more, and what has costs two more passes."""

_PIECE_ROWS = 256


def truncate(source: PanelSource, rule: HardThreshold, *, thorough: bool) -> Truncation:
    """Decide a delta whose median singular value is zero to working precision, as `full` would.

    Args:
        thorough: try a basis of half of the space, too.

    Raises:
        NonFiniteDeltaError: the delta is not finite.
        NumericalError: no basis that was tried holds all of it.
    """
    n, half = source.cols, source.cols // 2
    sizes = sorted({min(size, half) for size in (*_SIZES, *([half] if thorough else []))})
    residual = math.inf
    for size in sizes:
        residual, largest, norm = _residual(source, _basis(source, size))
        if residual <= full.zero_bound(source.rows, largest):
            return without_noise(n, source.rows, rule, norm=norm, backend="row-space")
    raise NumericalError(f"a basis of {sizes[-1]} directions leaves a residual of {residual:.1e}")


def _basis(source: PanelSource, size: int) -> Doubles:
    """(n, size) Q, orthonormal columns that span ΔᵀS; S is normal, the same for every matrix of these sides."""
    sketch: Doubles = np.zeros((size, source.cols))  # LAPACK's order of its transpose, which is then factored in place
    random = np.random.Generator(np.random.SFC64([source.rows, source.cols, size]))
    for delta in _deltas(source):
        lapack.add_product(random.standard_normal((len(delta), size)).T, delta, sketch)
    if not np.isfinite(sketch).all():
        raise NonFiniteDeltaError("a sum over the delta is not finite")
    import scipy.linalg  # late: a quarter of a second that most runs need not spend

    return np.asarray(scipy.linalg.qr(sketch.T, mode="economic", overwrite_a=True, check_finite=False)[0], np.float64)


def _residual(source: PanelSource, basis: Doubles) -> tuple[float, float, float]:
    """‖Δ − ΔQQᵀ‖_F, a lower bound of s₁, and ‖Δ‖_F; none of their squares need be a number."""
    residual = norm = 0.0
    lengths = np.zeros(basis.shape[1])  # of ΔQ's columns: Q's are unit vectors
    for delta in _deltas(source):
        norm = math.hypot(norm, full.scaled_norm(delta))
        inside: Doubles = delta @ basis
        if delta.flags.c_contiguous:
            lapack.add_product(inside, basis.T, delta, alpha=-1.0)
        else:
            lapack.add_product(basis, inside.T, delta.T, alpha=-1.0)
        residual = math.hypot(residual, full.scaled_norm(delta))
        scale = float(np.abs(inside).max(initial=0.0)) or 1.0
        inside /= scale
        np.hypot(lengths, scale * np.sqrt(np.square(inside).sum(axis=0)), out=lengths)
    return residual, float(lengths.max(initial=0.0)), norm


def _deltas(source: PanelSource) -> Iterator[Doubles]:
    """Δ in float64, (rows, n), in pieces of a block: this route holds more arrays at once than the Gram route."""
    for block in blocks(source):
        for start in range(0, block.rows, _PIECE_ROWS):
            piece = block.part(start, min(block.rows, start + _PIECE_ROWS))
            stored: Doubles = np.empty(piece.ft.shape)
            difference(piece.ft, piece.ft_dtype, piece.base, piece.base_dtype, stored)
            yield stored.T if piece.wide else stored
            del stored  # before the next one
