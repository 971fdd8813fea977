"""A benchmark as a bar chart: hand-written SVG, alone or in a page of HTML; nothing to install and nothing to load."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from pathlib import Path

from streamrepair.benchmark.records import Benchmark, CaseRecord
from streamrepair.checkpoint.refusals import shown_path
from streamrepair.checkpoint.wholefile import write_atomic
from streamrepair.errors import UsageError

_COLOURS = ("#1b6ca8", "#7fb6dd", "#b3541e", "#e6a97c", "#4d7c3a", "#a7cc95")
_WIDTH, _LEFT, _RIGHT, _TOP, _FOOT = 860, 190, 70, 78, 46
_BAR, _GAP = 16, 14
_MOST_STEPS = 8


@dataclass(frozen=True, slots=True)
class _Bar:
    series: str
    value: float


def check_target(path: Path) -> None:
    """Refuse a file that could not be written after a long measurement.

    Raises:
        UsageError: its name ends neither in .svg nor in .html, or its folder does not exist.
    """
    if path.suffix.lower() not in (".svg", ".html"):
        raise UsageError(f"--plot {shown_path(path)}: expected a name that ends in .svg or .html")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {shown_path(path)}: there is no folder {shown_path(path.parent)}: create it first")


def save(benchmark: Benchmark, path: Path) -> None:
    """Write the chart to a .svg or .html file, replacing it.

    Raises:
        OutputError: it cannot be written.
    """
    chart = svg(benchmark)
    if path.suffix.lower() == ".html":
        title = "streamrepair bench"
        chart = f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n{chart}</html>\n'
    write_atomic(path, chart.encode(), among_others=True)


def svg(benchmark: Benchmark) -> str:
    """Speed-up over the reference for each case and backend; GFLOP/s where there is no reference."""
    compared = any(case.reference for case in benchmark.cases)
    groups = [(case.label, _bars(case, compared=compared)) for case in benchmark.cases]
    series = list(dict.fromkeys(bar.series for _, bars in groups for bar in bars))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(series)}
    largest = max((bar.value for _, bars in groups for bar in bars), default=1.0)
    ticks = _ticks(largest)
    per_unit = (_WIDTH - _LEFT - _RIGHT) / ticks[-1]
    body: list[str] = []
    y = float(_TOP)
    for label, bars in groups:
        body.append(_text(_LEFT - 10, y + len(bars) * _BAR / 2 + 4, label, anchor="end"))
        for bar in bars:
            body.append(_rect(_LEFT, y + 1, bar.value * per_unit, _BAR - 2, colours[bar.series]))
            value = f"{bar.value:.3g}{'×' * compared}"
            body.append(_text(_LEFT + bar.value * per_unit + 5, y + _BAR - 4, value, size=11))
            y += _BAR
        y += _GAP
    axis = _axis(ticks, per_unit, y, compared=compared)
    head = _head(benchmark, colours, compared=compared)
    return _document(y + _FOOT, [*head, *axis, *body])


def _bars(case: CaseRecord, *, compared: bool) -> list[_Bar]:
    bars = []
    for run in case.runs:
        one = run.speedup if compared else run.gflops
        two = run.pair_speedup if compared else 2e-9 * case.flops / run.pair_seconds if run.pair_seconds else None
        bars += [_Bar(run.name, one)] if one is not None else []
        bars += [_Bar(f"{run.name}, 2 at once", two)] if two is not None else []
    return bars


def _ticks(largest: float) -> list[float]:
    """Round numbers from 0 to at least `largest`."""
    power = 10.0 ** math.floor(math.log10(largest / _MOST_STEPS))
    step = next(power * k for k in (1, 2, 5, 10, 20) if power * k * _MOST_STEPS >= largest)
    return [step * i for i in range(math.ceil(largest / step) + 1)]


def _axis(ticks: list[float], per_unit: float, bottom: float, *, compared: bool) -> list[str]:
    parts = []
    for tick in ticks:
        x = _LEFT + tick * per_unit
        parts.append(_line(x, _TOP - 6, x, bottom, "#dddddd"))
        parts.append(_text(x, bottom + 14, f"{tick:g}", anchor="middle", size=11))
    if compared:  # the reference itself
        parts.append(_line(_LEFT + per_unit, _TOP - 6, _LEFT + per_unit, bottom, "#444444", dash=True))
    unit = "speed-up over torch.linalg.svd (dashed: 1)" if compared else "effective GFLOP/s"
    parts.append(_text(_LEFT + (_WIDTH - _LEFT - _RIGHT) / 2, bottom + 32, unit, anchor="middle", size=12))
    return parts


def _head(benchmark: Benchmark, colours: dict[str, str], *, compared: bool) -> list[str]:
    machine = benchmark.machine
    place = machine.gpu or f"{machine.cpu}, {machine.cores} cores"
    against = f"; reference with up to {benchmark.threads}" * compared
    title = f"{place}: {benchmark.dtype}, one BLAS thread per matrix{against}"
    parts = [_text(16, 24, title, size=14)]
    x = float(_LEFT)
    for name, colour in colours.items():
        parts += [_rect(x, 40, 12, 12, colour), _text(x + 17, 50, name, size=12)]
        x += 17 + 7.5 * len(name) + 22
    return parts


def _document(height: float, parts: list[str]) -> str:
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height:.0f}" '
        f'viewBox="0 0 {_WIDTH} {height:.0f}" font-family="sans-serif" role="img">'
    )
    return "\n".join([opening, _rect(0, 0, _WIDTH, height, "#ffffff"), *parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 13) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="#222222">{escape(text)}</text>'
    )


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, *, dash: bool = False) -> str:
    dashes = ' stroke-dasharray="4 3"' * dash
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{dashes}/>'
