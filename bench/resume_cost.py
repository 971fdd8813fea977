"""What `kill -9` at half-way costs: the time of the run that goes on, against that of an undisturbed one.

    python bench/resume_cost.py PAIR [--work DIR] [--share 0.5] [--name NAME] [-- options of streamrepair]

PAIR holds base/ and ft/. One run is left alone; another is killed once its journal has SHARE of the output's bytes, and
the same command is run again. Both results must be the same, byte for byte, and the tensors that were finished kept.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

from end_to_end import RESULTS, warm
from machine import REPOSITORY, machine_record

from streamrepair.units import format_seconds

Record = dict[str, Any]


def command(pair: Path, out: Path, options: list[str]) -> list[str]:
    """The repair."""
    words = [sys.executable, "-m", "streamrepair", pair / "base", pair / "ft", out, "--quiet", *options]
    return list(map(str, words))


def journalled(out: Path) -> dict[str, Record]:
    """Finished tensors of an unfinished run, torn lines left out."""
    found: dict[str, Record] = {}
    journal = out / ".streamrepair" / "journal"
    for line in journal.read_bytes().split(b"\n")[:-1] if journal.exists() else ():
        entry = json.loads(line.partition(b" ")[2])
        if isinstance(entry, dict):
            found[entry["name"]] = entry["record"]
    return found


def run_s(words: list[str]) -> float:
    """Seconds of a command that has to succeed."""
    began = time.perf_counter()
    subprocess.run(words, cwd=REPOSITORY, check=True)
    return time.perf_counter() - began


def killed_at(words: list[str], out: Path, total: int, share: float) -> tuple[float, dict[str, Record]]:
    """Seconds until so much was journalled and the process was killed, and what was."""
    began = time.perf_counter()
    with subprocess.Popen(words, cwd=REPOSITORY) as process:
        while sum(prod(record["shape"]) for record in journalled(out).values()) < share * total:
            if process.poll() is not None:
                sys.exit(f"error: the run ended before {share:.0%} of it were journalled: take a larger pair")
            time.sleep(0.02)
        process.kill()
    return time.perf_counter() - began, journalled(out)


def same(first: Path, second: Path) -> bool:
    """Whether two results have the same shards."""
    names = sorted(path.name for path in first.glob("*.safetensors"))
    return filecmp.cmpfiles(first, second, names, shallow=False) == (names, [], [])


def main() -> int:
    """Runs, prints, writes the JSON; 1 if the result differs or finished work was done again."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pair", type=Path)
    parser.add_argument("--work", type=Path, help="where the outputs go, the undisturbed one to stay as DIR/whole")
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--name", default="resume-cost")
    own, options = sys.argv[1:], []
    if "--" in own:
        own, options = own[: own.index("--")], own[own.index("--") + 1 :]
    arguments = parser.parse_args(own)
    work = arguments.work or Path(tempfile.mkdtemp(prefix="resume_cost-"))
    whole, out = work / "whole", work / "killed"
    for folder in (whole, out):
        shutil.rmtree(folder, ignore_errors=True)
    warm(arguments.pair / "base", arguments.pair / "ft")
    full_s = run_s(command(arguments.pair, whole, options))
    report = json.loads((whole / "streamrepair.json").read_text())["tensors"].values()
    total = sum(prod(record["shape"]) for record in report if record["action"] != "dropped")
    words = command(arguments.pair, out, options)
    killed_s, kept = killed_at(words, out, total, arguments.share)
    resumed_s = run_s(words)
    after = json.loads((out / "streamrepair.json").read_text())["tensors"]
    redone = sum(after[name] != record for name, record in kept.items())
    share = sum(prod(record["shape"]) for record in kept.values()) / total
    record = {
        "name": arguments.name, "machine": machine_record(), "full_s": full_s, "killed_s": killed_s,
        "resumed_s": resumed_s, "finished_share": share, "finished_tensors": len(kept), "done_again": redone,
        "identical": same(whole, out), "resumed_to_full": resumed_s / full_s,
        "both_to_full": (killed_s + resumed_s) / full_s,
    }  # fmt: skip
    print(
        f"undisturbed {format_seconds(full_s)}; killed after {format_seconds(killed_s)} with {share:.1%} of the "
        f"weights finished, then {format_seconds(resumed_s)}: {record['resumed_to_full']:.2f} of an undisturbed run"
    )
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0 if record["identical"] and not redone else 1


if __name__ == "__main__":
    sys.exit(main())
