"""Gram matrices of many equally large deltas: one product for all of them where each alone would be a launch's wait."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from streamrepair.decompose.arithmetic import Gram, GramBatch, Precision, Spectrum
from streamrepair.decompose.convert import Doubles
from streamrepair.decompose.device.spectrum import EighSpectrum, mirrored
from streamrepair.decompose.device.staging import Upload, to_device
from streamrepair.decompose.operator import PanelSource, blocks, sampled_squares
from streamrepair.errors import NumericalError


class DeviceGrams(GramBatch):
    """A stack of Gram matrices on the device.

    Args:
        total: (b, n, n) float64. members: what is known of each on the host.
    """

    def __init__(self, total: Tensor, members: list[Gram]) -> None:
        self._total, self._members = total, members

    @classmethod
    def of(cls, sources: Sequence[PanelSource], probes: Doubles, precision: Precision, *, upload: Upload) -> Self:
        """Sum them, block by block, in one pass over all sources.

        Raises:
            torch.OutOfMemoryError: no memory on the device.
        """
        device = upload.device
        count, n = len(sources), sources[0].cols
        dtype = torch.float32 if precision == "float32" else torch.float64
        total = torch.zeros((count, n, n), dtype=torch.float64, device=device)
        exact = torch.zeros((count, n, len(probes)), dtype=torch.float64, device=device)
        x = to_device(probes, device)
        columns = x.T.to(dtype)
        held, squares = torch.empty((count, 0, n), dtype=dtype, device=device), np.zeros(count)
        for row in zip(*map(blocks, sources), strict=True):
            if held.shape[1] < row[0].rows:
                held = torch.empty((count, row[0].rows, n), dtype=dtype, device=device)
            delta = held[:, : row[0].rows]
            squares += [sampled_squares(block) for block in row]
            for block, place in zip(row, delta, strict=True):
                upload.delta(block, place.T if block.wide else place)
            if precision == "float64":
                total.baddbmm_(delta.mT, delta)
            else:
                total += delta.mT @ delta
            exact += delta.mT @ (delta @ columns)
        images: Doubles = (x @ mirrored(total)).cpu().numpy()
        traces: Doubles = total.diagonal(dim1=1, dim2=2).sum(1).cpu().numpy()
        exact_images = np.ascontiguousarray(exact.mT.cpu().numpy())
        known = zip(total, images, exact_images, traces.tolist(), np.sqrt(squares).tolist(), strict=True)
        return cls(total, [_member(*each) for each in known])

    @property
    def members(self) -> list[Gram]:
        """Each with its probes' images and trace."""
        return self._members

    def factorise(self, which: list[int]) -> list[Spectrum | NumericalError]:
        """One batched `eigh`; where it fails, each member alone, since the batch does not say whose fault it was."""
        found: list[Spectrum | NumericalError] = []
        with contextlib.suppress(RuntimeError):
            found += self._together(which)
        return found or [_alone(self._total[i]) for i in which]  # what the failure held in memory is gone

    def _together(self, which: list[int]) -> list[EighSpectrum]:
        chosen = self._total if len(which) == len(self._total) else self._total[which]
        values, vectors = torch.linalg.eigh(chosen)
        on_host: Doubles = values.cpu().numpy()
        return [EighSpectrum(chosen[i], values[i], vectors[i], on_host=on_host[i]) for i in range(len(which))]


def _member(gram: Tensor, images: Doubles, exact_images: Doubles, trace: float, weight: float) -> Gram:
    return Gram(images, exact_images, trace, weight, lambda: EighSpectrum.of(gram))


def _alone(gram: Tensor) -> Spectrum | NumericalError:
    try:
        return EighSpectrum.of(gram)
    except NumericalError as error:
        return error
