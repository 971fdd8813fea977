"""A factorised Gram matrix and the vectors kept of it, both in the device's memory."""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from streamrepair.decompose import cholesky_count
from streamrepair.decompose.arithmetic import Count, ResidentVectors, Spectrum, Vectors
from streamrepair.decompose.convert import Doubles
from streamrepair.decompose.device.staging import to_device
from streamrepair.errors import NumericalError, brief

_AT_ONCE = 256
"""Vectors that are fetched at once where they are narrowed."""


class DeviceVectors(ResidentVectors):
    """Vectors as the rows of a tensor.

    Args:
        rows: (k, n) float64.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    @property
    def shape(self) -> tuple[int, int]:
        """(k, n)."""
        k, n = self.rows.shape
        return int(k), int(n)

    def __len__(self) -> int:
        return len(self.rows)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> Doubles:
        if copy is False and self.rows.device.type != "cpu":
            raise ValueError("vectors on a device cannot be read without a copy")
        if dtype is None or np.dtype(dtype) == np.float64:
            whole: Doubles = self.rows.cpu().numpy()
            return whole
        array = np.empty(self.shape, dtype)
        for start in range(0, len(array), _AT_ONCE):  # never whole in float64 beside it
            array[start : start + _AT_ONCE] = self.rows[start : start + _AT_ONCE].cpu().numpy()
        return array

    def times(self, columns: Doubles) -> Doubles:
        """(k, p) inner products with the rows of (p, n) `columns`."""
        product: Doubles = (self.rows @ to_device(columns, self.rows.device).T).cpu().numpy()
        return product

    def orthonormality(self) -> float:
        """Norm of the largest row of VVᵀ − I; NaN if a vector is not finite."""
        if len(self.rows) == 0:
            return 0.0
        return float(_defect(self.rows).norm(dim=1).max())


class GramMatrix(cholesky_count.Symmetric):
    """G as it was summed, for the proofs of a count; it is not changed."""

    def __init__(self, gram: Tensor) -> None:
        self._gram = gram

    def residual(self, vectors: Vectors, values: Doubles) -> tuple[float, float]:
        """√‖RRᵀ‖_F of R = VG − ΛV, and ‖VVᵀ − I‖_F, formed in full."""
        rows = rows_on(vectors, self._gram.device)
        theta = to_device(values, self._gram.device)
        residual = torch.addmm(theta[:, None] * rows, rows, self._gram, beta=-1.0)
        scale = residual.abs().max().clamp_min(torch.finfo(torch.float64).tiny)  # fourth powers could leave the range
        residual /= scale
        off = scale * torch.linalg.vector_norm(residual @ residual.T).sqrt()
        found: list[float] = torch.stack([off, torch.linalg.vector_norm(_defect(rows))]).tolist()
        return found[0], found[1]

    def deflated(self, shift: float, vectors: Vectors, values: Doubles, probes: Doubles) -> tuple[bool, Doubles]:
        """By cuSOLVER's potrf; it is believed only if the factor's diagonal is positive too, which NaN is not."""
        rows = rows_on(vectors, self._gram.device)
        theta = to_device(values, self._gram.device)
        formed = torch.addmm(self._gram, rows.T, theta[:, None] * rows, beta=-1.0)
        formed.diagonal().add_(shift)
        x = to_device(probes, self._gram.device)
        expected = shift * x - x @ self._gram + ((x @ rows.T) * theta) @ rows
        difference: Doubles = (x @ formed - expected).cpu().numpy()
        factor, info = torch.linalg.cholesky_ex(formed)
        return bool((info == 0) & (factor.diagonal() > 0).all()), difference


class EighSpectrum(Spectrum):
    """torch.linalg.eigh, with every vector kept on the device.

    Args:
        gram: (n, n) float64, the full symmetric matrix; kept for the count.
        values: (n,), ascending, and vectors: (n, n), as columns: what `eigh` made of it.
        on_host: the values again, if they have been fetched.
    """

    def __init__(self, gram: Tensor, values: Tensor, vectors: Tensor, *, on_host: Doubles | None = None) -> None:
        self.gram, self._device_values, self._vectors = gram, values, vectors
        self._values: Doubles = values.cpu().numpy() if on_host is None else on_host

    @classmethod
    def of(cls, gram: Tensor) -> Self:
        """Factorise.

        Raises:
            NumericalError: no convergence, or no memory for the workspace.
        """
        try:
            values, vectors = torch.linalg.eigh(gram)
        except RuntimeError as error:  # torch's LinAlgError and OutOfMemoryError are RuntimeErrors
            raise NumericalError(brief(error)) from error
        return cls(gram, values, vectors)

    @property
    def values(self) -> Doubles:
        """(n,) eigenvalues, ascending."""
        return self._values

    def product(self, probes: Doubles) -> Doubles:
        """V·Λ·Vᵀ·X."""
        x = to_device(probes, self._vectors.device)
        image: Doubles = (((x @ self._vectors) * self._device_values) @ self._vectors.T).cpu().numpy()
        return image

    def count_above(self, shift: float, bound: float) -> Count:
        """By a residual and a Cholesky factor: `eigh` leaves no tridiagonal matrix for a Sturm count.

        Raises:
            NumericalError: values or vectors are not G's, or no memory is left.
        """
        top = cholesky_count.deflation(self._values, shift, bound).count
        try:
            return cholesky_count.prove(GramMatrix(self.gram), self._values, self._top(top), shift, bound)
        except RuntimeError as error:
            raise NumericalError(brief(error)) from error

    def top(self, count: int) -> DeviceVectors:
        """The last `count` columns, as rows; a copy, so that the rest can be let go."""
        return DeviceVectors(self._top(count).rows.clone(memory_format=torch.contiguous_format))

    def _top(self, count: int) -> DeviceVectors:
        return DeviceVectors(self._vectors[:, len(self._values) - count :].T)


def mirrored(total: Tensor) -> Tensor:
    """Sums of ΔᵀΔ, (…, n, n), with the lower triangle, which `eigh` reads, in place of the upper one too.

    A product need not be symmetric to the last bit, and float32's last bit is more than a factorisation may be off by.
    """
    upper = total.tril(-1).mT
    return total.tril_().add_(upper)


def rows_on(vectors: Vectors, device: torch.device) -> Tensor:
    """(k, n) float64 on the device."""
    if isinstance(vectors, DeviceVectors):
        return vectors.rows.to(device)
    return to_device(np.asarray(vectors, np.float64), device)


def _defect(rows: Tensor) -> Tensor:
    """VVᵀ − I."""
    product = rows @ rows.T
    product.diagonal().sub_(1.0)
    return product
