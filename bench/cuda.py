"""Measures the GPU route against torch.linalg.svd, by each driver, and against a plain Gram matrix and eigh.

    python bench/cuda.py [--device cuda:0] [--shapes 4096x4096,…] [--spectra gapped,heavy] [--repeats 3] [--limit 90]
                         [--contenders streamrepair,eigh-float64,…] [--minutes 9] [--model llama-135m] [--no-check]
                         [--name NAME] [--results FOLDER]

Everyone starts from W_base and W_ft in bfloat16 in host memory and ends with W_base + Δ* in bfloat16 in host memory.
Ranks and Δ* are held against a float64 QR and SVD, which squares nothing. A contender whose time, as extrapolated from
a smaller shape, is above --limit seconds is left out, and the record says so; so is what --minutes leave no time for.

The result is FOLDER/NAME.json (bench/results): times, peaks beside what the memory model projects, our time by stages,
and the rounding errors that the proofs of the counts met, for whoever revises the constants of
`decompose/cholesky_count`. With `--device cpu` it runs anywhere, slowly. First come batches of small matrices and a
whole small model, with its matrices in batches and one by one. All of it, with every driver, takes far longer than ten
minutes; where a card is lent for no more, `--contenders streamrepair,eigh-float64 --minutes 8` has what matters most.
It needs torch, NumPy, SciPy and psutil, and PYTHONPATH=. where the package is not installed; the whole model also
msgspec, xxhash, tqdm and tokenizers.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import cuda_contenders as contenders
import cuda_pairs as pairs
import torch
from cuda_clock import Clock, Record, tried
from machine import REPOSITORY, machine_record

from streamrepair.decompose.device import DeviceArithmetic
from streamrepair.decompose.device.rates import rates
from streamrepair.engine.memory import MatrixShape, device_bytes

SHAPES = "4096x4096,14336x4096,8192x8192,28672x8192,128256x8192"
BATCHES = "64:512x512,32:1024x1024"
LEFT_OUT = {"left_out": "no time is left"}


def measured(
    shape: tuple[int, int], spectrum: str, arithmetic: DeviceArithmetic, clock: Clock, *, check: bool, chosen: set[str]
) -> Record:
    """Every contender on one pair, or those that are chosen."""
    source = pairs.pair(shape, spectrum, arithmetic.device, seed=0)
    m, n = source.rows, source.cols
    flops = 4.0 * m * n * n + 8.0 * n**3
    projected_bytes = device_bytes(MatrixShape(m, n, base_item_bytes=2, ft_item_bytes=2, out_item_bytes=2), "gram")
    ours = contenders.ours(source, str(arithmetic.device))
    stages: Record = {}
    stages |= tried(partial(contenders.stages, source, arithmetic, clock.wait, stages)) or {}
    found: Record = {"projected_device_bytes": projected_bytes, "stages": stages, "runs": []}
    answer: Any = None
    if check:
        answer = clock.once("float64 answer", flops, lambda: contenders.answer(source, arithmetic.device))
    if isinstance(answer, dict):
        found["answer"] = answer
    check_answer = answer.check if isinstance(answer, contenders.Answer) else None
    for name, work in [("streamrepair", ours), *contenders.others(source, arithmetic.device)]:
        if not chosen or name in chosen:
            say(f"  {name}")
            found["runs"].append(clock.measure(name, flops, work, check_answer))
    return found


def batch(count: int, shape: tuple[int, int], arithmetic: DeviceArithmetic, clock: Clock) -> Record:
    """A batch of small matrices against the same ones one by one."""
    sources = [pairs.pair(shape, "gapped", arithmetic.device, seed) for seed in range(count)]
    works = contenders.batched(sources, arithmetic)
    name = f"{count}:{shape[0]}x{shape[1]}"
    return {"runs": [clock.measure(f"{way} {name}", 1.0, work, contenders.decided) for way, work in works.items()]}


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
    parser.add_argument("--shapes", default=SHAPES, help="ROWSxCOLUMNS,…; empty for none")
    parser.add_argument("--batches", default=BATCHES, help="COUNT:ROWSxCOLUMNS,…; empty for none")
    parser.add_argument("--model", default="llama-135m", help="a whole run of a small model; empty for none")
    parser.add_argument("--spectra", default="gapped,heavy")
    parser.add_argument("--contenders", default="", metavar="NAME,…", help="by the names of the record; empty for all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=90.0, metavar="SECONDS", help="per contender and shape")
    parser.add_argument("--minutes", type=float, default=math.inf, help="nothing is begun after so many")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--name", default="cuda")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "bench" / "results")
    return parser.parse_args()


def main() -> int:
    """Measures and writes after every step, so that a run cut short leaves what it had.

    Returns:
        1 if something failed, an answer was wrong, or ours could not be held against float64 though it was to be.
    """
    arguments = _arguments()
    device = torch.device(arguments.device)
    clock = Clock(device, arguments.repeats, arguments.limit, arguments.minutes)
    arithmetic = DeviceArithmetic(arguments.device)
    found = rates(device)
    record: Record = {
        "format": "streamrepair.bench-cuda/1",
        "machine": tried(machine_record),
        "gpu": gpu_record(device),
        "device": arguments.device,
        "rates": {"float32": found.float32, "float64": found.float64},
        "precisions": list(arithmetic.precisions),
        "cases": [],
        "batches": [],
    }
    path = arguments.results / f"{arguments.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        path.write_text(json.dumps(record, indent=1) + "\n")

    for word in filter(None, arguments.batches.split(",")):
        say(f"batch of {word}")
        count, shape = int(word.partition(":")[0]), parse_shape(word.partition(":")[2])
        told = LEFT_OUT if clock.over else tried(partial(batch, count, shape, arithmetic, clock))
        record["batches"].append({"count": count, "shape": list(shape), **told})
        write()
    if arguments.model:
        say(arguments.model)
        work = partial(_whole, arguments.model, device, arguments.repeats)
        record["whole"] = LEFT_OUT if clock.over else tried(work)
        write()
    chosen = set(filter(None, arguments.contenders.split(",")))
    for shape in map(parse_shape, filter(None, arguments.shapes.split(","))):
        for spectrum in arguments.spectra.split(","):
            say(f"{shape[0]}x{shape[1]} {spectrum}")
            told = LEFT_OUT
            if not clock.over:
                work = partial(measured, shape, spectrum, arithmetic, clock)
                told = tried(partial(work, check=not arguments.no_check, chosen=chosen))
            record["cases"].append({"spectrum": spectrum, "shape": list(shape), **told})
            write()
    return 1 if _faulty(record) else 0


def _whole(model: str, device: torch.device, repeats: int) -> Record:
    import cuda_runs  # more packages than all the rest needs, which a lent machine may lack

    return cuda_runs.whole(model, device, repeats)


def _faulty(record: Record) -> bool:
    steps = [*record["batches"], *record["cases"], record.get("whole", {})]
    if any("failed" in part for step in steps for part in (step, step.get("answer", ()), step.get("stages", ()))):
        return True
    batched = [run for batch in record["batches"] for run in batch.get("runs", ())]
    if any("failed" in run or run.get("check", {}).get("why") for run in batched):
        return True
    ours = [run for case in record["cases"] for run in case.get("runs", ()) if run["name"] == "streamrepair"]
    return any("seconds" not in run or not run.get("check", {}).get("passed", True) for run in ours)


if __name__ == "__main__":
    sys.exit(main())
