"""Holds a repaired checkpoint against float64: ranks, thresholds, every output value.

    python bench/exact.py BASE FT OUT [--sample N]

For each repaired matrix the delta is decomposed by LAPACK in float64, W_base + Δ* is formed in float64 and rounded once
to OUT's dtype, straight from float64. Tensors that OUT's report calls copied or kept_ft must equal FT's. The report is
OUT/streamrepair.json, or in_memory.json where bench/in_memory.py wrote OUT. Slow on purpose; memory is about three
float64 n × n matrices (n the short side) and the tensor three times in its own dtype.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from in_memory import REPORT_NAME as IN_MEMORY_REPORT
from in_memory import sigma_and_tau
from numpy.typing import NDArray
from safetensors import safe_open
from threadpoolctl import threadpool_limits

Doubles = NDArray[np.float64]

RANK_TOLERANCE = 1e-5
"""A rank may differ where a singular value lies this close to τ, relative to τ."""
DELTA_TOLERANCE = 1e-4
"""Bound on delta_error beyond what the rounding of the output costs in any case."""
MIN_EQUAL_SHARE = 0.999
"""Of a bfloat16 matrix; the arithmetic's own error comes near the spacing of float16 and passes that of float32."""
PANEL_VALUES = 1 << 22

# dtype → (bits of the significand, exponent of the smallest subnormal)
FORMATS = {torch.bfloat16: (8, -133), torch.float16: (11, -24), torch.float32: (24, -149)}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One repaired matrix against its float64 repair."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    rank: int
    rank_exact: int
    tau_difference: float
    """|τ − τ₆₄| / τ₆₄."""
    nearest_gap: float
    """min |s − τ₆₄| / τ₆₄ over the float64 singular values."""
    values: int
    values_equal: int
    """How many equal the correctly rounded float64 result."""
    ulps: float
    """Largest difference from it in units in the last place, of values at least as large as the rms of Δ*."""
    delta_error: float
    """‖(W_out − W_base) − Δ*₆₄‖ / ‖Δ*₆₄‖, the rounding of W_out to its dtype included."""
    rounding_floor: float
    """The same for the correctly rounded result: no output in this dtype has less."""


class Checkpoint:
    """Tensors of a folder (or a single file) by name, read one at a time."""

    def __init__(self, path: Path) -> None:
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        self.files: dict[str, Path] = {}
        for file in files:
            with safe_open(file, "pt") as handle:
                self.files |= dict.fromkeys(handle.keys(), file)

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self.files[name], "pt") as handle:
            return handle.get_tensor(name)


def round_once(values: Doubles, dtype: torch.dtype) -> torch.Tensor:
    """float64 to `dtype`, nearest, ties to even, in one step (torch goes to bfloat16 by way of float32)."""
    bits, smallest = FORMATS[dtype]
    _, exponent = np.frexp(values)
    step = np.maximum(exponent - bits, smallest)
    return torch.from_numpy(np.ldexp(np.rint(np.ldexp(values, -step)), step)).to(dtype)


def ulps(found: torch.Tensor, expected: torch.Tensor, floor: float) -> float:
    """Largest |found − expected| in units in the last place of the expected value, or of `floor` where that is larger.

    Without the floor a sum that cancels to nearly 0 counts thousands of units for an error of one part in 10⁷ of Δ*.
    """
    bits, smallest = FORMATS[expected.dtype]
    _, exponent = np.frexp(np.maximum(expected.double().abs().numpy(), floor))
    difference = (found.double() - expected.double()).abs().numpy()
    return float(np.ldexp(difference, -np.maximum(exponent - bits, smallest)).max())


def _upright(*matrices: torch.Tensor) -> tuple[torch.Tensor, ...]:
    m, n = matrices[0].shape
    return matrices if m >= n else tuple(matrix.T for matrix in matrices)


def _panels(m: int, n: int) -> Iterator[slice]:
    height = max(4 * n, PANEL_VALUES // n)
    return (slice(start, min(m, start + height)) for start in range(0, m, height))


def _delta(W_base: torch.Tensor, W_ft: torch.Tensor, rows: slice) -> Doubles:
    return (W_ft[rows].double() - W_base[rows].double()).numpy()


def right_svd(W_base: torch.Tensor, W_ft: torch.Tensor) -> tuple[Doubles, Doubles]:
    """Singular values and Vᵀ of the delta of two upright matrices; tall ones through the R of a QR by row panels."""
    m, n = W_base.shape
    if m < 2 * n:
        triangle = _delta(W_base, W_ft, slice(0, m))
    else:
        triangle = np.empty((0, n))
        for rows in _panels(m, n):
            stacked = np.vstack((triangle, _delta(W_base, W_ft, rows)))
            (triangle,) = scipy.linalg.qr(stacked, mode="r", overwrite_a=True, check_finite=False)
            triangle = triangle[:n]
    _, s, vh = scipy.linalg.svd(
        triangle, full_matrices=False, overwrite_a=True, check_finite=False, lapack_driver="gesdd"
    )
    return s, vh


def compare(
    name: str, record: dict[str, Any], pair: tuple[torch.Tensor, torch.Tensor], W_out: torch.Tensor
) -> Comparison:
    """The float64 repair of one matrix against what OUT holds."""
    m, n = W_out.shape
    W_base, W_ft, W_out = _upright(*pair, W_out)
    s, vh = right_svd(W_base, W_ft)
    _, tau = sigma_and_tau(torch.from_numpy(s), m, n)
    rank = int(np.count_nonzero(s > tau))
    v = np.ascontiguousarray(vh[:rank].T)
    rms = float(np.linalg.norm(s[:rank])) / math.sqrt(m * n)
    values_equal, largest_ulps = 0, 0.0
    squares = np.zeros(3)
    for rows in _panels(*W_out.shape):
        base = W_base[rows].double().numpy()
        delta_exact = (_delta(W_base, W_ft, rows) @ v) @ v.T
        expected = round_once(base + delta_exact, W_out.dtype)
        found = W_out[rows]
        values_equal += int((found == expected).sum())
        largest_ulps = max(largest_ulps, ulps(found, expected, rms))
        errors = [x.double().numpy() - base - delta_exact for x in (found, expected)]
        squares += [np.vdot(x, x) for x in (*errors, delta_exact)]
    norm = math.sqrt(squares[2]) or math.nan
    return Comparison(
        name=name,
        shape=(m, n),
        dtype=str(W_out.dtype).removeprefix("torch."),
        rank=int(record["rank_kept"]),
        rank_exact=rank,
        tau_difference=abs(float(record["threshold"]) - tau) / tau if tau else abs(float(record["threshold"])),
        nearest_gap=float(np.abs(s - tau).min()) / tau if tau else math.inf,
        values=W_out.numel(),
        values_equal=values_equal,
        ulps=largest_ulps,
        delta_error=math.sqrt(squares[0]) / norm,
        rounding_floor=math.sqrt(squares[1]) / norm,
    )


def choose(names: list[str], records: dict[str, dict[str, Any]], count: int | None) -> list[str]:
    """`count` of the names (all if None), taking every shape once before any shape twice."""
    if count is None or count >= len(names):
        return names
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        by_shape.setdefault(tuple(records[name]["shape"]), []).append(name)
    rounds = zip_longest(*by_shape.values())
    return [name for group in rounds for name in group if name is not None][:count]


def read_report(out: Path) -> dict[str, dict[str, Any]]:
    """The report's tensors: records by name.

    Raises:
        FileNotFoundError: OUT holds no report.
    """
    for name in ("streamrepair.json", IN_MEMORY_REPORT):
        if (out / name).exists():
            return json.loads((out / name).read_text())["tensors"]
    raise FileNotFoundError(f"{out}: no streamrepair.json")


def _within_promise(c: Comparison) -> bool:
    # nan (a zero Δ*) passes the first test: then the values decide
    if c.delta_error > c.rounding_floor + DELTA_TOLERANCE:
        return False
    return c.dtype != "bfloat16" or c.values_equal >= MIN_EQUAL_SHARE * c.values


def summary(comparisons: list[Comparison], changed: list[str], copies: int) -> dict[str, Any]:
    """The numbers of a whole checkpoint, and whether they are within the engine's promises."""
    wrong = [c.name for c in comparisons if c.rank != c.rank_exact and c.nearest_gap > RANK_TOLERANCE]
    inexact = [c.name for c in comparisons if c.rank == c.rank_exact and not _within_promise(c)]
    values = sum(c.values for c in comparisons)
    equal_share = sum(c.values_equal for c in comparisons) / values if values else 1.0
    return {
        "matrices": len(comparisons),
        "ranks_equal": sum(c.rank == c.rank_exact for c in comparisons),
        "ranks_wrong": wrong,
        "inexact": inexact,
        "values": values,
        "values_equal_share": equal_share,
        "max_ulps": max((c.ulps for c in comparisons), default=0.0),
        "max_tau_difference": max((c.tau_difference for c in comparisons), default=0.0),
        "min_nearest_gap": min((c.nearest_gap for c in comparisons if math.isfinite(c.nearest_gap)), default=None),
        "max_delta_error": max((c.delta_error for c in comparisons), default=0.0),
        "max_rounding_floor": max((c.rounding_floor for c in comparisons), default=0.0),
        "copies": copies,
        "copies_changed": changed,
        "passed": not (wrong or inexact or changed),
    }


def check(base: Path, ft: Path, out: Path, sample: int | None = None) -> tuple[dict[str, Any], list[Comparison]]:
    """Compares OUT with the float64 repair of FT against BASE; `sample` limits the matrices decomposed."""
    records = read_report(out)
    bases, fts, outs = Checkpoint(base), Checkpoint(ft), Checkpoint(out)
    repaired = [name for name in fts.files if records[name]["action"] == "repaired"]
    copied = [name for name in fts.files if records[name]["action"] != "repaired"]
    changed = [name for name in copied if not torch.equal(outs[name], fts[name].to(outs[name].dtype))]
    comparisons = []
    for name in choose(repaired, records, sample):
        comparison = compare(name, records[name], (bases[name], fts[name]), outs[name])
        comparisons.append(comparison)
        print(_line(comparison), flush=True)
    return summary(comparisons, changed, len(copied)), comparisons


def _line(c: Comparison) -> str:
    mark = "  " if c.rank == c.rank_exact else "! "
    return (
        f"{mark}rank {c.rank:>5} exact {c.rank_exact:>5} gap {c.nearest_gap:.1e} tau off {c.tau_difference:.1e} "
        f"equal {100 * c.values_equal / c.values:8.4f}% ulps {c.ulps:<4.2g} "
        f"error {c.delta_error:.2e} floor {c.rounding_floor:.2e}  {c.name} {c.shape[0]}x{c.shape[1]}"
    )


def main() -> int:
    """Prints one line per matrix and the summary; 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("base", "ft", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--sample", type=int, metavar="N", help="decompose N matrices only, of all shapes")
    parser.add_argument("--threads", type=int, help="of LAPACK; 1 is far faster on a machine that others use")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with threadpool_limits(arguments.threads):
        totals, comparisons = check(arguments.base, arguments.ft, arguments.out, arguments.sample)
    for key, value in totals.items():
        print(f"{key:>20}  {value}")
    if arguments.json:
        result = totals | {"tensors": [asdict(comparison) for comparison in comparisons]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if totals["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
