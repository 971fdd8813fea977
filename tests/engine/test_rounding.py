"""Fewer than one value in a thousand of a bfloat16 result is the neighbour of the right one, for deltas of any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from streamrepair import api
from streamrepair.checkpoint.layout import open_checkpoint
from streamrepair.spectral.threshold import HardThreshold

Doubles = NDArray[np.float64]


def _normal(seed: int, *shape: int) -> Doubles:
    return np.random.default_rng(seed).standard_normal(shape)


def _bfloat16(values: Doubles) -> Doubles:
    """Rounded once, to nearest even; none here is subnormal."""
    mantissa, exponent = np.frexp(values)
    rounded: Doubles = np.ldexp(np.rint(np.ldexp(mantissa, 8)), exponent - 8)
    return rounded


DELTAS = {
    "as small as noise is": 0.001 * _normal(1, 640, 640) + 0.002 * _normal(2, 640, 6) @ _normal(3, 6, 640),
    "larger than the weights, by rows": 0.01 * _normal(4, 640, 640) * np.exp(1.5 * _normal(5, 640, 1)),
    "a twentieth of the weights": 0.001 * _normal(6, 640, 640) * np.exp(0.7 * _normal(7, 1, 640)),
}


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("delta", DELTAS.values(), ids=DELTAS)
def test_nearly_all_values_are_the_exact_ones_rounded_once(tmp_path: Path, delta: Doubles, scale: float) -> None:
    base = _bfloat16(0.02 * _normal(0, *delta.shape))
    tuned = _bfloat16(base + delta)
    for side, weights in (("base", base), ("ft", tuned)):
        (tmp_path / side).mkdir()
        save_file({"w": torch.from_numpy(weights).bfloat16()}, tmp_path / side / "model.safetensors")
    report = api.repair(tmp_path / "base", tmp_path / "ft", tmp_path / "out", scale=scale)
    u, s, vh = np.linalg.svd(tuned - base, full_matrices=False)
    kept = HardThreshold(scale=scale).estimate(s[::-1], *delta.shape).rank_kept
    assert report.tensors["w"].rank_kept == kept
    exact = base + (u[:, :kept] * s[:kept]) @ vh[:kept]
    shard = open_checkpoint(tmp_path / "out", side="OUT").shards[0]
    (entry,) = shard.tensors
    bits = np.frombuffer(shard.path.read_bytes(), "<u2", count=entry.numel, offset=entry.start).astype(np.uint32)
    written = (bits << 16).view(np.float32).reshape(entry.shape)
    assert np.mean(written != _bfloat16(exact)) < 1e-3
