"""Copies against the disk: repairs that find nothing to do, beside `cp -r` and a plain reading, in turns in one run.

    python bench/copying.py --arch qwen-0.5b --repeats 7

Contenders, each a process of its own into a fresh folder, and the sync after it counts:
- read: `cat` of all shards of BASE and FT to nowhere;
- cp: `cp -r FT`;
- zero: a repair of a pair with Δ = 0, which has to read BASE to know that;
- passthrough: the same with every tensor excluded, which reads BASE to look for NaN.
Speeds are of all bytes moved, read and written, as cp and the reports say; a repair's reading back is not counted.
On a virtual machine that gives free memory back to its host, what a fresh page costs varies from one run to the next by
more than everything else. So there are two kinds of ratio: of the quickest run of each, which had the fewest, and the
median over the turns, each of which begins with another, of cp's time to the repair's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from architectures import ARCHITECTURES, architecture
from end_to_end import RESULTS, CommandError, Record, condense, data_bytes, own_account, run_once, warm
from machine import machine_record
from make_pair import make_pair

from streamrepair.units import format_bytes, format_seconds, parse_bytes

RATIOS = {
    "speed_ratio": "speed",
    "time_ratio": "inverse time",
    "turns_time_ratio": "inverse time, the median of all turns",
}


def contenders(base: Path, ft: Path, out: Path) -> dict[str, list[str]]:
    """Name → command, in the order in which they take turns."""
    shards = [str(shard) for folder in (base, ft) for shard in sorted(folder.glob("*.safetensors"))]
    repair = [sys.executable, "-m", "streamrepair", str(base), str(ft), str(out)]
    return {
        "read": ["sh", "-c", 'exec cat "$@" > /dev/null', "sh", *shards],
        "cp": ["cp", "-r", str(ft), str(out)],
        "zero": repair,
        "passthrough": [*repair, "--exclude", "."],
    }


def compare(work: Path, repeats: int) -> Record:
    """All runs over the pair in `work`, condensed, with speeds beside cp's."""
    base, ft, out = work / "base", work / "ft", work / "out"
    of_ft, of_both = data_bytes(ft), data_bytes(base, ft)
    moved, commands = {"read": of_both, "cp": 2 * of_ft}, contenders(base, ft, out)
    warmed = warm(base, ft)
    runs: dict[str, list[Record]] = {name: [] for name in commands}
    for turn in range(repeats):
        names = list(commands)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # what comes first finds other pages free
            command = commands[name]
            runs[name].append(run_once(command, out, name, moved.get(name, 0)))
            print(f"{name}: {format_seconds(_synced_s(runs[name][-1]))}", file=sys.stderr, flush=True)
            if timings := own_account(out).get("timings"):
                moved[name] = timings["bytes_read"] + timings["bytes_written"]
    record: Record = {"bytes": of_ft, "pair_read_before": warmed}
    for name, own in runs.items():
        quickest_s = min(map(_synced_s, own))
        record[name] = condense(own) | {
            "moved_bytes": moved[name],
            "quickest_s": quickest_s,
            "moved_bytes_per_s": moved[name] / quickest_s,
        }
    for name in ("zero", "passthrough"):
        record[name]["time_ratio"] = record["cp"]["quickest_s"] / record[name]["quickest_s"]
        turns = zip(runs["cp"], runs[name], strict=True)
        record[name]["turns_time_ratio"] = statistics.median(_synced_s(cp) / _synced_s(own) for cp, own in turns)
        record[name]["speed_ratio"] = record[name]["moved_bytes_per_s"] / record["cp"]["moved_bytes_per_s"]
    return record


def _synced_s(run: Record) -> float:
    return float(run["wall_s"] + run["sync_s"])


def main() -> int:
    """Runs, prints, writes the JSON; 1 if a command failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", choices=ARCHITECTURES, default="qwen-0.5b")
    parser.add_argument("--layers", type=int, help="only the first N layers")
    parser.add_argument("--max-shard", type=parse_bytes, default="5GB", metavar="SIZE")
    parser.add_argument("--work", type=Path, metavar="DIR", help="for the pair and outputs; a temporary folder if not")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", required=True, help="of the result, in bench/results")
    arguments = parser.parse_args()
    if arguments.work:
        arguments.work.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="copying-", dir=arguments.work) as folder:
            work = Path(folder).resolve()
            decoder = architecture(arguments.arch, layers=arguments.layers)
            make_pair(decoder, work, spectrum="zero", max_shard_bytes=arguments.max_shard)
            record = {"shards": len(list((work / "ft").glob("*.safetensors")))} | compare(work, arguments.repeats)
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    record = {"name": arguments.name, "machine": machine_record()} | record
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    for name in ("read", "cp", "zero", "passthrough"):
        own = record[name]
        beside = "".join(f", {own[key]:.2f} of cp's {word}" for key, word in RATIOS.items() if key in own)
        speed = f"{format_bytes(own['moved_bytes_per_s'])}/s"
        print(f"{name:12} {format_seconds(own['quickest_s']):>9} {speed:>12}{beside}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
