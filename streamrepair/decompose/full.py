"""The reference route: a float64 streaming QR, then a full float64 SVD of R. Slow, and right where Gram is blind.

Δ = Q·R has the singular values and right vectors of R, so that panels of any tall matrix reduce to n × n without Q ever
being stored, and without squaring the spectrum.

Source: Golub & Van Loan, Matrix Computations, section 8.6.
"""

from __future__ import annotations

import numpy as np

from streamrepair.decompose import certify
from streamrepair.decompose.arithmetic import Arithmetic
from streamrepair.decompose.convert import Doubles
from streamrepair.decompose.operator import PanelSource
from streamrepair.decompose.truncation import NonFiniteDeltaError, Truncation
from streamrepair.errors import NumericalError
from streamrepair.spectral.threshold import HardThreshold

_EPSILON = float(np.finfo(np.float64).eps)
_ZERO_MEDIAN = 8.0
"""A median below this many rounding errors of the largest value is a zero: the usual rank tolerance, widened."""
_BACKWARD_ERROR = 4.0
"""What a backward stable SVD may be off by in any value, in units of √n·ε·s_max."""
_RESIDUAL = 1e-11


def truncate(source: PanelSource, rule: HardThreshold, *, arithmetic: Arithmetic) -> Truncation:
    """Decide and factor one delta by a full float64 SVD.

    Raises:
        NonFiniteDeltaError: the delta is not finite.
        NumericalError: no driver gave a factorisation that passes the checks.
    """
    r = arithmetic.triangular_factor(source)
    norm = scaled_norm(r)
    if not np.isfinite(norm):
        raise NonFiniteDeltaError(f"the norm of the delta is {norm}")
    s, vh = _checked_svd(r, arithmetic)
    ascending = np.ascontiguousarray(s[::-1])
    threshold = rule.estimate(ascending, source.rows, source.cols)
    # The tail's values may be rounding alone where the median's is not: σ̂ would then be that of the arithmetic.
    level = threshold.sigma_hat if rule.sigma == "tail" else threshold.s_median
    noise_free = level <= zero_bound(source.rows, float(s[0]))
    error = _BACKWARD_ERROR * _EPSILON * source.cols**0.5 * float(s[0])
    close = 0
    if not noise_free:  # in s, not s²: nothing is left to climb to, so a median hard to resolve is no refusal here
        margin = error * (1.0 + threshold.tau / threshold.s_median)
        close = int(np.count_nonzero(np.abs(ascending - threshold.tau) <= margin))
    kept = vh[: threshold.rank_kept]
    return Truncation(
        values=ascending,
        threshold=threshold,
        vh=np.ascontiguousarray(kept[::-1]),
        frob_delta_in=norm,
        backend="full",
        noise_free=noise_free,
        undecidable=close,
    )


def zero_bound(rows: int, largest: float) -> float:
    """What a singular value may be and still count as zero beside the largest one."""
    return _ZERO_MEDIAN * _EPSILON * rows * largest


def _checked_svd(r: Doubles, arithmetic: Arithmetic) -> tuple[Doubles, Doubles]:
    """Singular values descending and right vectors as rows; drivers in turn until one passes its check."""
    failures = []
    for driver in ("default", "gesvd"):
        try:
            u, s, vh = arithmetic.svd(r, driver)
            _check(r, u, s, vh)
        except (np.linalg.LinAlgError, NumericalError) as error:
            failures.append(f"{driver}: {error}")
        else:
            return s, vh
    raise NumericalError(f"no SVD driver gave a valid factorisation ({'; '.join(failures)})")


def _check(r: Doubles, u: Doubles, s: Doubles, vh: Doubles) -> None:
    scale = scaled_norm(r) or 1.0
    residual = scaled_norm(r @ vh.T - u * s) / scale
    worst = max(residual, certify.orthonormality(vh), certify.orthonormality(u.T))
    if not worst <= _RESIDUAL * max(1.0, len(r) / 256):
        raise NumericalError(f"the SVD misses its matrix or its vectors are not orthonormal ({worst:.1e})")


def scaled_norm(matrix: Doubles, *, overwrite: bool = False) -> float:
    """‖·‖_F without overflow or underflow of the squares; if the matrix may be overwritten in no further memory."""
    largest = float(max(matrix.max(initial=0.0), -matrix.min(initial=0.0)))
    if largest == 0.0 or not np.isfinite(largest):
        return largest
    return largest * float(np.linalg.norm(np.divide(matrix, largest, out=matrix if overwrite else None)))
