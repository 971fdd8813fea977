"""The Gram route: one streaming pass builds G = ΔᵀΔ on the short side; its eigenvalues are the squared singular values.

Squaring costs precision: an error ε‖G‖ in G moves small singular values by ε·s_max²/(2s). In float32 products with
float64 sums that error is measured (not assumed) on probes, and the result is used only where it fixes the median and
every side of τ; float64 does for all but exactly low-rank deltas.

Source: Golub & Van Loan, Matrix Computations, section 8.6; the checks are `certify`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from streamrepair.decompose import certify, lapack
from streamrepair.decompose.eigen import EighSpectrum, Spectrum, TridiagonalSpectrum
from streamrepair.decompose.operator import PanelSource, delta_blocks
from streamrepair.decompose.truncation import NonFiniteDeltaError, Truncation, UnresolvedError, decide
from streamrepair.errors import NumericalError
from streamrepair.spectral.threshold import HardThreshold

Precision = Literal["float32", "float64"]

_FLUSH_ROWS = 8192
"""Rows summed in float32 before the sum is added to the float64 one: longer runs lose digits, shorter ones time."""
_LEAST_FLOAT32_VALUE = 1e-28
"""Squares below this could have met float32's underflow."""


@dataclass(frozen=True, slots=True)
class Gram:
    """G = ΔᵀΔ and what its checks need."""

    matrix: NDArray[np.float64] | torch.Tensor
    """(n, n) float64; C upper triangle only when an array, full when a tensor on a device."""
    probes: NDArray[np.float64]
    """(PROBES, n) X."""
    images: NDArray[np.float64]
    """(PROBES, n) ΔᵀΔX, formed without G."""
    trace: float
    """‖Δ‖_F²."""


def truncate(source: PanelSource, rule: HardThreshold, *, device: torch.device, precision: Precision) -> Truncation:
    """Decide and factor one delta through its Gram matrix.

    Raises:
        UnresolvedError: this precision cannot tell the kept rank.
        NonFiniteDeltaError: the sums are not finite.
        NumericalError: LAPACK failed or its answer did not pass the checks.
    """
    gram = _accumulate_cpu(source, precision) if device.type == "cpu" else _accumulate(source, device, precision)
    backend = f"gram-{precision}"
    if not np.isfinite(gram.trace):
        raise NonFiniteDeltaError(f"{backend}: the sum of squares of the delta is {gram.trace}")
    if gram.trace == 0.0:
        raise UnresolvedError(f"{backend}: every square vanished")
    return _factor(gram, source, rule, device=device, precision=precision)


def _factor(
    gram: Gram, source: PanelSource, rule: HardThreshold, *, device: torch.device, precision: Precision
) -> Truncation:
    probes = gram.probes
    spectrum: Spectrum
    if isinstance(gram.matrix, torch.Tensor):
        images = (torch.from_numpy(probes).to(device) @ gram.matrix).cpu().numpy()
        spectrum = EighSpectrum(gram.matrix)
    else:
        images = lapack.times_symmetric(gram.matrix, probes)
        spectrum = TridiagonalSpectrum(gram.matrix)
    values, largest = spectrum.values, float(spectrum.values[-1])
    if not (np.isfinite(values).all() and largest > 0.0):
        raise NumericalError(f"gram-{precision}: eigenvalues up to {largest} of a matrix of trace {gram.trace}")
    difference = spectrum.product(probes) - images
    certify.check_factor(difference, largest)
    bound = certify.spectral_bound(images - gram.images) + certify.spectral_bound(difference)
    threshold, close = decide(values, bound, rule, source.rows, source.cols)
    if precision == "float32" and (close or threshold.s_median**2 < _LEAST_FLOAT32_VALUE):
        raise UnresolvedError(f"{close} values within {bound:.1e} of the squared threshold")
    _check_count(spectrum, threshold.tau**2, threshold.rank_kept, close)
    vectors = spectrum.top(threshold.rank_kept)
    kept = values[len(values) - threshold.rank_kept :]
    orthonormality, residual = certify.check_vectors(vectors, kept, probes, images)
    return Truncation(
        values=np.sqrt(np.maximum(values, 0.0)),
        threshold=threshold,
        vh=torch.from_numpy(vectors.astype(np.float32)).to(device),
        frob_delta_in=gram.trace**0.5,
        backend=f"gram-{precision}",
        certificate=certify.Certificate(bound, orthonormality, residual),
        undecidable=close,
    )


def _check_count(spectrum: Spectrum, cut: float, expected: int, close: int) -> None:
    counted = spectrum.count_above(cut)
    if abs(counted - expected) > close:
        raise NumericalError(f"{expected} eigenvalues exceed the squared threshold, a Sturm count finds {counted}")


def _accumulate_cpu(source: PanelSource, precision: Precision) -> Gram:
    """G by ?syrk, block by block in a fixed order."""
    n = source.cols
    real = np.float32 if precision == "float32" else np.float64
    total = np.zeros((n, n))
    partial = np.zeros((n, n), np.float32) if precision == "float32" else total
    probes = certify.probe_vectors(n)
    columns = np.ascontiguousarray(probes.T, real)
    images = np.zeros((n, certify.PROBES))
    rows = 0
    for block in delta_blocks(source, torch.device("cpu"), _torch_dtype(precision)):
        array = block.numpy()
        fresh = precision == "float32" and rows == 0
        lapack.add_gram(array, partial, beta=0.0 if fresh else 1.0)
        images += array.T @ (array @ columns)
        rows += len(array)
        if partial is not total and rows >= _FLUSH_ROWS:
            total += partial
            rows = 0
    if partial is not total and rows:
        total += partial
    return Gram(total, probes, np.ascontiguousarray(images.T), float(np.trace(total)))


def _accumulate(source: PanelSource, device: torch.device, precision: Precision) -> Gram:
    """G by matrix products on a device; float32 products are summed in float64."""
    n = source.cols
    total = torch.zeros((n, n), dtype=torch.float64, device=device)
    probes = certify.probe_vectors(n)
    dtype = _torch_dtype(precision)
    columns = torch.from_numpy(probes.T.copy()).to(device, dtype)
    images = torch.zeros((n, certify.PROBES), dtype=torch.float64, device=device)
    for block in delta_blocks(source, device, dtype):
        if precision == "float64":
            total.addmm_(block.T, block)
        else:
            total += block.T @ block
        images += block.T @ (block @ columns)
    return Gram(total, probes, images.T.cpu().numpy().copy(), float(total.trace()))


def _torch_dtype(precision: Precision) -> torch.dtype:
    return torch.float32 if precision == "float32" else torch.float64
