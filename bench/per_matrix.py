"""Times one matrix at a time, every backend against torch.linalg.svd, on the repository's own list of shapes.

    python bench/per_matrix.py [--shape 896x896 …] [--backend auto …] [--threads N] [--repeats 3] [--out FILE]

What `streamrepair bench` does for anyone, with the shapes and the place of the result fixed:
bench/results/per-matrix.json, in the format `streamrepair.bench/1`. The whole list takes long, mostly for float64 SVDs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec
from machine import REPOSITORY

from streamrepair.benchmark.cases import make_cases
from streamrepair.benchmark.conditions import make_conditions
from streamrepair.benchmark.measure import measure
from streamrepair.benchmark.table import render
from streamrepair.checkpoint.wholefile import write_atomic

SHAPES = ("896x896", "2048x2048", "4096x4096", "4864x896", "8192x2048", "14336x4096")
BACKENDS = ("gram", "randomized", "fast", "auto")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", action="append", help="instead of the list")
    parser.add_argument("--backend", action="append", help=f"instead of {', '.join(BACKENDS)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="one per processor if not given")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "bench" / "results" / "per-matrix.json")
    return parser.parse_args()


def main() -> int:
    """Measures, writes the JSON, prints the table; 1 if a backend was wrong."""
    arguments = _arguments()
    conditions = make_conditions(
        backends=arguments.backend or BACKENDS,
        dtype="bf16",
        device=arguments.device,
        threads=arguments.threads,
        repeats=arguments.repeats,
        check=not arguments.no_check,
    )
    cases = make_cases(shapes=arguments.shape or SHAPES, spectra=())
    result = measure(cases, conditions, tell=lambda line: print(line, file=sys.stderr, flush=True))
    write_atomic(arguments.out, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    print(render(result), end="")
    return 1 if result.faults else 0


if __name__ == "__main__":
    sys.exit(main())
