"""Speed of `verify` against reading the same files in sequence: what checking every digest costs.

    python bench/verify_speed.py OUT [--repeats N] [--name NAME]

OUT is a finished result. Each of the two is timed with the files out of the page cache (as far as the kernel lets go of
them when asked) and then with them in it. `verify` is timed as a command, start of the interpreter included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from end_to_end import RESULTS
from machine import machine_record, measure

from streamrepair.units import format_bytes, format_seconds


def forget(files: list[Path]) -> None:
    """Ask the kernel to drop the files from its cache."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_s(files: list[Path]) -> float:
    """Seconds to read the files from start to end, 16 MiB at a time into one buffer."""
    buffer, began = bytearray(1 << 24), time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - began


def verify_s(out: Path) -> float:
    """Seconds of the command."""
    measured = measure([sys.executable, "-m", "streamrepair", "verify", str(out), "--quiet"])
    if measured.status != 0:
        sys.exit(f"error: verify ended with status {measured.status}: {measured.output}")
    return measured.wall_s


def main() -> int:
    """Measures, prints and writes the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="verify-speed")
    arguments = parser.parse_args()
    files = sorted(arguments.out.glob("*.safetensors"))
    size_bytes = sum(file.stat().st_size for file in files)
    runs: list[dict[str, float]] = []
    for _ in range(arguments.repeats):
        forget(files)
        run = {"read_cold_s": read_s(files)}
        run["read_cached_s"] = read_s(files)
        forget(files)
        run["verify_cold_s"] = verify_s(arguments.out)
        read_s(files)
        run["verify_cached_s"] = verify_s(arguments.out)
        runs.append(run)
    median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    record: dict[str, Any] = {"name": arguments.name, "machine": machine_record(), "bytes": size_bytes, **median}
    for state in ("cold", "cached"):
        record[f"{state}_ratio"] = median[f"read_{state}_s"] / median[f"verify_{state}_s"]
        speeds = [f"{format_bytes(size_bytes / median[f'{what}_{state}_s'])}/s" for what in ("read", "verify")]
        print(f"{state:>7}: read {speeds[0]}, verify {speeds[1]}: {record[f'{state}_ratio']:.2f} of it")
    print(f"{format_bytes(size_bytes)}, verify takes {format_seconds(median['verify_cold_s'])}")
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(record | {"runs": runs}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
