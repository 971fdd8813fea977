"""Pairs of weights for bench/cuda.py, made on the device: gigabytes in seconds. Deltas as in benchmark/spectra."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from streamrepair.benchmark.sources import MemorySource

_ROWS = 4096
"""Made at once."""
_W_STD, _DELTA_STD = 0.02, 1e-3


def pair(shape: tuple[int, int], spectrum: str, device: torch.device, seed: int) -> MemorySource:
    """In bfloat16, as bits; the same pair for the same arguments on the same kind of device."""
    m, n = max(shape), min(shape)
    generator = torch.Generator(device).manual_seed(seed + 1)
    make = _Gapped(m, n, generator) if spectrum == "gapped" else _Heavy(m, n, generator)
    base, ft = np.empty((m, n), np.uint16), np.empty((m, n), np.uint16)
    for start in range(0, m, _ROWS):
        rows = min(_ROWS, m - start)
        W_base = (_W_STD * _normal(rows, n, generator)).bfloat16()
        W_ft = (W_base.float() + make(rows)).bfloat16()
        for out, values in ((base, W_base), (ft, W_ft)):
            out[start : start + rows] = values.view(torch.uint16).cpu().numpy()
    if shape[1] > shape[0]:
        base, ft = np.ascontiguousarray(base.T), np.ascontiguousarray(ft.T)
    return MemorySource(base, ft, "BF16")


class _Gapped:
    """Noise, and 3% of the rank 3 to 30 times its edge; called for some rows of Δ."""

    def __init__(self, m: int, n: int, generator: torch.Generator) -> None:
        rank = max(1, round(0.03 * n))
        s = torch.logspace(math.log10(30.0), math.log10(3.0), rank, device=generator.device)
        s = s * (1.0 + math.sqrt(n / m))  # over √m: columns of U are N(0, 1)
        v = torch.linalg.qr(_normal(n, rank, generator)).Q
        self._scale = _DELTA_STD / math.sqrt(1.0 + float(s.square().sum()) / n)
        self._directions, self._generator = (v * s).T, generator

    def __call__(self, rows: int) -> Tensor:
        rank, n = self._directions.shape
        signal = _normal(rows, rank, self._generator) @ self._directions
        return self._scale * (signal + _normal(rows, n, self._generator))


class _Heavy:
    """Columns that decay by a power law, mixed by an orthogonal matrix; called for some rows of Δ."""

    def __init__(self, m: int, n: int, generator: torch.Generator) -> None:
        alpha = 0.5 + 0.5 * math.sqrt(n / m)
        scale = (1.0 + torch.arange(n, device=generator.device) / (0.01 * n)) ** -alpha
        scale *= _DELTA_STD / float(scale.square().mean().sqrt())
        mixing = torch.linalg.qr(_normal(n, n, generator)).Q
        self._mixing, self._generator = scale[:, None] * mixing, generator

    def __call__(self, rows: int) -> Tensor:
        return _normal(rows, len(self._mixing), self._generator) @ self._mixing


def _normal(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, cols, generator=generator, device=generator.device)
