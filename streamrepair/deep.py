"""`verify --deep`: repaired tensors recomputed from BASE and FT by a float64 SVD, and held against what OUT has."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streamrepair.checkpoint.layout import Checkpoint, open_checkpoint
from streamrepair.checkpoint.read import InputFiles
from streamrepair.decompose import full
from streamrepair.decompose.convert import difference, widened
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.scratch import Scratch
from streamrepair.engine.view import MatrixView, StoredMatrix
from streamrepair.errors import InputError
from streamrepair.report import Report
from streamrepair.spectral.threshold import HardThreshold
from streamrepair.verification import DeepCheck

_SIGNIFICAND_BITS = {"BF16": 8, "F16": 11, "F32": 24, "F64": 53}
_LEAST_EXPONENT = {"BF16": -126, "F16": -14, "F32": -126, "F64": -1022}


def recompute(report: Report, result: Checkpoint, sample: int) -> tuple[DeepCheck, ...]:
    """Check `sample` repaired tensors of OUT, spread evenly over the report.

    Raises:
        InputError: BASE or FT is gone or is not what the run read.
    """
    base, ft = _input(report.base.given, report.base.path, "BASE"), _input(report.ft.given, report.ft.path, "FT")
    names = [name for name, record in report.tensors.items() if record.action == "repaired"]
    step = max(1, len(names) // max(1, sample))
    files = InputFiles()
    sides = {"BASE": base, "FT": ft, "OUT": result}
    try:
        return tuple(_check(name, report, sides, files) for name in names[::step][:sample])
    finally:
        files.close()


def _input(given: str, path: str, side: str) -> Checkpoint:
    try:
        return open_checkpoint(given, side=side)
    except InputError:
        return open_checkpoint(path, side=side)  # `given` may have been relative to another folder


def _check(name: str, report: Report, sides: dict[str, Checkpoint], files: InputFiles) -> DeepCheck:
    base, ft, result = (_stored(checkpoint, name, side) for side, checkpoint in sides.items())
    view = MatrixView(files=files, base=base, ft=ft, scratch=Scratch(), panel_rows=max(ft.entry.shape))
    rule = HardThreshold(scale=report.settings.scale, sigma=report.settings.sigma)
    truncation = full.truncate(view, rule, arithmetic=HostArithmetic())
    written = MatrixView(files=files, base=base, ft=result, scratch=Scratch(), panel_rows=view.panel_rows)
    right, worst, total = 0, 0.0, view.rows * view.cols
    vh = truncation.vh.astype(np.float64)
    for pair, found in zip(view.panels(), written.panels(), strict=True):
        for block, stored in zip(pair.blocks(), found.blocks(), strict=True):
            delta, exact, value = (np.empty(block.ft.shape) for _ in range(3))
            difference(block.ft, block.ft_dtype, block.base, block.base_dtype, delta)
            widened(block.base, block.base_dtype, exact)
            widened(stored.ft, stored.ft_dtype, value)
            correction = vh.T @ (vh @ delta) if block.wide else (delta @ vh.T) @ vh
            exact += correction
            error = np.abs(value - exact)
            right += int(np.count_nonzero(error <= (0.5 + 1e-6) * _unit(exact, stored.ft_dtype)))
            # Where W_base and Δ* cancel, the sum is as exact as they are: measured in units of the larger.
            unit = _unit(np.maximum(np.abs(exact), np.abs(correction)), stored.ft_dtype)
            worst = max(worst, float((error / unit).max(initial=0.0)))
    return DeepCheck(
        name=name,
        rank_kept=report.tensors[name].rank_kept or 0,
        rank_exact=truncation.threshold.rank_kept,
        correctly_rounded=right / total,
        largest_ulp=worst,
    )


def _unit(values: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """The unit in the last place of `dtype` at each value."""
    exponent = np.maximum(np.frexp(values)[1] - 1, _LEAST_EXPONENT[dtype])
    unit: NDArray[np.float64] = np.ldexp(1.0, exponent - _SIGNIFICAND_BITS[dtype] + 1)
    return unit


def _stored(checkpoint: Checkpoint, name: str, side: str) -> StoredMatrix:
    if name not in checkpoint.tensors:
        raise InputError(f"{side} {checkpoint.given}: tensor {name} is gone since the run")
    shard, entry = checkpoint.tensors[name]
    return StoredMatrix(checkpoint.shards[shard], entry)
