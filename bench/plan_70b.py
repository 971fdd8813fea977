"""How long `streamrepair plan` takes for a 70B pair, as a whole process: interpreter, imports, headers, plan, JSON.

    python bench/plan_70b.py [--name plan-70b]

Both checkpoints have the true headers of a Llama of 70B in bfloat16 (723 tensors, 30 shards, 141 GB) and no data: the
files are holes. `--version` tells how much of the time is the interpreter and the command line. Processor time is given
beside wall time, which others on the machine lengthen; the quickest of the runs is the least disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from architectures import architecture, tensors
from checkpoint_folder import Folder
from machine import REPOSITORY, machine_record

ARCHITECTURE = "llama-70b"
SHARD_BYTES = 5_000_000_000
RUNS = 9


def run(words: list[str]) -> tuple[float, float, str]:
    """Wall and processor time of a command, from its start to its end, and its standard output."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "streamrepair", *words], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    wall_s, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def times(runs: list[tuple[float, float, str]]) -> dict[str, float]:
    """Of several runs of one command."""
    walls, processor = [wall for wall, _, _ in runs], [cpu for _, cpu, _ in runs]
    return {"wall_s": min(walls), "median_wall_s": statistics.median(walls), "cpu_s": statistics.median(processor)}


def measure(work: Path) -> dict[str, Any]:
    """The record of all runs."""
    specs = tensors(architecture(ARCHITECTURE))
    for side in ("base", "ft"):
        folder = Folder(work / side, specs, dtype_name="BF16", itemsize=2, max_shard_bytes=SHARD_BYTES)
        folder.write_sparse()
    words = ["plan", str(work / "base"), str(work / "ft"), "--ram", "64GB", "--workers", "2", "--json"]
    run(words)  # what the page cache lacks is read once
    runs = [run(words) for _ in range(RUNS)]
    planned = json.loads(runs[-1][2])
    return {
        "machine": machine_record(),
        "tensors": planned["totals"]["tensors"],
        "shards": planned["totals"]["shards"],
        "bytes": planned["totals"]["out_bytes"],
        "ram_projected_bytes": planned["budget"]["ram_projected_bytes"],
        "load_average": os.getloadavg()[0],
        "plan": times(runs),
        "version": times([run(["--version"]) for _ in range(RUNS)]),
    }


def main() -> int:
    """Measure, and write bench/results/NAME.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="plan-70b")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        record = {"name": arguments.name, **measure(Path(work))}
    path = REPOSITORY / "bench" / "results" / f"{arguments.name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{record['tensors']} tensors in {record['shards']} shards: plan {record['plan']}")
    print(f"--version: {record['version']}")
    return 0 if record["plan"]["wall_s"] < 1.0 else 1


if __name__ == "__main__":
    sys.exit(main())
