"""What a budget costs and whether it holds: allowed, projected and measured memory, and time, for several --ram.

    python bench/budgets.py --work DIR
    python bench/budgets.py --work DIR --only qwen-0.5b --ram 1GB,8GB

Every run is a process of its own. Measured is the larger of the kernel's own peak (VmHWM) and the sampled sum over the
process tree. The result is printed as a table and written to bench/results/budgets.json after every run, so that a
run cut short leaves what it has.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from machine import machine_record, measure

from streamrepair.units import format_bytes, format_seconds, parse_bytes

BENCH = Path(__file__).resolve().parent
RESULT = BENCH / "results" / "budgets.json"
PAIRS = {
    "qwen-0.5b": ("1GB", "1.5GB", "2GB", "4GB", "8GB"),
    "llama-70b-layer": ("2GB", "4GB", "8GB"),
    "embedding-70b": ("2GB", "4GB", "8GB"),
}

Record = dict[str, Any]


def run(pair: Path, out: Path, name: str, ram: str, options: list[str]) -> Record:
    """One repair under one budget.

    Raises:
        RuntimeError: it failed; the message holds the end of its output.
    """
    shutil.rmtree(out, ignore_errors=True)
    words = [str(pair / "base"), str(pair / "ft"), str(out), "--ram", ram, "--quiet", *options]
    measured = measure([sys.executable, "-m", "streamrepair", *words])
    if measured.status != 0:
        raise RuntimeError(f"{name} with --ram {ram} ended with status {measured.status}:\n{measured.output}")
    report = json.loads((out / "streamrepair.json").read_text())
    budget, timings = report["budget"], report["timings"]
    peak_bytes = max(measured.peaks.high_water_bytes, measured.peaks.tree_bytes)
    return {
        "pair": name,
        "ram": ram,
        "options": options,
        "allowed_bytes": budget["ram_allowed_bytes"],
        "projected_bytes": budget["ram_projected_bytes"],
        "measured_bytes": peak_bytes,
        "wall_s": measured.wall_s,
        "workers": report["workers"],
        "processor_share": timings["cpu_s"] / timings["wall_s"] / machine_record()["cores"],
        "utilisation": report["utilisation"],
        "peaks": asdict(measured.peaks),
    }


def table(rows: list[Record]) -> str:
    """The runs as fixed-width text."""
    head = ("pair", "workers", "allowed", "projected", "measured", "proj/meas", "time", "processor")
    lines = [head]
    for row in rows:
        sizes = [format_bytes(row[f"{word}_bytes"]) for word in ("allowed", "projected", "measured")]
        ratio = f"{row['projected_bytes'] / row['measured_bytes']:.2f}"
        time, share = format_seconds(row["wall_s"]), f"{row['processor_share']:.0%}"
        lines.append((row["pair"], str(row["workers"]), *sizes, ratio, time, share))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def make_pair(name: str, work: Path, spectrum: str) -> Path:
    """A fresh pair."""
    pair = work / "pair"
    command = [sys.executable, str(BENCH / "make_pair.py"), name, str(pair), "--spectrum", spectrum, "--overwrite"]
    measured = measure(command)
    if measured.status != 0:
        raise RuntimeError(f"make_pair.py ended with status {measured.status}:\n{measured.output}")
    return pair


def main() -> int:
    """Measures, prints, writes; 1 if a budget was exceeded or a run failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="for pairs and outputs (12 GB); a temporary folder if not"
    )
    parser.add_argument("--only", choices=PAIRS, action="append", help="this pair; repeatable")
    parser.add_argument("--ram", help="these budgets, with commas, for every pair")
    parser.add_argument("--spectrum", default="heavy", help="of the deltas")
    parser.add_argument("--workers", action="append", metavar="N", help="repeatable: every budget with so many workers")
    parser.add_argument("--json", type=Path, default=RESULT, metavar="FILE")
    arguments = parser.parse_args()
    rows: list[Record] = []
    failed = False
    with tempfile.TemporaryDirectory(prefix="budgets-", dir=arguments.work) as folder:
        work = Path(folder)
        for name in arguments.only or PAIRS:
            pair = make_pair(name, work, arguments.spectrum)
            for ram in arguments.ram.split(",") if arguments.ram else PAIRS[name]:
                for workers in arguments.workers or [None]:
                    try:
                        options = ["--workers", workers] if workers else []
                        rows.append(run(pair, work / "out", name, ram, options))
                    except RuntimeError as error:
                        failed = True
                        print(f"error: {error}", file=sys.stderr)
                        continue
                    print(table(rows[-1:]), file=sys.stderr, flush=True)
                    record = {"name": "budgets", "machine": machine_record(), "rows": rows}
                    arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows))
    exceeded = [row for row in rows if not row["measured_bytes"] <= row["projected_bytes"] <= parse_bytes(row["ram"])]
    for row in exceeded:
        print(f"exceeded: {row['pair']} with --ram {row['ram']}", file=sys.stderr)
    return 1 if failed or exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
