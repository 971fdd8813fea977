"""All eigenvalues, and the top eigenvectors only, of a Gram matrix: LAPACK's pieces on the CPU, `eigh` on a device.

The CPU route stops `eigh` half-way: reduce to tridiagonal form T, take all values of T, then the vectors of the few
values that the threshold keeps. That is where the time of a full decomposition is saved.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamrepair.decompose import lapack
from streamrepair.decompose.certify import sturm_count


class Spectrum(Protocol):
    """A factorised Gram matrix."""

    @property
    def values(self) -> NDArray[np.float64]:
        """(n,) eigenvalues, ascending."""
        ...

    def product(self, probes: NDArray[np.float64]) -> NDArray[np.float64]:
        """The factors multiplied with (p, n) probes: what the factorised matrix makes of them, in exact arithmetic."""
        ...

    def count_above(self, shift: float) -> int:
        """Eigenvalues above `shift`, counted another way than by looking at `values` where there is one."""
        ...

    def top(self, count: int) -> NDArray[np.float64]:
        """(count, n) eigenvectors of the largest values, as rows, in the order of `values`."""
        ...


class TridiagonalSpectrum:
    """LAPACK on the CPU: ?sytrd, ?sterf, then ?stemr and ?ormtr for the vectors asked for.

    Args:
        gram: (n, n) float64, C upper triangle set; it is overwritten by the reflectors.
    """

    def __init__(self, gram: NDArray[np.float64]) -> None:
        self._reflectors = gram
        self._diagonal, self._off, self._scales = lapack.tridiagonalise(gram)
        self._values: NDArray[np.float64] = lapack.tridiagonal_values(self._diagonal, self._off)

    @property
    def values(self) -> NDArray[np.float64]:
        return self._values

    def product(self, probes: NDArray[np.float64]) -> NDArray[np.float64]:
        rotated = np.ascontiguousarray(probes)
        rotated = rotated.copy()
        lapack.rotate_back(self._reflectors, self._scales, rotated, transpose=True)
        image = rotated * self._diagonal
        image[:, :-1] += rotated[:, 1:] * self._off
        image[:, 1:] += rotated[:, :-1] * self._off
        lapack.rotate_back(self._reflectors, self._scales, image)
        return image

    def count_above(self, shift: float) -> int:
        return sturm_count(self._diagonal, self._off, shift)

    def top(self, count: int) -> NDArray[np.float64]:
        if count == 0:
            return np.empty((0, len(self._values)))
        vectors: NDArray[np.float64] = lapack.tridiagonal_vectors(self._diagonal, self._off, count)
        lapack.rotate_back(self._reflectors, self._scales, vectors)
        return vectors


class EighSpectrum:
    """torch.linalg.eigh (cuSOLVER on CUDA) with every vector kept on the device.

    Args:
        gram: (n, n) float64 on any device, the full symmetric matrix.
    """

    def __init__(self, gram: Tensor) -> None:
        device_values, self._vectors = torch.linalg.eigh(gram)
        self._device_values = device_values
        self._values: NDArray[np.float64] = device_values.cpu().numpy()

    @property
    def values(self) -> NDArray[np.float64]:
        return self._values

    def product(self, probes: NDArray[np.float64]) -> NDArray[np.float64]:
        x = torch.from_numpy(probes).to(self._vectors.device)
        image: NDArray[np.float64] = (((x @ self._vectors) * self._device_values) @ self._vectors.T).cpu().numpy()
        return image

    def count_above(self, shift: float) -> int:
        return int(np.count_nonzero(self._values > shift))

    def top(self, count: int) -> NDArray[np.float64]:
        n = len(self._values)
        vectors: NDArray[np.float64] = self._vectors[:, n - count :].T.contiguous().cpu().numpy()
        return vectors
