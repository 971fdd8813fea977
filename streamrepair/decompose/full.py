"""The reference route: a float64 streaming QR, then a full float64 SVD of R. Slow, and right where Gram is blind.

Δ = Q·R has the singular values and right vectors of R, so that panels of any tall matrix reduce to n × n without Q ever
being stored, and without squaring the spectrum.

Source: Demmel, Grigori, Hoemmen & Langou 2012 (sequential TSQR); Golub & Van Loan, section 8.6.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from streamrepair.decompose import certify
from streamrepair.decompose.operator import PanelSource, delta_blocks
from streamrepair.decompose.truncation import NonFiniteDeltaError, Truncation, decide
from streamrepair.errors import NumericalError
from streamrepair.spectral.threshold import HardThreshold

_ZERO_MEDIAN = 8.0
"""A median below this many rounding errors of the largest value is a zero: the usual rank tolerance, widened."""
_RESIDUAL = 1e-11


def truncate(source: PanelSource, rule: HardThreshold, *, device: torch.device) -> Truncation:
    """Decide and factor one delta by a full float64 SVD.

    Raises:
        NonFiniteDeltaError: the delta is not finite.
        NumericalError: no driver gave a factorisation that passes the checks.
    """
    r = _triangular_factor(source, device)
    norm = float(torch.linalg.norm(r))
    if not np.isfinite(norm):
        raise NonFiniteDeltaError(f"full: the norm of the delta is {norm}")
    s, vh = _checked_svd(r)
    ascending = np.ascontiguousarray(s[::-1])
    rounding = float(np.finfo(np.float64).eps) * source.rows * float(s[0])
    threshold = rule.estimate(ascending, source.rows, source.cols)
    noise_free = threshold.s_median <= _ZERO_MEDIAN * rounding
    close = 0
    if not noise_free:
        bound = 2.0 * float(np.finfo(np.float64).eps) * float(s[0]) * max(threshold.tau, threshold.s_median)
        _, close = decide(np.square(ascending), bound, rule, source.rows, source.cols)
    kept = vh[: threshold.rank_kept]
    return Truncation(
        values=ascending,
        threshold=threshold,
        vh=kept.flip(0).to(torch.float32),
        frob_delta_in=norm,
        backend="full",
        certificate=certify.Certificate(rounding, _orthonormality(kept), _RESIDUAL),
        noise_free=noise_free,
        undecidable=close,
    )


def _triangular_factor(source: PanelSource, device: torch.device) -> Tensor:
    """R of Δ = Q·R, (n, n) float64, by sequential TSQR over the blocks."""
    n = source.cols
    r = torch.zeros((0, n), dtype=torch.float64, device=device)
    for block in delta_blocks(source, device, torch.float64):
        stacked = torch.cat([r, block])
        # LAPACK's QR of a matrix with NaN may not return: ask first.
        if not bool(torch.isfinite(stacked).all()):
            raise NonFiniteDeltaError("full: the delta is not finite")
        r = torch.linalg.qr(stacked, mode="r").R
    return r


def _checked_svd(r: Tensor) -> tuple[np.ndarray[tuple[int], np.dtype[np.float64]], Tensor]:
    """Singular values descending and right vectors as rows; drivers in turn until one passes its check."""
    failures = []
    for driver in ("default", "gesvd"):
        try:
            u, s, vh = _svd(r, driver)
            _check(r, u, s, vh)
        except (RuntimeError, np.linalg.LinAlgError, NumericalError) as error:  # torch's LinAlgError is a RuntimeError
            failures.append(f"{driver}: {error}")
        else:
            return s.cpu().numpy(), vh
    raise NumericalError(f"full: no SVD driver gave a valid factorisation ({'; '.join(failures)})")


def _svd(r: Tensor, driver: str) -> tuple[Tensor, Tensor, Tensor]:
    if r.device.type == "cuda":
        result = torch.linalg.svd(r, full_matrices=False, driver="gesvd" if driver == "gesvd" else None)
        return result.U, result.S, result.Vh
    if driver == "default":
        result = torch.linalg.svd(r, full_matrices=False)
        return result.U, result.S, result.Vh
    u, s, vh = scipy.linalg.svd(r.numpy(), full_matrices=False, lapack_driver="gesvd")
    return torch.from_numpy(u), torch.from_numpy(s), torch.from_numpy(vh)


def _check(r: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> None:
    scale = float(torch.linalg.norm(r)) or 1.0
    residual = float(torch.linalg.norm(r @ vh.T - u * s)) / scale
    worst = max(residual, _orthonormality(vh), _orthonormality(u.T))
    if not worst <= _RESIDUAL * max(1.0, len(r) / 256):
        raise NumericalError(f"the SVD misses its matrix or its vectors are not orthonormal ({worst:.1e})")


def _orthonormality(rows: Tensor) -> float:
    if len(rows) == 0:
        return 0.0
    eye = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    return float((rows @ rows.T - eye).abs().max())
