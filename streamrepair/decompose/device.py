"""Arithmetic on a GPU: torch, cuBLAS and cuSOLVER. The only module of the package that loads torch.

Blocks cross the bus as stored, half the bytes of float32, and are widened on the device.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from streamrepair.decompose.arithmetic import Doubles, Gram, Precision, Spectrum
from streamrepair.decompose.convert import Raw
from streamrepair.decompose.operator import Panel, PanelSource, blocks
from streamrepair.errors import NumericalError

_TORCH_TYPE = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class DeviceArithmetic:
    """One torch device.

    Args:
        device: such as "cuda:0"; "cpu" too, for tests of this route.
    """

    precisions: tuple[Precision, ...] = ("float64",)

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)

    def gram(self, source: PanelSource, probes: Doubles, precision: Precision) -> Gram:
        """G by matrix products; float32 products are summed in float64."""
        n = source.cols
        dtype = torch.float32 if precision == "float32" else torch.float64
        total = torch.zeros((n, n), dtype=torch.float64, device=self._device)
        x = torch.from_numpy(probes).to(self._device)
        columns = x.T.to(dtype)
        exact = torch.zeros((n, len(probes)), dtype=torch.float64, device=self._device)
        for block in blocks(source):
            delta = self._delta(block, dtype)
            if precision == "float64":
                total.addmm_(delta.T, delta)
            else:
                total += delta.T @ delta
            exact += delta.T @ (delta @ columns)
        images = (x @ total).cpu().numpy()
        return Gram(images, exact.T.cpu().numpy().copy(), float(total.trace()), lambda: EighSpectrum(total))

    def triangular_factor(self, source: PanelSource) -> Doubles:
        """R by sequential TSQR (Demmel, Grigori, Hoemmen & Langou 2012)."""
        n = source.cols
        r = torch.zeros((0, n), dtype=torch.float64, device=self._device)
        for block in blocks(source):
            stacked = torch.cat([r, self._delta(block, torch.float64)])
            if not bool(torch.isfinite(stacked).all()):
                return np.full((n, n), np.nan)
            r = torch.linalg.qr(stacked, mode="r").R
        result: Doubles = r.cpu().numpy()
        return result

    def svd(self, matrix: Doubles, driver: str) -> tuple[Doubles, Doubles, Doubles]:
        """cuSOLVER's default driver, or gesvd, which is slow and sure.

        Raises:
            NumericalError: no convergence, or no memory for the workspace.
        """
        on_device = torch.from_numpy(matrix).to(self._device)
        chosen = "gesvd" if driver == "gesvd" and self._device.type == "cuda" else None
        try:
            result = torch.linalg.svd(on_device, full_matrices=False, driver=chosen)
        except RuntimeError as error:  # torch's LinAlgError and OutOfMemoryError are RuntimeErrors
            raise NumericalError(str(error).partition("\n")[0]) from error
        return result.U.cpu().numpy(), result.S.cpu().numpy(), result.Vh.cpu().numpy()

    def merger(self, vh: Doubles, out_dtype: str) -> Callable[[Panel], tuple[Raw, float]]:
        """Two products per block; the block comes back as stored."""
        target = _TORCH_TYPE[out_dtype]
        dtype = torch.float32 if out_dtype in ("BF16", "F16") else torch.float64
        basis = torch.from_numpy(vh).to(self._device, dtype)

        def merge(block: Panel) -> tuple[Raw, float]:
            merged = self._loaded(block.base, block.base_dtype, dtype)
            merged = merged.T if block.wide else merged
            exact = merged.addmm(self._delta(block, dtype) @ basis.T, basis)
            rounded = exact.to(target)
            lost = float(torch.linalg.vector_norm(exact - rounded)) ** 2 if target != dtype else _infinite(exact)
            stored = (rounded.T if block.wide else rounded).contiguous()
            return stored.view(torch.uint16 if out_dtype == "BF16" else target).cpu().numpy(), lost

        return merge

    def _delta(self, block: Panel, dtype: torch.dtype) -> Tensor:
        """Δ of a block, (rows, n) on the device, subtracted in `dtype`, or in float64 if either is stored so."""
        work = torch.float64 if "F64" in (block.ft_dtype, block.base_dtype) else dtype
        delta = (self._loaded(block.ft, block.ft_dtype, work) - self._loaded(block.base, block.base_dtype, work)).to(
            dtype
        )
        return delta.T if block.wide else delta

    def _loaded(self, raw: Raw, dtype: str, work: torch.dtype) -> Tensor:
        contiguous = torch.from_numpy(np.ascontiguousarray(raw))
        return contiguous.to(self._device).view(_TORCH_TYPE[dtype]).to(work)


def _infinite(values: Tensor) -> float:
    return 0.0 if bool(torch.isfinite(values).all()) else np.inf


class EighSpectrum(Spectrum):
    """torch.linalg.eigh with every vector kept on the device.

    Args:
        gram: (n, n) float64, the full symmetric matrix.

    Raises:
        NumericalError: no convergence, or no memory for the workspace.
    """

    def __init__(self, gram: Tensor) -> None:
        try:
            self._device_values, self._vectors = torch.linalg.eigh(gram)
        except RuntimeError as error:  # torch's LinAlgError and OutOfMemoryError are RuntimeErrors
            raise NumericalError(str(error).partition("\n")[0]) from error
        self._values: Doubles = self._device_values.cpu().numpy()

    @property
    def values(self) -> Doubles:
        """(n,) eigenvalues, ascending."""
        return self._values

    def product(self, probes: Doubles) -> Doubles:
        """V·Λ·Vᵀ·X."""
        x = torch.from_numpy(probes).to(self._vectors.device)
        image: Doubles = (((x @ self._vectors) * self._device_values) @ self._vectors.T).cpu().numpy()
        return image

    def count_above(self, shift: float) -> int:
        """By the values: `eigh` leaves no tridiagonal matrix to count on."""
        return int(np.count_nonzero(self._values > shift))

    def top(self, count: int) -> Doubles:
        """The last `count` columns, as rows."""
        vectors: Doubles = self._vectors[:, len(self._values) - count :].T.contiguous().cpu().numpy()
        return vectors
