"""The eigenvalue problem of G on the CPU, stopped half-way: tridiagonal form T, all values of T, the vectors asked for.

That is where the time of a full decomposition is saved. In float64 it is an answer; in float32 it is where `single`
starts, whose windows make exact what decides.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streamrepair.decompose import certify, householder, lapack, twisted
from streamrepair.decompose.arithmetic import Count, Spectrum
from streamrepair.decompose.convert import Doubles, Singles, power_of_two
from streamrepair.decompose.halves import Both, in_turn
from streamrepair.errors import NumericalError

_TURNED = 2e-5
"""Largest difference between what probes see of T's vectors before and after those are turned back; 3e-6 was met."""


class TridiagonalSpectrum(Spectrum):
    """LAPACK's dsytrd and dsterf; of the vectors asked for T's own, and these turned back by `householder`.

    Args:
        gram: (n, n) float64, C upper triangle set; it is overwritten by the reflectors.
        both: does two halves of many vectors.

    Raises:
        NumericalError: LAPACK failed, or the median is not T's.
    """

    def __init__(self, gram: Doubles, both: Both = in_turn) -> None:
        self._reflectors, self._both = gram, both
        self._diagonal, self._off, self._scales = lapack.tridiagonalise(gram)
        self._values = lapack.tridiagonal_values(self._diagonal, self._off)
        certify.check_place(self._diagonal, self._off, self._values, (len(gram) - 1) // 2)

    @property
    def values(self) -> Doubles:
        """(n,) eigenvalues, ascending."""
        return self._values

    def product(self, probes: Doubles) -> Doubles:
        """Q·T·Qᵀ·X."""
        rotated = probes.copy()
        lapack.rotate_back(self._reflectors, self._scales, rotated, transpose=True)
        image = lapack.times_tridiagonal(self._diagonal, self._off, rotated)
        lapack.rotate_back(self._reflectors, self._scales, image)
        return image

    def count_above(self, shift: float, bound: float) -> Count:  # noqa: ARG002 - a Sturm sequence has none
        """By a Sturm sequence."""
        above = certify.sturm_count(self._diagonal, self._off, shift)
        return Count(above, above)

    def top(self, count: int) -> Doubles:
        """By twisted factorisations of T or, where clusters spoil those, by MRRR."""
        if count == 0:
            return np.empty((0, len(self._values)))
        vectors = twisted.vectors(self._diagonal, self._off, self._values[-count:])
        if not certify.orthonormality(vectors) <= certify.ORTHONORMALITY:
            del vectors
            vectors = lapack.tridiagonal_vectors(self._diagonal, self._off, count)
        householder.rotate_back(self._reflectors, self._scales, vectors, self._both)
        return vectors


class SingleTridiagonal:
    """ssytrd on a scaled copy of G, everything after it that is O(n²) in float64.

    Args:
        gram: (n, n) float64, C upper triangle; left as it is. both: does two halves of many vectors.
    """

    def __init__(self, gram: Doubles, both: Both = in_turn) -> None:
        self._both = both
        self._scale = power_of_two(float(gram.diagonal().max()))
        self._reflectors: Singles = np.empty(gram.shape, np.float32)
        for start in range(0, len(gram), 256):
            np.multiply(
                gram[start : start + 256],
                1.0 / self._scale,
                out=self._reflectors[start : start + 256],
                casting="same_kind",
            )
        diagonal, off, scales = lapack.tridiagonalise(self._reflectors)
        self._scales = scales
        self._diagonal, self._off = diagonal.astype(np.float64), off.astype(np.float64)
        self._values = lapack.tridiagonal_values(self._diagonal, self._off)
        self.values: Doubles = self._values * self._scale
        """(n,) eigenvalues of T, ascending, in the units of G."""

    def product(self, probes: Doubles) -> Doubles:
        """(p, n) Q·T·Qᵀ·X."""
        rotated = lapack.times_tridiagonal(self._diagonal, self._off, self._turned(probes)).astype(np.float32)
        lapack.rotate_back(self._reflectors, self._scales, rotated)
        images: Doubles = rotated.astype(np.float64) * self._scale
        return images

    def _turned(self, probes: Doubles) -> Singles:
        """(p, n) Qᵀ·X."""
        rotated = probes.astype(np.float32)
        lapack.rotate_back(self._reflectors, self._scales, rotated, transpose=True)
        return rotated

    def check_count(self, at: float) -> None:
        """Hold that as many values lie above `at` as a Sturm sequence of T finds there.

        Raises:
            NumericalError: they do not.
        """
        place = int(np.clip(np.searchsorted(self.values, at), 1, len(self.values) - 1))
        between = 0.5 * float(self._values[place - 1] + self._values[place])  # nowhere near a value
        counted = certify.sturm_count(self._diagonal, self._off, between)
        certify.check_count(counted, len(self.values) - place, close=0)

    def vectors(self, places: NDArray[np.intp], probes: Doubles) -> tuple[Singles, float]:
        """(k, n) eigenvectors of the values at these places, as rows, and the largest residual ‖Tz − tz‖ of them.

        They are not orthonormal where values are clustered.

        Raises:
            NumericalError: they are not finite, or are others once turned back, which no residual in T can show.
        """
        n = len(self._values)
        rows: Singles = np.empty((len(places), n), np.float32)
        residual = 0.0
        for start in range(0, len(places), twisted.AT_ONCE):
            part = slice(start, start + twisted.AT_ONCE)
            residual = float(np.maximum(residual, self._make(places[part], rows[part])))  # NaN stays
        if not np.isfinite(residual):
            raise NumericalError("vectors of the tridiagonal form are not finite")
        seen, expected = probes.astype(np.float32), rows @ self._turned(probes).T
        householder.rotate_back(self._reflectors, self._scales, rows, self._both)
        off = float(np.linalg.norm(rows @ seen.T - expected, axis=1).max(initial=0.0) / np.sqrt(len(probes)))
        if not off <= _TURNED:
            raise NumericalError(f"vectors of the tridiagonal form were turned back wrongly, off by {off:.1e}")
        return rows, residual * self._scale

    def _make(self, places: NDArray[np.intp], out: Singles) -> float:
        """out ← T's own vectors; returns the largest residual. Nothing of a batch outlives it."""
        values = self._values[places]
        found = twisted.vectors(self._diagonal, self._off, values)
        out[:] = found
        difference = lapack.times_tridiagonal(self._diagonal, self._off, found)
        found *= values[:, None]
        difference -= found
        return float(np.sqrt(np.einsum("ij,ij->i", difference, difference).max(initial=0.0)))
