"""The Gram matrix, the triangular factor and the SVD on one torch device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from streamrepair.decompose.arithmetic import Gram, Precision, Vectors
from streamrepair.decompose.convert import Doubles
from streamrepair.decompose.device.batch import DeviceGrams
from streamrepair.decompose.device.merge import DeviceMerger
from streamrepair.decompose.device.rates import Rates, ieee_products, rates
from streamrepair.decompose.device.spectrum import EighSpectrum, mirrored
from streamrepair.decompose.device.staging import Upload, to_device
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.operator import Panel, PanelSource, blocks, sampled_squares
from streamrepair.errors import NumericalError, brief

_MOST_JACOBI = 1024
"""Columns up to which Jacobi's method may be the quicker SVD; above, an A100 takes three times as long for it."""


class DeviceArithmetic:
    """One torch device.

    Args:
        device: such as "cuda:0"; "cpu" too, for tests of this route.
        measured: its rates; taken by a short measurement, once per process, if not given.
        host: the CPU that goes on with a merge where the device cannot; a fresh one by default.
    """

    def __init__(self, device: str, *, measured: Rates | None = None, host: HostArithmetic | None = None) -> None:
        self.device = torch.device(device)
        self.precisions: tuple[Precision, ...] = (measured or rates(self.device)).precisions
        self._upload, self._host = Upload(self.device), host

    @ieee_products()
    def gram(self, source: PanelSource, probes: Doubles, precision: Precision) -> Gram:
        """G by matrix products; float32 products are summed in float64, block by block.

        The host waits for the device once, at the end.

        Raises:
            RuntimeError: torch's, such as OutOfMemoryError.
        """
        n, dtype = source.cols, torch.float32 if precision == "float32" else torch.float64
        total = torch.zeros((n, n), dtype=torch.float64, device=self.device)
        partial = torch.empty((n, n), dtype=dtype, device=self.device) if precision == "float32" else None
        x = to_device(probes, self.device)
        columns = x.T.to(dtype)
        exact = torch.zeros((n, len(probes)), dtype=torch.float64, device=self.device)
        held, squares = torch.empty(0, dtype=dtype, device=self.device), 0.0
        for block in blocks(source):
            squares += sampled_squares(block)
            if held.numel() < block.ft.size:
                held = torch.empty(block.ft.size, dtype=dtype, device=self.device)
            delta = self._delta(block, held)
            if partial is None:
                total.addmm_(delta.T, delta)
            else:
                total += torch.mm(delta.T, delta, out=partial)
            exact += delta.T @ (delta @ columns)
        images = (x @ mirrored(total)).cpu().numpy()
        trace = float(total.trace())
        return Gram(images, exact.T.cpu().numpy().copy(), trace, squares**0.5, lambda: EighSpectrum.of(total))

    def grams(self, sources: Sequence[PanelSource], probes: Doubles, precision: Precision) -> DeviceGrams:
        """One batched product per block of all sources.

        Raises:
            NumericalError: no memory on the device.
        """
        try:
            with ieee_products():
                return DeviceGrams.of(sources, probes, precision, upload=self._upload)
        except RuntimeError as error:
            raise NumericalError(brief(error)) from error

    def _delta(self, block: Panel, held: Tensor) -> Tensor:
        """Δ of a block, (rows, n), in `held`; a transposed view for a wide one."""
        delta = self._upload.delta(block, held[: block.ft.size].view(block.ft.shape))
        return delta.T if block.wide else delta

    def triangular_factor(self, source: PanelSource) -> Doubles:
        """R by sequential TSQR (Demmel, Grigori, Hoemmen & Langou 2012).

        Raises:
            RuntimeError: torch's, such as OutOfMemoryError.
        """
        n = source.cols
        r = torch.zeros((0, n), dtype=torch.float64, device=self.device)
        for block in blocks(source):
            held = torch.empty(block.ft.size, dtype=torch.float64, device=self.device)
            stacked = torch.cat([r, self._delta(block, held)])
            # A QR of a matrix with NaN need not return: worth waiting for the device.
            if not bool(torch.isfinite(stacked).all()):
                return np.full((n, n), np.nan)
            r = torch.linalg.qr(stacked, mode="r").R
        result: Doubles = r.cpu().numpy()
        return result

    def svd(self, matrix: Doubles, driver: str) -> tuple[Doubles, Doubles, Doubles]:
        """torch's default driver, which is Jacobi's method, or gesvd: that is sure, and for large matrices quicker.

        Raises:
            NumericalError: no convergence, or no memory for the workspace.
        """
        sure = driver == "gesvd" or len(matrix) > _MOST_JACOBI
        chosen = "gesvd" if sure and self.device.type == "cuda" else None
        try:
            result = torch.linalg.svd(to_device(matrix, self.device), full_matrices=False, driver=chosen)
        except RuntimeError as error:  # torch's LinAlgError and OutOfMemoryError are RuntimeErrors
            raise NumericalError(brief(error)) from error
        return result.U.cpu().numpy(), result.S.cpu().numpy(), result.Vh.cpu().numpy()

    def merger(self, vh: Vectors, out_dtype: str) -> DeviceMerger:
        """Two products per block, on this device as long as its memory lasts."""
        return DeviceMerger(vh, out_dtype, device=self.device, upload=self._upload, host=self._host)
