"""A whole pair on a device, twice: with small matrices in batches, as planned, and with every tensor by itself.

What `bench/cuda.py` times of single matrices leaves out what lies between them: reading, launches, streams and buffers
made anew, the merge and the writing. A small model consists of little else.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES
from make_pair import make_pair

from streamrepair import api
from streamrepair.decompose.arithmetic import Arithmetic
from streamrepair.decompose.device import DeviceArithmetic
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.scratch import Scratch
from streamrepair.engine.plan import Plan
from streamrepair.engine.run import execute
from streamrepair.engine.stop import StopRequest
from streamrepair.report import Report

_MOST_REASONS = 8


def whole(name: str, device: torch.device, repeats: int) -> dict[str, Any]:
    """Seconds and memory of both, in turn, and how far their results differ."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_pair(ARCHITECTURES[name], work / "pair", spectrum="heavy")
        on = {"device": str(device)} if device.type == "cuda" else {"device": "cuda", "vram": "8GB"}
        planned = api.plan(work / "pair" / "base", work / "pair" / "ft", **on)
        plans = {"in batches": planned, "one by one": replace(planned, units=planned.tasks)}
        reports: dict[str, list[Report]] = {way: [] for way in plans}
        for _ in range(repeats):
            for way, plan in plans.items():
                reports[way].append(_run(plan, work / "out", device))
                shutil.rmtree(work / "out")
    runs = [{"name": way, **_record(plans[way], found)} for way, found in reports.items()]
    return {"model": name, "batches": [len(batch.tasks) for batch in planned.batches], "runs": runs} | _difference(
        *(found[0] for found in reports.values())
    )


def _run(plan: Plan, out: Path, device: torch.device) -> Report:
    def on_cpu(lane: str, scratch: Scratch) -> Arithmetic:
        return HostArithmetic(scratch) if lane == "cpu" else DeviceArithmetic("cpu")

    usual = None if device.type == "cuda" else on_cpu
    return execute(plan, out, stop=StopRequest(), watcher=api.Silent(), arithmetic=usual)


def _record(plan: Plan, reports: list[Report]) -> dict[str, Any]:
    samples = [report.timings.wall_s for report in reports]
    return {
        "seconds": statistics.median(samples),
        "samples": samples,
        "predicted_s": plan.estimated_s,
        "vram_projected_bytes": plan.vram_projected_bytes,
        "vram_measured_bytes": reports[-1].budget.vram_measured_bytes,
        "ram_projected_bytes": plan.ram_projected_bytes,
        "ram_measured_bytes": reports[-1].budget.ram_measured_bytes,
        "climbed": sum(bool(record.climbed) for record in reports[-1].tensors.values()),
        "why": sorted({reason for record in reports[-1].tensors.values() for reason in record.climbed})[:_MOST_REASONS],
    }


def _difference(batched: Report, single: Report) -> dict[str, int]:
    """Tensors whose kept rank or bytes differ between the two."""
    pairs = [(record, single.tensors[name]) for name, record in batched.tensors.items()]
    return {
        "other_rank": sum(one.rank_kept != other.rank_kept for one, other in pairs),
        "other_bytes": sum(one.digest != other.digest for one, other in pairs),
    }
