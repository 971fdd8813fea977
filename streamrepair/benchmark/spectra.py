"""Synthetic pairs of matrices whose delta has a chosen spectrum, as stored bits, in memory.

W_base is N(0, 0.02²), the delta of entries around 10⁻³ is one of
- gapped: low rank (3% of the short side, singular values 3 to 30 times the noise's edge) plus Gaussian noise;
- heavy: singular values that run continuously through τ, 10 to 30% of them above it, as in real fine-tunes.
A backend good on one alone is half a backend. The numbers depend on shape, spectrum and dtype only.
"""

from __future__ import annotations

import math
import zlib
from typing import Literal, get_args

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from streamrepair.benchmark.sources import MemorySource
from streamrepair.decompose.convert import STORED_TYPE, Raw, narrow, widen

Spectrum = Literal["gapped", "heavy"]
SPECTRA: tuple[Spectrum, ...] = get_args(Spectrum)
LEAST_SIDE = 64
"""Smaller matrices have too few singular values for a share of them to mean much."""

W_STD = 0.02
DELTA_STD = 1e-3
"""Large against the rounding of W_ft to bfloat16 (about 3.5e-5), small against W."""

Floats = NDArray[np.float32]


def pair(shape: tuple[int, int], spectrum: Spectrum, dtype: str) -> MemorySource:
    """W_base and W_ft of `shape` as stored in `dtype` (BF16, F16 or F32); the same ones on every call."""
    m, n = max(shape), min(shape)
    rng = np.random.Generator(np.random.SFC64([zlib.crc32(spectrum.encode()), m, n]))
    base = _stored(np.float32(W_STD) * _normal(rng, m, n), dtype)
    tuned = _gapped(rng, m, n) if spectrum == "gapped" else _heavy(rng, m, n)
    # Added to the rounded base, so that the only other noise is the rounding of W_ft.
    rounded = np.empty((m, n), np.float32)
    widen(base, dtype, rounded)
    tuned += rounded
    ft = _stored(tuned, dtype)
    if shape[1] > shape[0]:
        base, ft = np.ascontiguousarray(base.T), np.ascontiguousarray(ft.T)
    return MemorySource(base, ft, dtype)


def _gapped(rng: np.random.Generator, m: int, n: int) -> Floats:
    rank = max(1, round(0.03 * n))
    s = np.geomspace(30.0, 3.0, rank) * (math.sqrt(m) + math.sqrt(n))  # the edge of noise with unit entries
    v = np.linalg.qr(rng.standard_normal((n, rank)))[0]
    # Columns of U are N(0, 1/m): orthonormal up to √(rank/m).
    delta = _normal(rng, m, rank) @ (v * (s / math.sqrt(m))).T.astype(np.float32)
    delta += _normal(rng, m, n)
    delta *= np.float32(DELTA_STD / math.sqrt(1.0 + float(np.square(s).sum()) / (m * n)))
    return delta


def _heavy(rng: np.random.Generator, m: int, n: int) -> Floats:
    # Columns decay as (1 + j/c)^-α. α grows with β because ω(β)/μ(β), the threshold over the median, does:
    # with this rule about the same share of the rank is kept at every aspect ratio.
    alpha = 0.5 + 0.5 * math.sqrt(n / m)
    scale = (1.0 + np.arange(n) / (0.01 * n)) ** -alpha
    scale *= DELTA_STD / math.sqrt(float(np.square(scale).mean()))
    delta = _normal(rng, m, n)
    delta *= rng.permutation(scale).astype(np.float32)
    # An orthogonal mixing of the columns: the spectrum stays, the scales spread over all entries.
    mixed: Floats = scipy.fft.dct(delta, axis=1, norm="ortho", overwrite_x=True)
    return mixed


def _normal(rng: np.random.Generator, rows: int, cols: int) -> Floats:
    return rng.standard_normal((rows, cols), dtype=np.float32)


def _stored(values: Floats, dtype: str) -> Raw:
    """`values`, which are overwritten, rounded to a stored dtype."""
    out: Raw = np.empty(values.shape, STORED_TYPE[dtype])
    narrow(values, dtype, out)
    return out
