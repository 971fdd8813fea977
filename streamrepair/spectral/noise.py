"""Noise level of a matrix from its singular values alone.

Every σ̂ here is in the *fused* scale: σ̂ = σ_noise·√max(m, n), where σ_noise is the standard deviation of one entry of
the noise. Singular values of noise live on that scale, so neither the estimate nor the threshold needs m and n, only β;
divide by √max(m, n) to get the entries' σ back. Units are those of the singular values.

Neighbours: `marchenko_pastur` has the law, `threshold` turns σ̂ into τ.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from streamrepair.errors import UsageError
from streamrepair.spectral import marchenko_pastur

_TAIL_SHARE = 0.25
# Third quartile of the standard normal law: median |x| of Gaussian x is 0.6745·σ.
_NORMAL_QUARTILE = 0.6745


def lower_median(s: NDArray[np.float64]) -> float:
    """The lower median of `s` (r singular values in any order): index (r − 1) // 2 ascending, an actual element of `s`.

    Raises:
        UsageError: `s` is empty or not 1-D.
    """
    _check_values(s)
    # Not np.median: the mean of the two middle values moves τ by about 1e-4 against torch.median.
    index = (s.size - 1) // 2
    return float(np.partition(s, index)[index])


def sigma_from_median(s_median: float, beta: float) -> float:
    """σ̂ = s_median / √median(β), fused scale: consistent for pure noise and little moved by a low-rank signal.

    Raises:
        UsageError: β is outside (0, 1].
    Source: Gavish & Donoho 2014 (arXiv:1305.5870), noise level unknown; σ̂ there is this over √max(m, n).
    """
    return s_median / math.sqrt(marchenko_pastur.median(beta))


def sigma_from_tail(s: NDArray[np.float64]) -> float:
    """σ̂ = mean of the lowest quarter of `s` (any order, at least one value) / 0.6745, fused scale.

    Kept because published repairs use it; it is no consistent estimator. 0.6745 belongs to Gaussian values, not to the
    singular values of Gaussian matrices: on pure noise the result is 0.29·σ̂ at β = 1 and 1.48·σ̂ as β → 0.

    Raises:
        UsageError: `s` is empty or not 1-D.
    Source: "Spectral Unforgetting" (arXiv:2605.20296).
    """
    _check_values(s)
    count = max(int(_TAIL_SHARE * s.size), 1)
    # Sorted before the sum (float64, pairwise), so that the order of `s` cannot change the last bits.
    return float(np.sort(s)[:count].mean(dtype=np.float64)) / _NORMAL_QUARTILE


def _check_values(s: NDArray[np.float64]) -> None:
    if s.ndim != 1 or s.size == 0:
        raise UsageError(f"singular values have shape {s.shape}, expected (r,) with r >= 1: pass all of one matrix")
