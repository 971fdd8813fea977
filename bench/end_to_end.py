"""Time and memory of a whole repair: streamrepair against the plain in-memory way, each as its own process.

    python bench/end_to_end.py --arch llama-135m --spectrum heavy --check -- --ram 2GB
    python bench/end_to_end.py --pair PAIR --skip-reference --name 70b -- --device cuda

What follows `--` goes to streamrepair. Runs alternate, after one reading of the pair that leaves it in the page cache
where it fits. The result is printed as a table and written as JSON. Copies (Δ = 0) are `copying.py`'s.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from architectures import ARCHITECTURES
from machine import REPOSITORY, Measured, machine_record, measure
from make_pair import DTYPES, SPECTRA

from streamrepair.units import format_bytes, format_seconds

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"

Record = dict[str, Any]


class CommandError(Exception):
    """A measured command failed; the message holds the end of its output."""


def data_bytes(*folders: Path) -> int:
    """Bytes of the .safetensors files (or of the file itself) of each."""
    files = (file for folder in folders for file in ([folder] if folder.is_file() else folder.glob("*.safetensors")))
    return sum(file.stat().st_size for file in files)


def warm(*folders: Path) -> bool:
    """Reads the files once if they fit in half the memory, so that no run finds a colder cache than another."""
    if data_bytes(*folders) > psutil.virtual_memory().total // 2:
        return False
    for folder in folders:
        for file in folder.glob("*.safetensors"):
            with file.open("rb", buffering=0) as stream:
                while stream.read(1 << 24):
                    pass
    return True


def make_pair(arguments: argparse.Namespace, work: Path) -> Path:
    """A fresh pair under `work`, made by a process of its own."""
    pair = work / "pair"
    command = [sys.executable, str(BENCH / "make_pair.py"), arguments.arch, str(pair)]
    command += ["--spectrum", arguments.spectrum, "--dtype", arguments.dtype, "--seed", str(arguments.seed)]
    command += ["--layers", str(arguments.layers)] if arguments.layers is not None else []
    _succeed(measure(command), "make_pair.py")
    return pair


def _succeed(measured: Measured, what: str) -> Measured:
    if measured.status != 0:
        raise CommandError(f"{what} ended with status {measured.status}:\n{measured.output}")
    return measured


def run_once(command: list[str], out: Path, what: str, size_bytes: int) -> Record:
    """One run into a fresh `out`, with what is left in the page cache written out after it, and timed apart."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    measured = _succeed(measure(command), what)
    start = time.perf_counter()
    os.sync()
    sync_s = time.perf_counter() - start
    run = {"wall_s": measured.wall_s, "sync_s": sync_s, "bytes_per_s": size_bytes / measured.wall_s}
    return run | asdict(measured.peaks)


def condense(runs: list[Record]) -> Record:
    """The median time and the largest memory of repeated runs, and the runs themselves."""
    record = {key: statistics.median(run[key] for run in runs) for key in ("wall_s", "sync_s", "bytes_per_s")}
    for key in ("tree_bytes", "tree_anonymous_bytes", "high_water_bytes"):
        record[f"peak_{key}"] = max(run[key] for run in runs)
    return record | {"runs": runs}


def contenders(arguments: argparse.Namespace, base: Path, ft: Path, work: Path) -> dict[str, tuple[list[str], Path]]:
    """Name → (command, its output folder), in the order in which they take turns."""
    out, reference = work / "out", work / "reference"
    commands: dict[str, tuple[list[str], Path]] = {}
    if not arguments.skip_reference:
        script = [sys.executable, str(BENCH / "in_memory.py")]
        commands["in_memory"] = ([*script, str(base), str(ft), str(reference)], reference)
    engine = [sys.executable, "-m", "streamrepair", str(base), str(ft), str(out), *arguments.options]
    commands["streamrepair"] = (engine, out)
    return commands


def compare(arguments: argparse.Namespace, base: Path, ft: Path, work: Path) -> Record:
    """All runs, condensed, with the ratios of the other way to streamrepair."""
    size_bytes = data_bytes(base, ft)
    commands = contenders(arguments, base, ft, work)
    warmed = warm(base, ft)
    runs: dict[str, list[Record]] = {name: [] for name in commands}
    for _ in range(arguments.repeats):
        for name, (command, out) in commands.items():
            runs[name].append(run_once(command, out, name, size_bytes))
            print(f"{name}: {format_seconds(runs[name][-1]['wall_s'])}", file=sys.stderr, flush=True)
    condensed = {name: condense(records) for name, records in runs.items()}
    record: Record = {"bytes": size_bytes, "pair_read_before": warmed, **condensed}
    other, ours = condensed.get("in_memory"), condensed["streamrepair"]
    if other is not None:
        record["time_ratio"] = other["wall_s"] / ours["wall_s"]
        record["time_ratio_synced"] = (other["wall_s"] + other["sync_s"]) / (ours["wall_s"] + ours["sync_s"])
        record["peak_ratio"] = other["peak_tree_bytes"] / max(1, ours["peak_tree_bytes"])
    record["commands"] = {name: _public(command, base, work) for name, (command, _) in commands.items()}
    return record


def _public(command: list[str], base: Path, work: Path) -> str:
    """The command without the folders of this machine."""
    text = shlex.join(command)
    for path, name in ((work, "WORK"), (base.parent, "PAIR"), (sys.executable, "python"), (f"{REPOSITORY}/", "")):
        text = text.replace(str(path), name)
    return text


def check(base: Path, ft: Path, out: Path, work: Path, sample: int | None) -> Record:
    """exact.py's summary of streamrepair's output."""
    result = work / "exact.json"
    command = [sys.executable, str(BENCH / "exact.py"), str(base), str(ft), str(out), "--json", str(result)]
    command += ["--sample", str(sample)] if sample is not None else []
    result.unlink(missing_ok=True)
    measured = measure(command)
    if not result.exists():
        raise CommandError(f"exact.py ended with status {measured.status}:\n{measured.output}")
    summary: Record = json.loads(result.read_text())
    del summary["tensors"]
    return summary


def own_account(out: Path) -> Record:
    """streamrepair's budget and timings, as its report states them."""
    report = out / "streamrepair.json"
    if not report.exists():
        return {}
    content = json.loads(report.read_text())
    return {key: content.get(key) for key in ("budget", "timings")}


def table(record: Record, names: list[str]) -> str:
    """The comparison as fixed-width text."""
    columns: list[tuple[str, Callable[[Record], str]]] = [
        ("wall", lambda r: format_seconds(r["wall_s"])),
        ("then sync", lambda r: format_seconds(r["sync_s"])),
        ("speed", lambda r: f"{format_bytes(r['bytes_per_s'])}/s"),
        ("peak, tree", lambda r: format_bytes(r["peak_tree_bytes"])),
        ("anonymous", lambda r: format_bytes(r["peak_tree_anonymous_bytes"])),
        ("VmHWM", lambda r: format_bytes(r["peak_high_water_bytes"])),
    ]
    lines = [" " * 14 + "".join(f"{title:>14}" for title, _ in columns)]
    lines += [f"{name:14}" + "".join(f"{show(record[name]):>14}" for _, show in columns) for name in names]
    if "time_ratio" in record:
        synced = record["time_ratio_synced"]
        lines.append(
            f"{names[0]} to {names[1]}: time {record['time_ratio']:.2f} ({synced:.2f} with sync), "
            f"peak {record['peak_ratio']:.2f}"
        )
    if "exact" in record:
        lines += [f"{key:>20}  {value}" for key, value in record["exact"].items()]
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    pair = parser.add_argument_group("the pair")
    pair.add_argument("--arch", choices=ARCHITECTURES, default="llama-135m")
    pair.add_argument("--spectrum", choices=SPECTRA, default="heavy")
    pair.add_argument("--dtype", choices=DTYPES, default="bf16")
    pair.add_argument("--layers", type=int, help="only the first N layers")
    pair.add_argument("--seed", type=int, default=0)
    pair.add_argument("--pair", type=Path, metavar="DIR", help="take DIR/base and DIR/ft instead of making a pair")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="for the pair and the outputs; a temporary folder if not"
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--skip-reference", action="store_true", help="run streamrepair alone")
    parser.add_argument("--check", action="store_true", help="hold the output against float64")
    parser.add_argument("--sample", type=int, metavar="N", help="of --check: decompose N matrices only")
    parser.add_argument("--name", help="of the result; made from the pair if not given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write here and not to bench/results/NAME.json")
    own, options = sys.argv[1:], []
    if "--" in own:
        split = own.index("--")
        own, options = own[:split], own[split + 1 :]
    arguments = parser.parse_args(own)
    arguments.options = options
    return arguments


def _name(arguments: argparse.Namespace) -> str:
    if arguments.name:
        return arguments.name
    if arguments.pair:
        source = arguments.pair.resolve().name
    else:
        cut = f"{arguments.layers}layers" if arguments.layers is not None else ""
        source = "-".join(filter(None, (arguments.arch, cut, arguments.spectrum, arguments.dtype)))
    return f"end-to-end-{source}"


def run(arguments: argparse.Namespace, work: Path) -> Record:
    """The whole comparison, with `work` for everything temporary."""
    pair = arguments.pair.resolve() if arguments.pair else make_pair(arguments, work)
    base, ft = pair / "base", pair / "ft"
    record = compare(arguments, base, ft, work)
    record["own_account"] = own_account(work / "out")
    if arguments.check:
        record["exact"] = check(base, ft, work / "out", work, arguments.sample)
    return {"name": _name(arguments), "machine": machine_record(), **record}


def main() -> int:
    """Runs, prints the table, writes the JSON; 1 if a command failed or the check found a broken promise."""
    arguments = _arguments()
    if arguments.work:
        arguments.work.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="end_to_end-", dir=arguments.work) as work:
            record = run(arguments, Path(work).resolve())
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    target = arguments.json or RESULTS / f"{record['name']}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    names = [name for name in ("in_memory", "streamrepair") if name in record]
    print(f"{record['name']}: {format_bytes(record['bytes'])}, {record['machine']['cpu']}")
    print(table(record, names))
    print(f"written: {target}")
    return 0 if record.get("exact", {"passed": True})["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
