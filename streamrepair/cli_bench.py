"""`streamrepair bench`: its options, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from streamrepair.cli_options import MEANS, NUMBERS, OUTPUT, Device, Json, whole_number
from streamrepair.console import printing
from streamrepair.engine.address_space import prepare_for_benchmark
from streamrepair.errors import NumericalError, UsageError, shown

Shapes = Annotated[
    list[str] | None,
    Parameter(
        group=NUMBERS,
        negative=(),
        help="ROWSxCOLUMNS, both at least 64, repeatable; beside those of BASE. Default: 1024x1024 and 4096x1024.",
    ),
]
Spectra = Annotated[
    list[str] | None,
    Parameter(
        group=NUMBERS,
        negative=(),
        help="gapped: low rank and noise; heavy: runs through τ, as in real fine-tunes. Default: both.",
    ),
]
Backends = Annotated[
    list[str] | None,
    Parameter(
        group=MEANS,
        negative=(),
        help="auto, gram, randomized, fast or full, repeatable or with commas. Default: all but auto.",
    ),
]
Check = Annotated[
    bool,
    Parameter(group=NUMBERS, negative="--no-check", help="Hold results against a float64 SVD; slow where large."),
]
ShapesOf = Annotated[
    str | None,
    Parameter(
        help="Take the shapes of this checkpoint's matrices; with FT, of those a repair computes. Of a Hub id all "
        "weights are downloaded first."
    ),
]
Threads = Annotated[
    int | None,
    Parameter(group=MEANS, converter=whole_number, help="Most threads of the reference. Default: one per processor."),
]

_DTYPE, _DEVICE, _REPEATS = "bf16", "auto", 3  # where nothing is said


def bench(
    base: ShapesOf = None,
    ft: Annotated[str | None, Parameter(help="Fine-tuned checkpoint.")] = None,
    /,
    *,
    shape: Shapes = None,
    spectrum: Spectra = None,
    dtype: Annotated[str, Parameter(group=NUMBERS, help="Of inputs and output: bf16, f16 or f32.")] = _DTYPE,
    check: Check = True,
    backend: Backends = None,
    device: Device = _DEVICE,
    threads: Threads = None,
    repeats: Annotated[
        int, Parameter(group=MEANS, converter=whole_number, help="Timed runs of each; the median counts.")
    ] = _REPEATS,
    calibrate: Annotated[
        bool,
        Parameter(
            group=OUTPUT,
            negative=(),
            help="Only measure this machine's speeds, for the times that `plan` predicts, and keep them; some seconds.",
        ),
    ] = False,
    plot: Annotated[Path | None, Parameter(group=OUTPUT, help="Bar chart: FILE.svg or FILE.html.")] = None,
    json: Json = False,
) -> int:
    """Time the backends on this device, on synthetic deltas, against torch.linalg.svd in memory and float64."""
    if calibrate:
        given: dict[str, tuple[object, object]] = {
            "BASE": (base, None), "--shape": (shape, None), "--spectrum": (spectrum, None),
            "--backend": (backend, None), "--threads": (threads, None), "--plot": (plot, None),
            "--dtype": (dtype, _DTYPE), "--no-check": (check, True), "--device": (device, _DEVICE),
            "--repeats": (repeats, _REPEATS),
        }  # fmt: skip
        if idle := [name for name, (value, usual) in given.items() if value != usual]:
            raise UsageError(f"{idle[0]} means nothing with --calibrate, which only measures speeds: leave it out")
        return _calibrated(json=json)
    prepare_for_benchmark()
    from streamrepair.benchmark import plot as chart
    from streamrepair.benchmark.cases import make_cases
    from streamrepair.benchmark.conditions import make_conditions
    from streamrepair.benchmark.measure import measure
    from streamrepair.benchmark.table import render
    from streamrepair.terminal import Bar, print_json

    if plot is not None:
        chart.check_target(plot)
    cases = make_cases(shapes=shape or (), spectra=spectrum or (), base=base, ft=ft)
    conditions = make_conditions(
        backends=backend or (), dtype=dtype, device=device, threads=threads, repeats=repeats, check=check
    )
    result = measure(cases, conditions, tell=Bar(quiet=False).note)
    with printing(worse=bool(result.faults)):
        if json:
            print_json(result)
        else:
            print(render(result), end="", flush=True)
    if plot is not None:
        chart.save(result, plot)
    if result.faults:
        raise NumericalError(f"{'; '.join(result.faults)}: report it with the output of --json")
    return 0


def _calibrated(*, json: bool) -> int:
    from streamrepair.engine import rates
    from streamrepair.terminal import print_json
    from streamrepair.units import format_bytes

    found = rates.measure()
    with printing():
        if json:
            print_json(found)
        else:
            products = f"{found.float32_flops_per_s / 1e9:.0f} and {found.float64_flops_per_s / 1e9:.0f} GFLOP/s"
            reads = f"{format_bytes(found.cache_bytes_per_s)}/s and {format_bytes(found.memory_bytes_per_s)}/s"
            print(f"one thread: products in float32 and float64 {products}; from cache and memory {reads}", flush=True)
    kept = rates.save(found)
    if not json:
        with printing():
            print(f"kept in {shown(str(kept))}: `plan` predicts by it on this machine", flush=True)
    return 0
