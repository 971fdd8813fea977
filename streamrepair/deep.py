"""`verify --deep`: repaired tensors recomputed from BASE and FT by a float64 SVD, and held against what OUT has."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
import numpy as np

from streamrepair.checkpoint.layout import Checkpoint
from streamrepair.checkpoint.pairing import Side
from streamrepair.checkpoint.read import InputFiles
from streamrepair.decompose import full, lapack
from streamrepair.decompose.arithmetic import on_host
from streamrepair.decompose.convert import Doubles, difference, widen
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.scratch import Scratch
from streamrepair.engine.address_fit import refuse_deep_without_room
from streamrepair.engine.memory import MatrixShape
from streamrepair.engine.numeric_threads import check_address_space
from streamrepair.engine.plan import matrix_shape
from streamrepair.engine.view import MatrixView
from streamrepair.errors import BudgetError, InputError, shown
from streamrepair.origins import open_origins
from streamrepair.report import Report
from streamrepair.spectral.threshold import HardThreshold
from streamrepair.verification import DeepCheck

_LEAST_ROUNDED = 0.99
"""Share of 16-bit values that must be the exact ones rounded, but for what Δ* may be off by.

Fine-tunes give more than 0.999 without that allowance, but float16 falls below where Δ is about as large as W: a unit
that is an eighth of bfloat16's is not far above the error of float32's Δ*.
"""
_LARGEST_ERROR = 1e-4
"""Largest ‖Δ*_out − Δ*‖/‖Δ*‖ beyond rounding: what the repair promises."""
_NEGLIGIBLE = 1e-5
"""Of rms(Δ*): so far off float32 is (6e-6 was met) wherever the value itself is nearer to zero than that."""
_SIGNIFICAND_BITS = {"BF16": 8, "F16": 11, "F32": 24, "F64": 53}
_LEAST_EXPONENT = {"BF16": -126, "F16": -14, "F32": -126, "F64": -1022}


def recompute(report: Report, result: Checkpoint, sample: int) -> tuple[DeepCheck, ...]:
    """Check `sample` repaired tensors of OUT, spread evenly over the report.

    Raises:
        InputError: BASE or FT is gone or is not what the run read.
        BudgetError: a limit on what the process maps leaves too little for it, or memory ran out.
    """
    base, ft = open_origins(report)
    repaired = [name for name, record in report.tensors.items() if record.action == "repaired"]
    names = repaired[:: max(1, len(repaired) // max(1, sample))][:sample]
    sides = {"BASE": base, "FT": ft, "OUT": result}
    refuse_deep_without_room([_shape(name, report, sides) for name in names])
    files = InputFiles()
    try:
        check_address_space()
        lapack.tables()
        return tuple(_check(name, report, sides, files) for name in names)
    except MemoryError as error:
        raise BudgetError(
            f"--deep needs more memory than there is ({str(error) or 'none was left'}): free some, or leave out --deep"
        ) from error
    finally:
        files.close()


def _shape(name: str, report: Report, sides: dict[str, Checkpoint]) -> MatrixShape:
    base, ft, result = (stored.entry for stored in _sides(name, report, sides))
    return matrix_shape(base, ft, result, report.settings)


@dataclass(slots=True)
class _Agreement:
    """Sums over the blocks of one tensor."""

    rms: float
    """Of Δ*: its errors are held against this, and a value whose unit is smaller can be no nearer."""
    right: int = 0
    promised: int = 0
    """Values that are right, or would be if Δ* were off by no more than it may be."""
    largest_ulp: float = 0.0
    error_norm: float = 0.0
    rounding_norm: float = 0.0

    def add(self, value: Doubles, exact: Doubles, correction: Doubles, dtype: str) -> None:
        """Take in one block: stored values, W_base + Δ* in float64, Δ* alone."""
        error, unit = np.abs(value - exact), _unit(exact, dtype)
        self.error_norm = math.hypot(self.error_norm, full.scaled_norm(error))
        error[error <= _NEGLIGIBLE * self.rms] = 0.0
        half = (0.5 + 1e-6) * unit
        self.right += int(np.count_nonzero(error <= half))
        self.promised += int(np.count_nonzero(error <= half + _LARGEST_ERROR * self.rms))
        self.rounding_norm = math.hypot(self.rounding_norm, full.scaled_norm(0.5 * unit))
        # Where W_base and Δ* cancel, the sum is as exact as they are: measured in units of the larger.
        unit = _unit(np.maximum(np.abs(exact), np.abs(correction)), dtype)
        self.largest_ulp = max(self.largest_ulp, float((error / unit).max(initial=0.0)))


def _check(name: str, report: Report, sides: dict[str, Checkpoint], files: InputFiles) -> DeepCheck:
    base, ft, result = _sides(name, report, sides)
    view = MatrixView(files=files, base=base, ft=ft, scratch=Scratch(), panel_rows=max(ft.entry.shape))
    rule = HardThreshold(scale=report.settings.scale, sigma=report.settings.sigma)
    truncation = full.truncate(view, rule, arithmetic=HostArithmetic())
    written = MatrixView(files=files, base=base, ft=result, scratch=Scratch(), panel_rows=view.panel_rows)
    rms = truncation.frob_delta_out / (view.rows * view.cols) ** 0.5
    agreement, vh = _Agreement(rms), on_host(truncation.vh).astype(np.float64)
    for pair, found in zip(view.panels(), written.panels(), strict=True):
        for block, stored in zip(pair.blocks(), found.blocks(), strict=True):
            delta, exact, value = (np.empty(block.ft.shape) for _ in range(3))
            difference(block.ft, block.ft_dtype, block.base, block.base_dtype, delta)
            widen(block.base, block.base_dtype, exact)
            widen(stored.ft, stored.ft_dtype, value)
            correction = vh.T @ (vh @ delta) if block.wide else (delta @ vh.T) @ vh
            exact += correction
            agreement.add(value, exact, correction, stored.ft_dtype)
    beyond = max(0.0, agreement.error_norm - agreement.rounding_norm)
    check = DeepCheck(
        name=name,
        rank_kept=report.tensors[name].rank_kept or 0,
        rank_exact=truncation.threshold.rank_kept,
        correctly_rounded=agreement.right / (view.rows * view.cols),
        largest_ulp=agreement.largest_ulp,
        delta_error=beyond / (truncation.frob_delta_out or truncation.frob_delta_in or 1.0),
    )
    record = report.tensors[name]
    undecidable = max(truncation.undecidable, record.undecidable or 0, record.within_interval or 0)
    promised = agreement.promised / (view.rows * view.cols)
    return msgspec.structs.replace(check, fault=_fault(check, promised, result.entry.dtype, undecidable))


def _fault(check: DeepCheck, promised: float, dtype: str, undecidable: int) -> str | None:
    off = abs(check.rank_kept - check.rank_exact)
    if off > undecidable:
        return f"rank {check.rank_kept}, a float64 SVD keeps {check.rank_exact}"
    if off:  # both ranks are right to within rounding, and their values differ by what lies between them
        return None
    if dtype in ("BF16", "F16") and promised < _LEAST_ROUNDED:
        return f"{promised:.2%} of its values are the float64 result rounded, expected {_LEAST_ROUNDED:.0%}"
    if check.delta_error > _LARGEST_ERROR:
        return f"its delta is off by {check.delta_error:.1e} of the float64 one, expected at most {_LARGEST_ERROR:.0e}"
    return None


def _unit(values: Doubles, dtype: str) -> Doubles:
    """The unit in the last place of `dtype` at each value."""
    exponent = np.maximum(np.frexp(values)[1] - 1, _LEAST_EXPONENT[dtype])
    unit: Doubles = np.ldexp(1.0, exponent - _SIGNIFICAND_BITS[dtype] + 1)
    return unit


def _sides(name: str, report: Report, sides: dict[str, Checkpoint]) -> list[Side]:
    """A tensor on each side; on BASE's it may have another name."""
    names = {"BASE": report.tensors[name].paired_with or name}
    return [_stored(checkpoint, names.get(side, name), side) for side, checkpoint in sides.items()]


def _stored(checkpoint: Checkpoint, name: str, side: str) -> Side:
    if name not in checkpoint.tensors:
        raise InputError(f"{side} {shown(checkpoint.given)}: tensor {shown(name)} is gone since the run")
    shard, entry = checkpoint.tensors[name]
    return Side(checkpoint.shards[shard], entry)
