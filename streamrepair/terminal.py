"""What a person sees: the progress bar, the plan's table, the closing summary."""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import msgspec

from streamrepair.decompose.speed import CPU
from streamrepair.engine.plan import Plan
from streamrepair.errors import shown
from streamrepair.report import Action, Report, ResourceUse, TensorRecord
from streamrepair.streams import speaking
from streamrepair.units import counted, format_bytes, format_seconds, whole_mb
from streamrepair.verification import Verified
from streamrepair.views import groups

if TYPE_CHECKING:
    from tqdm import tqdm

_now = time.monotonic
_WAITS = {"read": "reads", "write": "writes", "memory": "memory"}
_SILENT_S = 30.0  # between lines of progress where there is no terminal to overwrite


class Bar:
    """A watcher with a progress bar in bytes of the result, on stderr; in a file or a pipe, a line now and then."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: tqdm[NoReturn] | None = None
        self._total_bytes = self._done_bytes = 0
        self._found_bytes = 0
        self._began = self._said = _now()

    def begin(self, plan: Plan, done_bytes: int) -> None:
        """Show the bar."""
        if self._quiet:
            return
        self._total_bytes, self._done_bytes = sum(task.out.nbytes for task in plan.tasks), done_bytes
        if done_bytes:
            total = format_bytes(self._total_bytes)
            self.note(f"continuing: {format_bytes(done_bytes)} of {total} were finished before")
        self._found_bytes, self._began = done_bytes, _now()
        if sys.stderr.isatty():
            with contextlib.suppress(Exception):  # whatever comes of a TQDM_… in the environment: then without a bar
                self._bar = self._shown_bar()

    def _shown_bar(self) -> tqdm[NoReturn]:
        from tqdm import tqdm  # a tenth of the start-up, which a run without a terminal does not need

        return tqdm(
            total=self._total_bytes, initial=self._found_bytes, unit="B", unit_scale=True, desc="repair",
            file=sys.stderr, mininterval=0.2, dynamic_ncols=True, leave=False,
            smoothing=0.02,  # matrices differ in what a byte of them costs: the last few tell little
        )  # fmt: skip

    def advance(self, done_bytes: int) -> None:
        """Move the bar; from any thread."""
        if self._bar is not None:
            with contextlib.suppress(OSError):  # a terminal that hung up is no reason to stop
                self._bar.update(done_bytes)
            return
        self._done_bytes += done_bytes  # threads may lose an addition to each other: it is for the eye
        if _now() - self._said > _SILENT_S:
            self._said = _now()
            self.note(f"{format_bytes(self._done_bytes)} of {format_bytes(self._total_bytes)} done{self._left()}")

    def _left(self) -> str:
        """How long it will still take at the mean rate of this run, in words."""
        here, now = self._done_bytes - self._found_bytes, _now()
        if here <= 0:
            return ""
        return f", about {format_seconds((now - self._began) / here * (self._total_bytes - self._done_bytes))} left"

    def warn(self, message: str) -> None:
        """One line above the bar."""
        self.note(f"warning: {message}")

    def note(self, message: str) -> None:
        """One line above the bar."""
        if not self._quiet:
            line = " ".join(message.split())
            with speaking, contextlib.suppress(OSError):  # likewise a reader that left
                if self._bar is None:
                    print(line, file=sys.stderr, flush=True)
                else:
                    self._bar.write(line, file=sys.stderr)

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def print_json(value: object) -> None:
    """One JSON document on stdout, in ASCII where stdout is not UTF-8: its own escapes (\\xe9) are none of JSON's."""
    text = msgspec.json.format(msgspec.json.encode(value)).decode()
    if codecs.lookup(sys.stdout.encoding or "ascii").name != "utf-8":
        text = re.sub(r"[^\x00-\x7f]", lambda found: json.dumps(found[0])[1:-1], text)  # they stand in strings only
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def print_plan(plan: Plan) -> None:
    """The plan's table and totals."""
    cuda = bool(plan.gpus)
    rows = [("tensors", "shape", "what", "result", "memory each", *(["on GPU"] if cuda else []), "one worker")]
    listed = groups(plan)
    for group in listed:
        vram = [format_bytes(group.vram_bytes)] if cuda else []
        memory_each = (format_bytes(group.ram_bytes), *vram)
        shape = " × ".join(map(str, group.shape))
        out, time_s = format_bytes(group.out_bytes), format_seconds(group.seconds)
        rows.append((str(group.count), shape, group.treatment, out, *memory_each, time_s))
    if plan.dropped:
        rows.append((str(len(plan.dropped)), "", "drop, not in FT", *[""] * (len(rows[0]) - 3)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        aligned = (
            row[0].rjust(widths[0]),
            *(cell.ljust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        )
        print("  ".join(aligned).rstrip())
    print()
    for means, reason in {group.means: group.why for group in listed if group.why}.items():
        print(f"{means}: {reason}")
    work = f"{format_bytes(plan.read_bytes)} to read, {format_bytes(plan.out_bytes)} to write in "
    work += f"{counted(len(plan.layouts), 'shard')}, {sum(t.flops for t in plan.tasks) / 1e9:,.0f} GFLOP"
    print(work)
    by = "speeds measured here"
    if plan.rates == CPU:
        by = "shipped speeds (streamrepair bench --calibrate measures this machine's)"
    lanes = f"{plan.device} with {counted(plan.workers, 'worker')}, a processor each"
    print(f"time: about {format_seconds(plan.estimated_s)} on {lanes}, by {by}")
    _print_memory(plan)


def _print_memory(plan: Plan) -> None:
    """Budgets, and what more memory would allow."""
    line = f"memory: {format_bytes(plan.ram_projected_bytes)} projected, {format_bytes(plan.ram_allowed_bytes)} allowed"
    if plan.vram_projected_bytes is not None and plan.vram_allowed_bytes is not None:
        line += (
            f"; per GPU {format_bytes(plan.vram_projected_bytes)} projected, "
            f"{format_bytes(plan.vram_allowed_bytes)} allowed"
        )
    if plan.side_by_side < len(plan.at_once):
        line += (
            f": room for {plan.side_by_side} of the largest at once, for one per worker with --ram "
            f"{whole_mb(plan.ram_unhindered_bytes)}"
        )
    print(line)
    sys.stdout.flush()


def print_summary(report: Report, out: Path) -> None:
    """What was done, in the lines a person reads before they go on."""
    actions = Counter(record.action for record in report.tensors.values())
    names: dict[Action, str] = {
        "repaired": "repaired",
        "copied": "copied (delta is zero)",
        "kept_ft": "kept as fine-tuned",
        "dropped": "dropped",
    }
    counts = ", ".join(f"{actions[a]} {words}" for a, words in names.items() if actions[a])
    print(f"{shown(str(out))}: {counted(len(report.tensors), 'tensor')}: {counts}")
    repaired = {name: record for name, record in report.tensors.items() if record.action == "repaired"}
    if repaired:
        _print_spectrum(repaired)
    _print_cost(report)


def _print_spectrum(repaired: dict[str, TensorRecord]) -> None:
    kept = sum(r.rank_kept or 0 for r in repaired.values())
    total = sum(r.rank_total or 0 for r in repaired.values())
    # Norms, not their squares: those of float64 deltas can overflow or vanish.
    norm_in = math.hypot(*(r.frob_delta_in or 0.0 for r in repaired.values()))
    norm_out = math.hypot(*(r.frob_delta_out or 0.0 for r in repaired.values()))
    lost = math.hypot(*((r.rounding_loss or 0.0) * (r.frob_delta_out or 0.0) for r in repaired.values()))
    share = (norm_out / norm_in) ** 2 if norm_in else 0.0
    line = f"rank kept {kept} of {total} ({kept / total:.1%}), energy kept {share:.1%} of the delta's"
    if norm_out:
        line += f", of which rounding to the output's dtype loses {(lost / norm_out) ** 2:.2%}"
    print(line)
    ordered = sorted(repaired.items(), key=lambda item: (item[1].rank_kept or 0) / max(1, item[1].rank_total or 0))
    for word, (name, record) in (("least", ordered[0]), ("most", ordered[-1])):
        print(f"  {word:<5} {record.rank_kept} of {record.rank_total}  {shown(name)}")


def _print_cost(report: Report) -> None:
    timings, budget = report.timings, report.budget
    rate = timings.bytes_read / timings.wall_s if timings.wall_s else 0.0
    sessions = f" in {report.sessions} sessions" if report.sessions > 1 else ""
    print(
        f"{format_seconds(timings.wall_s)}{sessions} on {report.device} with {counted(report.workers, 'worker')}: read "
        f"{format_bytes(timings.bytes_read)} ({format_bytes(rate)}/s), wrote {format_bytes(timings.bytes_written)} "
        f"({format_bytes(timings.bytes_written / timings.wall_s if timings.wall_s else 0.0)}/s)"
    )
    _print_use(report)
    line = (
        f"memory: measured peak {format_bytes(budget.ram_measured_bytes)}, projected "
        f"{format_bytes(budget.ram_projected_bytes)}, allowed {format_bytes(budget.ram_allowed_bytes)}"
    )
    if budget.vram_measured_bytes is not None:
        line += (
            f"; GPU {format_bytes(budget.vram_measured_bytes)}, projected "
            f"{format_bytes(budget.vram_projected_bytes or 0)}, allowed {format_bytes(budget.vram_allowed_bytes or 0)}"
        )
    print(line, flush=True)


def _print_use(report: Report) -> None:
    """Who was busy, and who waited for what: each GPU by itself, the CPU's workers together."""
    grouped: dict[str, list[ResourceUse]] = {}
    for use in report.utilisation:
        grouped.setdefault(use.name.partition(" ")[0], []).append(use)
    parts = []
    for name, uses in grouped.items():
        busy, idle = sum(use.busy_s for use in uses), sum(use.idle_s for use in uses)
        total = busy + idle + sum(sum(use.waiting_s.values()) for use in uses)
        waits = [(sum(use.waiting_s.get(kind, 0.0) for use in uses), kind) for kind in ("read", "write", "memory")]
        shares = [
            f"{wait_s / total:.0%} waiting for {_WAITS[kind]}" for wait_s, kind in waits if wait_s > 0.005 * total
        ]
        words = f"{name} busy {busy / total:.0%}" if total else f"{name} busy 0%"
        parts.append(", ".join([words, *shares]))
    if parts:
        print("; ".join(parts))


def print_verified(result: Verified, out: Path) -> None:
    """What was checked and what was found."""
    for damage in result.mended:
        print(f"{shown(damage.where)}: {damage.what}: done again")
    for damage in result.damage:
        print(f"{shown(damage.where)}: {damage.what}")
    for check in result.deep:
        beyond = f"off by {check.delta_error:.1e} beyond rounding" if check.delta_error else "right to within rounding"
        print(
            f"{shown(check.name)}: rank {check.rank_kept}, float64 SVD {check.rank_exact}; "
            f"{check.correctly_rounded:.4%} of values correctly rounded, none off by more than "
            f"{check.largest_ulp:.2f} units in the last place; delta {beyond}"
        )
    state = counted(len(result.damage), "fault") if result.damage else "whole"
    rate = result.bytes / result.seconds if result.seconds else 0.0
    print(
        f"{shown(str(out))}: {state}; {counted(result.tensors, 'tensor')}, {format_bytes(result.bytes)} checked in "
        f"{format_seconds(result.seconds)} ({format_bytes(rate)}/s)",
        flush=True,
    )
