"""Draws a simulated run: what every device does when, for a large model on 1, 4 or 8 GPUs, as SVG.

    python bench/timeline.py llama-70b --gpus 4 --disk 1.5GB --out timeline.svg
    python bench/timeline.py            # the table of all cases, nothing drawn

No weights, no GPU: the plan's order, the ledger's rules and the predicted seconds of streamrepair/engine/cost.py on a
fake clock (streamrepair/engine/simulate.py). What it shows is the schedule, not the speed of any machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

from architectures import ARCHITECTURES, tensors

from streamrepair.checkpoint.headers import ShardHeader, TensorEntry
from streamrepair.checkpoint.pairing import Pairing, Side
from streamrepair.engine import cost, memory, schedule
from streamrepair.engine.memory import MatrixShape
from streamrepair.engine.plan import Task
from streamrepair.engine.simulate import Simulated, Simulation
from streamrepair.units import format_bytes, format_seconds, parse_bytes

NO_FILE = ShardHeader(Path("no-file.safetensors"), 0, 0, 0, 0, b"", 8, {}, ())
SHARD_BYTES = 5_000_000_000
CASES = [(name, gpus) for name in ("llama-70b", "llama-405b") for gpus in (1, 4, 8)]
WIDTH, LEFT, ROW, GAP = 1200.0, 80.0, 26.0, 8.0
COLOURS = {"compute": "#4878a8", "read": "#d9a441", "write": "#b05c4a", "memory": "#8a8a8a"}


def model(name: str) -> list[Task]:
    """A bfloat16 model's tasks for GPUs, in shards of 5 GB."""
    found: list[Task] = []
    shard = used_bytes = 0
    for spec in tensors(ARCHITECTURES[name]):
        nbytes = 2 * spec.size
        if used_bytes and used_bytes + nbytes > SHARD_BYTES:
            shard, used_bytes = shard + 1, 0
        used_bytes += nbytes
        entry = TensorEntry(spec.name, "BF16", spec.shape, 0, nbytes)
        found.append(_task(entry, shard))
    return found


def _task(entry: TensorEntry, shard: int) -> Task:
    side = Side(NO_FILE, entry)
    if len(entry.shape) != 2:
        pairing = Pairing(entry.name, "keep", "1-D, not a matrix", side, side)
        return Task(pairing, shard, entry, memory.copy_bytes())
    shape = MatrixShape(max(entry.shape), min(entry.shape), 2, 2, 2)
    ram_bytes = memory.repair_bytes(shape, "gram", shape.block, cuda=True)
    vram_bytes = memory.device_bytes(shape, "gram")
    pairing = Pairing(entry.name, "repair", "", side, side)
    return Task(pairing, shard, entry, ram_bytes, shape, shape.block, "gram", "cuda", vram_bytes)


def simulated(tasks: list[Task], gpus: int, disk_bytes_per_s: float) -> Simulated:
    """A run on so many GPUs, with one CPU worker for the copies and all the memory it wants."""
    lanes = [*(f"cuda:{i}" for i in range(gpus)), "cpu"]
    return Simulation(schedule.order(tasks, lanes), lanes, 1 << 50, disk_bytes_per_s=disk_bytes_per_s).run()


def least_s(tasks: list[Task], gpus: int, disk_bytes_per_s: float) -> float:
    """What no schedule undercuts: the GPUs' work shared out evenly, or every byte moved once."""
    work_s = sum(cost.seconds(task, "cuda") for task in tasks if task.place == "cuda")
    return max(work_s / gpus, sum(task.read_once_bytes + task.out.nbytes for task in tasks) / disk_bytes_per_s)


def svg(result: Simulated, title: str) -> str:
    """The timeline: a row for each device; what it computes, and what it waits for."""
    lanes = sorted({span.lane for span in result.spans})
    scale = (WIDTH - LEFT - GAP) / result.makespan_s
    height = (len(lanes) + 2) * (ROW + GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {WIDTH:.0f} {height:.0f}" font-family="sans-serif" font-size="13">',
        f'<text x="{GAP}" y="18">{escape(title)}</text>',
    ]
    for row, lane in enumerate(lanes, 1):
        y = row * (ROW + GAP)
        lines.append(f'<text x="{GAP}" y="{y + ROW * 0.7:.1f}">{escape(lane)}</text>')
        for kind, start_s, end_s, names in _joined(result, lane, 0.4 / scale):
            x, width = LEFT + start_s * scale, max(0.3, (end_s - start_s) * scale)
            lines.append(
                f'<rect x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{ROW}" fill="{COLOURS[kind]}">'
                f"<title>{escape(names)} {start_s:.1f}–{end_s:.1f} s</title></rect>"
            )
    y = (len(lanes) + 1) * (ROW + GAP)
    for i, (kind, colour) in enumerate(COLOURS.items()):
        words = kind if kind == "compute" else f"waits: {kind}"
        lines.append(f'<rect x="{LEFT + 150 * i:.0f}" y="{y:.0f}" width="14" height="14" fill="{colour}"/>')
        lines.append(f'<text x="{LEFT + 20 + 150 * i:.0f}" y="{y + 12:.0f}">{words}</text>')
    return "\n".join([*lines, "</svg>\n"])


def _joined(result: Simulated, lane: str, gap_s: float) -> Iterator[tuple[str, float, float, str]]:
    """(kind, start, end, name) of a lane; pieces of one task that touch are one bar."""
    held: tuple[str, float, float, str] | None = None
    for span in sorted((s for s in result.spans if s.lane == lane), key=lambda s: s.start_s):
        kind = "compute" if span.kind == "compute" else span.name
        if held and held[0] == kind and held[3] == span.name and span.start_s - held[2] <= gap_s:
            held = (kind, held[1], span.end_s, span.name)
            continue
        if held:
            yield held
        held = (kind, span.start_s, span.end_s, span.name)
    if held:
        yield held


def main() -> int:
    """Prints a line for each case; draws one if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", choices=sorted(ARCHITECTURES))
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--disk", default="1.5GB", help="bytes a second")
    parser.add_argument("--out", type=Path, default=Path("timeline.svg"))
    arguments = parser.parse_args()
    disk_bytes_per_s = float(parse_bytes(arguments.disk))
    for name, gpus in [(arguments.model, arguments.gpus)] if arguments.model else CASES:
        tasks = model(name)
        result, least = simulated(tasks, gpus, disk_bytes_per_s), least_s(tasks, gpus, disk_bytes_per_s)
        title = (
            f"{name} on {gpus} GPUs, files at {format_bytes(disk_bytes_per_s)}/s: {format_seconds(result.makespan_s)}, "
            f"{result.makespan_s / least:.3f} times the least possible"
        )
        print(title)
        if arguments.model:
            arguments.out.write_text(svg(result, title), encoding="utf-8")
            print(f"written: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
