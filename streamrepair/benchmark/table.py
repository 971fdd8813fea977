"""A benchmark as text for a terminal: one row per contender, then what is needed to read it."""

from __future__ import annotations

from streamrepair.benchmark.records import Benchmark, CaseRecord, Run
from streamrepair.units import format_bytes, format_seconds

_HEAD = (
    "shape", "spectrum", "kept", "by", "threads", "time", "GFLOP/s", "speed-up", "2 at once", "rank", "Δ* off by",
    "memory",
)  # fmt: skip
_TEXT_COLUMNS = 4
"""Leading columns that are words, aligned left; the rest are numbers, aligned right."""

_BUSY = 0.5


def render(benchmark: Benchmark) -> str:
    """The table and the lines under it, each ended by a newline."""
    rows: list[tuple[str, ...]] = [_HEAD]
    for case in benchmark.cases:
        contenders = ([case.reference] if case.reference is not None else []) + list(case.runs)
        for i, run in enumerate(contenders):
            rows.append(
                (*(_matrix(case, run) if i == 0 else ("", "", "")), *_contender(run, ours=run is not case.reference))
            )
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "", *_notes(benchmark)]) + "\n"


def _aligned(row: tuple[str, ...], widths: list[int]) -> list[str]:
    return [
        cell.ljust(width) if i < _TEXT_COLUMNS else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def _matrix(case: CaseRecord, run: Run) -> tuple[str, str, str]:
    """Shape, spectrum and kept share."""
    rank = run.check.rank_exact if run.check is not None else run.rank_kept
    number = f"{case.count} of " if case.count > 1 else ""
    return f"{number}{case.shape[0]} × {case.shape[1]}", case.spectrum, f"{rank / min(case.shape):.0%}"


def _contender(run: Run, *, ours: bool) -> tuple[str, ...]:
    peak_bytes = run.peak_device_bytes if run.peak_device_bytes is not None else run.peak_array_bytes
    return (
        run.decided_by if run.decided_by.startswith(run.name) else f"{run.name} → {run.decided_by}",
        str(run.threads),
        format_seconds(run.seconds),
        f"{run.gflops:.3g}",
        _times(run.speedup),
        _times(run.pair_speedup) if run.pair_speedup is not None else _each(run.pair_seconds),
        *_verdict(run, ours=ours),
        format_bytes(peak_bytes) if peak_bytes is not None else "",
    )


def _verdict(run: Run, *, ours: bool) -> tuple[str, str]:
    """Rank and error of Δ*; what float32 gets wrong in the reference is worth knowing, in a backend it is a fault."""
    check = run.check
    if check is None:
        return str(run.rank_kept), ""
    rank = f"{run.rank_kept} = float64" if check.rank_agrees else f"{run.rank_kept} ≠ {check.rank_exact}"
    wrong = " WRONG" if ours and not check.passed else ""
    return rank, f"{check.delta_error:.1e}{wrong}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3g}×"


def _each(pair_seconds: float | None) -> str:
    return "" if pair_seconds is None else f"{format_seconds(pair_seconds / 2)} each"


def _notes(benchmark: Benchmark) -> list[str]:
    machine = benchmark.machine
    place = f"{machine.gpu} ({benchmark.device})" if machine.gpu else f"{machine.cpu}, {machine.cores} cores"
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items() if version)
    notes = [
        f"{place}; {benchmark.dtype} in and out, median of {benchmark.repeats} after a warm-up; {versions}",
        "streamrepair uses one BLAS thread per matrix; 2 at once: two matrices on two workers, matrices per second "
        "against the reference's" if any(r.pair_seconds for c in benchmark.cases for r in c.runs)
        else "streamrepair uses one BLAS thread per matrix",
    ]  # fmt: skip
    if any(case.reference for case in benchmark.cases):
        notes.append(
            "speed-up: over torch.linalg.svd of the float32 delta, in memory, all threads or one, whichever is faster"
        )
    if benchmark.load_before > _BUSY:
        notes.append(f"the machine was busy before (load average {benchmark.load_before:.1f}): times may be disturbed")
    absent = {case.reference_absent: None for case in benchmark.cases if case.reference_absent}
    notes.extend(f"no reference: {reason}" for reason in absent)
    if not any(run.check for case in benchmark.cases for run in case.runs):
        notes.append("not checked: ranks are not held against a float64 SVD")
    climbed = {f"{case.label}: {why}": None for case in benchmark.cases for run in case.runs for why in run.climbed}
    notes.extend(climbed)
    return notes
