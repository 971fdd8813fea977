"""Measures the GPU route against torch.linalg.svd, by each driver, and against a plain Gram matrix and eigh.

    python bench/cuda.py [--device cuda:0] [--shapes 4096x4096,…] [--spectra gapped,heavy] [--repeats 3] [--limit 90]
                         [--model llama-135m] [--no-check] [--name NAME]

Everyone starts from W_base and W_ft in bfloat16 in host memory and ends with W_base + Δ* in bfloat16 in host memory.
Ranks and Δ* are held against a float64 QR and SVD, which squares nothing. A contender whose time, as extrapolated from
a smaller shape, is above --limit seconds is left out, and the record says so.

The result is bench/results/NAME.json: times, peaks beside what the memory model projects, our time by stages, and the
rounding errors that the proofs of the counts met, for whoever revises the constants of `decompose/cholesky_count`. With
`--device cpu` it runs anywhere, slowly. Last comes a whole small model, with its matrices in batches and one by one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_contenders as contenders
import cuda_pairs as pairs
import cuda_runs as runs
import torch
from machine import REPOSITORY, machine_record

from streamrepair.decompose.device import DeviceArithmetic
from streamrepair.decompose.device.rates import rates
from streamrepair.engine.memory import MatrixShape, device_bytes
from streamrepair.errors import brief

SHAPES = "4096x4096,14336x4096,8192x8192,28672x8192,128256x8192"
BATCHES = "64:512x512,32:1024x1024"
FAILURES = (RuntimeError, ArithmeticError)
"""No memory, no convergence, no such driver."""

Record = dict[str, Any]


class Clock:
    """Times on a device, and what it held meanwhile."""

    def __init__(self, device: torch.device, repeats: int, limit_s: float) -> None:
        self._device, self._repeats, self._limit_s = device, repeats, limit_s
        self._rates: dict[str, float] = {}

    def measure(
        self, name: str, flops: float, work: Callable[[], Any], check: Callable[[Any], Record] | None = None
    ) -> Record:
        """Seconds, peak bytes and the check of the answer, or why there are none.

        The first run is a warm-up, unless it is long.
        """
        expected_s = flops / self._rates[name] if name in self._rates else 0.0
        if expected_s > self._limit_s:
            return {"name": name, "left_out": f"expected to take {expected_s:.0f} s"}
        before = self._begin()
        try:
            first_s, result = self._once(work)
            peak = self._peak(before)
            checked = {"check": check(result)} if check else {}
            del result
            long = first_s > self._limit_s / (self._repeats + 1)
            samples = [first_s] if long else [self._once(work)[0] for _ in range(self._repeats)]
        except FAILURES as error:
            return {"name": name, "failed": brief(error)}
        seconds = statistics.median(samples)
        self._rates[name] = flops / seconds
        return {"name": name, "seconds": seconds, "samples": samples, "first_s": first_s, **peak, **checked}

    def _once(self, work: Callable[[], Any]) -> tuple[float, Any]:
        self.wait()
        began = time.perf_counter()
        result = work()
        self.wait()
        return time.perf_counter() - began, result

    def wait(self) -> None:
        """For the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _begin(self) -> int:
        """Let peaks start from now; bytes that are held already."""
        if self._device.type != "cuda":
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        return int(torch.cuda.memory_allocated(self._device))

    def _peak(self, before: int) -> Record:
        if self._device.type != "cuda":
            return {}
        return {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(self._device) - before,
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(self._device) - before,
        }


def measured(source: pairs.Source, arithmetic: DeviceArithmetic, clock: Clock, *, check: bool) -> Record:
    """Every contender on one pair."""
    m, n = source.rows, source.cols
    flops = 4.0 * m * n * n + 8.0 * n**3
    shape = MatrixShape(rows=m, cols=n, base_item_bytes=2, ft_item_bytes=2, out_item_bytes=2)
    ours = contenders.ours(source, str(arithmetic.device))
    found: Record = {
        "shape": list(source.base.shape),
        "projected_device_bytes": device_bytes(shape, "gram"),
        "stages": _tried(lambda: contenders.stages(source, arithmetic, clock.wait)),
        "runs": [],
    }
    answer = _tried(lambda: contenders.answer(source, arithmetic.device)) if check else None
    if isinstance(answer, dict):
        found["answer"] = answer
    check_answer = answer.check if isinstance(answer, contenders.Answer) else None
    for name, work in [("streamrepair", ours), *contenders.others(source, arithmetic.device)]:
        say(f"  {name}")
        found["runs"].append(clock.measure(name, flops, work, check_answer))
    return found


def _tried(work: Callable[[], Any]) -> Any:
    """What it gives, or why there is nothing: what a card has no memory for must not end all that it has."""
    try:
        return work()
    except FAILURES as error:
        return {"failed": brief(error)}


def batches(text: str, arithmetic: DeviceArithmetic, clock: Clock) -> Iterator[Record]:
    """Batches of small matrices against the same ones one by one."""
    for word in filter(None, text.split(",")):
        count, _, shape = word.partition(":")
        m, n = parse_shape(shape)
        say(f"{count} of {shape}")
        sources = [pairs.pair((m, n), "gapped", arithmetic.device, seed) for seed in range(int(count))]
        timed = [
            clock.measure(f"{name} {word}", 1.0, work) for name, work in contenders.batched(sources, arithmetic).items()
        ]
        yield {"count": int(count), "shape": [m, n], "runs": timed}


def gpu_record(device: torch.device) -> Record | None:
    """The card and its libraries; None on the CPU."""
    if device.type != "cuda":
        return None
    card = torch.cuda.get_device_properties(device)
    return {
        "name": card.name,
        "memory_bytes": card.total_memory,
        "capability": f"{card.major}.{card.minor}",
        "cuda": torch.version.cuda,
        "magma": torch.cuda.has_magma,
    }


def parse_shape(text: str) -> tuple[int, int]:
    """(4096, 1024) from "4096x1024"."""
    rows, _, cols = text.partition("x")
    return int(rows), int(cols)


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--batches", default=BATCHES, help="COUNT:ROWSxCOLUMNS,…; empty for none")
    parser.add_argument("--model", default="llama-135m", help="a whole run of a small model; empty for none")
    parser.add_argument("--spectra", default="gapped,heavy")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=90.0, metavar="SECONDS", help="per contender and shape")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--name", default="cuda")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "bench" / "results")
    return parser.parse_args()


def main() -> int:
    """Measures and writes after every case, so that a run cut short leaves what it had.

    Returns:
        1 if an answer was wrong, or could not be held against float64 though it was to be.
    """
    arguments = _arguments()
    device = torch.device(arguments.device)
    arithmetic = DeviceArithmetic(arguments.device)
    found = rates(device)
    clock = Clock(device, arguments.repeats, arguments.limit)
    record: Record = {
        "format": "streamrepair.bench-cuda/1",
        "machine": machine_record(),
        "gpu": gpu_record(device),
        "device": arguments.device,
        "rates": {"float32": found.float32, "float64": found.float64},
        "precisions": list(arithmetic.precisions),
        "cases": [],
        "batches": [],
    }
    path = arguments.results / f"{arguments.name}.json"
    for shape in map(parse_shape, arguments.shapes.split(",")):
        for spectrum in arguments.spectra.split(","):
            say(f"{shape[0]}x{shape[1]} {spectrum}")
            source = pairs.pair(shape, spectrum, device, seed=0)
            case = measured(source, arithmetic, clock, check=not arguments.no_check)
            record["cases"].append({"spectrum": spectrum, **case})
            path.write_text(json.dumps(record, indent=1) + "\n")
    for batch in batches(arguments.batches, arithmetic, clock):
        record["batches"].append(batch)
    path.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.model:
        say(arguments.model)
        record["whole"] = runs.whole(arguments.model, device, arguments.repeats)
        path.write_text(json.dumps(record, indent=1) + "\n")
    ours = [run for case in record["cases"] for run in case["runs"] if run["name"] == "streamrepair"]
    wrong = any("seconds" not in run or not run.get("check", {}).get("passed", True) for run in ours)
    return 1 if wrong or any("answer" in case for case in record["cases"]) else 0


if __name__ == "__main__":
    sys.exit(main())
