"""The reference route: a float64 streaming QR, then a full float64 SVD of R. Slow, and right where Gram is blind.

Δ = Q·R has the singular values and right vectors of R, so that panels of any tall matrix reduce to n × n without Q ever
being stored, and without squaring the spectrum.

Source: Golub & Van Loan, Matrix Computations, section 8.6.
"""

from __future__ import annotations

import numpy as np

from streamrepair.decompose import certify
from streamrepair.decompose.arithmetic import Arithmetic, Doubles
from streamrepair.decompose.operator import PanelSource
from streamrepair.decompose.truncation import NonFiniteDeltaError, Truncation, decide
from streamrepair.errors import NumericalError
from streamrepair.spectral.threshold import HardThreshold

_EPSILON = float(np.finfo(np.float64).eps)
_ZERO_MEDIAN = 8.0
"""A median below this many rounding errors of the largest value is a zero: the usual rank tolerance, widened."""
_RESIDUAL = 1e-11


def truncate(source: PanelSource, rule: HardThreshold, *, arithmetic: Arithmetic) -> Truncation:
    """Decide and factor one delta by a full float64 SVD.

    Raises:
        NonFiniteDeltaError: the delta is not finite.
        NumericalError: no driver gave a factorisation that passes the checks.
    """
    r = arithmetic.triangular_factor(source)
    norm = _scaled_norm(r)
    if not np.isfinite(norm):
        raise NonFiniteDeltaError(f"the norm of the delta is {norm}")
    s, vh = _checked_svd(r, arithmetic)
    ascending = np.ascontiguousarray(s[::-1])
    rounding = _EPSILON * source.rows * float(s[0])
    threshold = rule.estimate(ascending, source.rows, source.cols)
    noise_free = threshold.s_median <= _ZERO_MEDIAN * rounding
    close = 0
    if not noise_free:
        bound = 2.0 * _EPSILON * float(s[0]) * max(threshold.tau, threshold.s_median)
        _, close = decide(np.square(ascending), bound, rule, source.rows, source.cols)
    kept = vh[: threshold.rank_kept]
    return Truncation(
        values=ascending,
        threshold=threshold,
        vh=np.ascontiguousarray(kept[::-1]),
        frob_delta_in=norm,
        backend="full",
        certificate=certify.Certificate(rounding, certify.orthonormality(kept), _RESIDUAL),
        noise_free=noise_free,
        undecidable=close,
    )


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
    scale = _scaled_norm(r) or 1.0
    residual = _scaled_norm(r @ vh.T - u * s) / scale
    worst = max(residual, certify.orthonormality(vh), certify.orthonormality(u.T))
    if not worst <= _RESIDUAL * max(1.0, len(r) / 256):
        raise NumericalError(f"the SVD misses its matrix or its vectors are not orthonormal ({worst:.1e})")


def _scaled_norm(matrix: Doubles) -> float:
    """‖·‖_F without overflow or underflow of the squares."""
    largest = float(np.abs(matrix).max(initial=0.0))
    if largest == 0.0 or not np.isfinite(largest):
        return largest
    return largest * float(np.linalg.norm(matrix / largest))
