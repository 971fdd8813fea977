"""Fills the tables of README.md and docs/*.md from bench/results/*.json; no number in them is typed by hand.

    python bench/tables.py [--check]

A table goes between the lines `<!-- bench:NAME -->` and `<!-- /bench -->`, NAME one of
- end_to_end: whole repairs, against the plain in-memory way where that was run too;
- copies: what `copying.py` measured, against cp and plain reading;
- memory: allowed, projected and measured memory of every run;
- budgets: what `budgets.py` measured: several budgets for one pair;
- exact: what `end_to_end.py --check` found;
- per_matrix: what `per_matrix.py` measured, one matrix at a time;
- choices: the same, as to whether "auto" took the quicker backend, and how far predicted times are off;
- plan: `streamrepair plan` as a whole process;
- campaign: the runs of `python -m tests.crash.campaign`;
- recovery: `resume_cost.py` and `verify_speed.py`.
end_to_end, memory and exact take what `end_to_end.py` writes, plan what `plan_70b.py` does. `--check` writes nothing
and ends with 1 if a table is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from streamrepair.decompose.speed import CPU
from streamrepair.engine import cost
from streamrepair.engine.memory import MatrixShape
from streamrepair.units import format_bytes, format_seconds

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "bench" / "results"
FILLED = (
    REPOSITORY / "README.md",
    REPOSITORY / "docs" / "performance.md",
    REPOSITORY / "docs" / "durability.md",
)
MARKED = re.compile(r"(?<=<!-- bench:)(?P<name>\w+) -->\n(?P<old>.*?)(?=<!-- /bench -->)", re.DOTALL)

Record = dict[str, Any]
Row = list[str]


def load(folder: Path) -> list[Record]:
    """The results in `folder`, smallest pair first."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    runs = [record for record in found if isinstance(record, dict) and {"streamrepair", "plan"} & record.keys()]
    return sorted(runs, key=lambda record: (record["bytes"], record["name"]))


def end_to_end(records: list[Record]) -> list[Row]:
    """Time and peak memory of both ways, and their ratios."""
    head = ["pair", "size", "in memory", "peak", "streamrepair", "peak", "time", "memory"]
    rows = []
    for record in records:
        other = _cost(record.get("in_memory"))
        ratios = [f"{record[key]:.1f}×" if key in record else "–" for key in ("time_ratio", "peak_ratio")]
        ours = _cost(record["streamrepair"])
        rows.append([_label(record), format_bytes(record["bytes"]), *other, *ours, *ratios])
    return [head, *rows] if rows else []


def copies() -> list[Row]:
    """Repairs that find nothing to do, beside cp and plain reading: with the sync after them, the quickest runs."""
    head = ["pair", "shards", "", "moved", "quickest", "moved per second", "of cp's speed", "cp's time ÷ its own"]
    head += ["the same, median of turns", "peak"]
    titles = {"read": "read both", "cp": "`cp -r FT`", "zero": "Δ = 0", "passthrough": "passed through"}
    rows = []
    for record in sorted(named("copy-*"), key=lambda record: record["bytes"]):
        for name, title in titles.items():
            own = record[name]
            moved, speed = format_bytes(own["moved_bytes"]), f"{format_bytes(own['moved_bytes_per_s'])}/s"
            keys = ("speed_ratio", "time_ratio", "turns_time_ratio")
            ratios = [f"{own[key]:.2f}" if key in own else "–" for key in keys]
            peak = format_bytes(own["peak_tree_bytes"])
            first = [_label(record), str(record["shards"]), title]
            rows.append([*first, moved, format_seconds(own["quickest_s"]), speed, *ratios, peak])
    return [head, *rows] if rows else []


def memory(records: list[Record]) -> list[Row]:
    """The report's own account of its memory, beside the peak that was sampled from outside."""
    head = ["pair", "allowed", "projected", "measured", "sampled from outside"]
    rows = []
    for record in records:
        budget = record.get("own_account", {}).get("budget")
        if budget is None:
            continue
        own = [format_bytes(budget[f"ram_{word}_bytes"]) for word in ("allowed", "projected", "measured")]
        rows.append([_label(record), *own, _cost(record["streamrepair"])[1]])
    return [head, *rows] if rows else []


def budgets() -> list[Row]:
    """Whether budgets hold, and what less memory costs."""
    head = ["pair", "workers", "allowed", "projected", "measured", "projected ÷ measured", "time", "processor busy"]
    rows: list[Row] = []
    for record in named("budgets-*"):
        for row in record["rows"]:
            sizes = [format_bytes(row[f"{word}_bytes"]) for word in ("allowed", "projected", "measured")]
            ratio = f"{row['projected_bytes'] / row['measured_bytes']:.2f}"
            time, share = format_seconds(row["wall_s"]), f"{row['processor_share']:.0%}"
            rows.append([row["pair"], str(row["workers"]), *sizes, ratio, time, share])
    return [head, *rows] if rows else []


def exact(records: list[Record]) -> list[Row]:
    """The output held against a float64 repair."""
    head = ["pair", "matrices", "ranks equal", "values equal", "τ off by", "Δ* off by", "rounding alone", "promise"]
    rows = []
    for record in records:
        found = record.get("exact")
        if found is None:
            continue
        errors = [f"{found[key]:.1e}" for key in ("max_tau_difference", "max_delta_error", "max_rounding_floor")]
        kept = "kept" if found["passed"] else "BROKEN"
        equal = f"{found['values_equal_share']:.4%}"
        rows.append([_label(record), str(found["matrices"]), str(found["ranks_equal"]), equal, *errors, kept])
    return [head, *rows] if rows else []


def plan(records: list[Record]) -> list[Row]:
    """Planning from headers alone, and what of it is the interpreter and the command line."""
    head = ["pair", "tensors", "shards", "size", "plan, quickest of 9", "processor", "`--version`", "processor"]
    rows = []
    for record in records:
        costs = [format_seconds(record[what][key]) for what in ("plan", "version") for key in ("wall_s", "cpu_s")]
        counts = [str(record["tensors"]), str(record["shards"])]
        rows.append([_label(record), *counts, format_bytes(record["bytes"]), *costs])
    return [head, *rows] if rows else []


def campaign() -> list[Row]:
    """Kinds of fault and the runs of each."""
    head = ["fault", "operations", "runs", "failed", "kept", "seconds"]
    rows: list[list[Any]] = []
    for record in named("crash-campaign"):
        for row in record["rows"]:
            counts = [row[key] for key in ("operations", "runs", "failed", "kept")]
            rows.append([row["fault"], *counts, f"{row['seconds']:.0f}"])
        sums = [sum(row[i] for row in rows) for i in (2, 3, 4)]
        rows.append(["all", "", *sums, f"{sum(row['seconds'] for row in record['rows']):.0f}"])
    return [head, *([str(cell) for cell in row] for row in rows)] if rows else []


def recovery() -> list[Row]:
    """What going on after a kill costs, and how fast a result is verified."""
    rows = []
    for record in named("resume-*"):
        share, ratio = f"{record['finished_share']:.0%}", f"{record['resumed_to_full']:.2f}"
        what = f"{record['name']}: killed with {share} of the weights finished"
        times = f"{format_seconds(record['resumed_s'])} to go on, {format_seconds(record['full_s'])} undisturbed"
        rows.append([what, times, ratio])
    for record in named("verify-*"):
        for state in ("cold", "cached"):
            speeds = [f"{format_bytes(record['bytes'] / record[f'{what}_{state}_s'])}/s" for what in ("verify", "read")]
            what = f"{record['name']}: {state}"
            rows.append(
                [what, f"{speeds[0]} verified, {speeds[1]} read in sequence", f"{record[f'{state}_ratio']:.2f}"]
            )
    return [["what", "measured", "ratio"], *rows] if rows else []


def named(pattern: str) -> list[Record]:
    """The results of one kind, by the names of their files."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{pattern}.json"))]


def per_matrix() -> list[Row]:
    """Seconds and speed-ups of each backend over torch.linalg.svd."""
    head = [
        "matrix",
        "spectrum",
        "kept",
        "`torch.linalg.svd`",
        "backend",
        "alone",
        "two at once",
        "rank",
        "Δ\\* off by",
    ]
    rows: list[Row] = []
    for record in named("per-matrix*"):
        for case in record["cases"]:
            m, n = case["shape"]
            plain = case["reference"]
            for run in case["runs"]:
                check = run.get("check")
                rank = "–" if check is None else "equal" if check["rank_agrees"] else "WRONG"
                error = "–" if check is None else f"{check['delta_error']:.0e}"
                both = f"{run['pair_speedup']:.1f}×" if run.get("pair_speedup") else "–"
                alone = f"{format_seconds(run['seconds'])}, {run['speedup']:.1f}×"
                kept, name = f"{run['rank_kept'] / min(m, n):.0%}", f"{run['name']} ({run['decided_by']})"
                reference = f"{format_seconds(plain['seconds'])}, {plain['threads']} thr."
                rows.append([f"{m} × {n}", case["spectrum"], kept, reference, name, alone, both, rank, error])
    return [head, *rows] if rows else []


def choices() -> list[Row]:
    """For each matrix: what auto took, what was quickest, what the difference cost, and what was predicted."""
    head = ["matrix", "spectrum", "auto took", "seconds", "quickest", "seconds", "cost", "predicted"]
    rows: list[Row] = []
    for record in named("per-matrix*"):
        for case in record["cases"]:
            runs = {run["name"]: run for run in case["runs"]}
            if "auto" not in runs:
                continue
            own = {name: run for name, run in runs.items() if name in ("gram", "randomized")}
            best = min(own.values(), key=lambda run: run["seconds"])
            auto, (m, n) = runs["auto"], case["shape"]
            method = "randomized" if auto["decided_by"].startswith("randomized") else "gram"
            shape = MatrixShape(max(m, n), min(m, n), 2, 2, 2)
            guess = cost.predicted(shape, method, CPU, auto["rank_kept"] / min(m, n)).total_s
            took, least = auto["seconds"], best["seconds"]
            cost_of_choice = f"{max(0.0, took / least - 1):.0%}"
            chosen = [auto["decided_by"], format_seconds(took), best["decided_by"], format_seconds(least)]
            rows.append([f"{m} × {n}", case["spectrum"], *chosen, cost_of_choice, format_seconds(guess)])
    return [head, *rows] if rows else []


TABLES: dict[str, Callable[[list[Record]], list[Row]]] = {
    "end_to_end": end_to_end,
    "copies": lambda _: copies(),
    "memory": memory,
    "budgets": lambda _: budgets(),
    "exact": exact,
    "per_matrix": lambda _: per_matrix(),
    "choices": lambda _: choices(),
    "plan": plan,
    "campaign": lambda _: campaign(),
    "recovery": lambda _: recovery(),
}


def _label(record: Record) -> str:
    name: str = record["name"]
    return name.removeprefix("end-to-end-").removeprefix("copy-").removeprefix("plan-")


def _cost(run: Record | None) -> tuple[str, str]:
    """Wall time and sampled peak of one contender."""
    if run is None:
        return "–", "–"
    return format_seconds(run["wall_s"]), format_bytes(run["peak_tree_bytes"])


def _machines(records: Iterable[Record]) -> list[str]:
    """One line for each machine and state of the code that the results come from."""
    lines = []
    for record in records:
        m = record["machine"]
        line = (
            f"{m['cpu']}, {m['cores']} cores, {format_bytes(m['ram_bytes'])}; Python {m['python']}, "
            f"NumPy {m['numpy']}, SciPy {m['scipy']}, torch {m['torch']}; commit {m['streamrepair_commit']}"
        )
        if line not in lines:
            lines.append(line)
    return lines


def _bench_machine(record: Record) -> str:
    """The line of a result of `streamrepair bench`."""
    m = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items() if version)
    load = f"load average before {record['load_before']:.1f}"
    return f"{m['cpu']}, {m['cores']} cores; {versions}; {record['dtype']}; {record['date'][:10]}; {load}.\n"


def section(name: str, records: list[Record]) -> str:
    """The text between the markers of table `name`, its last newline included."""
    records = [record for record in records if ("plan" in record) == (name == "plan")]
    rows = TABLES[name](records)
    if not rows:
        return "No result yet: `make bench` measures.\n"
    head, *body = rows
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    others = {"campaign": "crash-campaign", "recovery": "[rv]e*-*", "budgets": "budgets-*", "copies": "copy-*"}
    if name in others:
        records = named(others[name])
        return f"{table}\n\n" + "".join(f"{line}.\n" for line in _machines(records))
    if name in ("per_matrix", "choices"):
        return f"{table}\n\n{''.join(sorted({_bench_machine(r) for r in named('per-matrix*')}))}"
    shown = {row[0] for row in body}
    return f"{table}\n\n" + "".join(f"{line}.\n" for line in _machines(r for r in records if _label(r) in shown))


def filled(text: str, records: list[Record]) -> str:
    """`text` with every marked section made anew.

    Raises:
        KeyError: a marker names no table.
    """
    return MARKED.sub(lambda found: f"{found['name']} -->\n{section(found['name'], records)}", text)


def main() -> int:
    """Writes, or with --check compares, every file that has markers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a table is out of date")
    arguments = parser.parse_args()
    records = load(RESULTS)
    stale = 0
    for path in FILLED:
        text = path.read_text(encoding="utf-8")
        new = filled(text, records)
        if new == text:
            continue
        stale += 1
        print(f"{path.relative_to(REPOSITORY)}: {'out of date' if arguments.check else 'filled'}")
        if not arguments.check:
            path.write_text(new, encoding="utf-8")
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
