"""The command line: arguments, signals and exit status, nothing else.

torch, SciPy and the engine's heavy parts are imported by the work itself, so that `--help`, usage errors and `plan`
answer at once.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

from cyclopts import App, Group, Parameter
from cyclopts.exceptions import CycloptsError

from streamrepair.engine.stop import StopRequest
from streamrepair.errors import (
    DamageError,
    InterruptedRunError,
    NumericalError,
    OutputError,
    StreamRepairError,
    UsageError,
    shown,
)
from streamrepair.report import Settings
from streamrepair.version import __version__

_NUMBERS = Group("What is computed", sort_key=1)
_MEANS = Group("With what", sort_key=2)
_OUTPUT = Group("Output", sort_key=3)

Base = Annotated[str, Parameter(help="Base checkpoint: a folder, a .safetensors file, an index.json, or a Hub id.")]
Ft = Annotated[str, Parameter(help="Fine-tuned checkpoint, likewise.")]
Out = Annotated[str, Parameter(help="Folder of the result.")]
Ram = Annotated[
    str | None,
    Parameter(group=_MEANS, help="Memory for the whole process, e.g. 16GB or 16GiB. Default: 80% of what is free."),
]
Vram = Annotated[str | None, Parameter(group=_MEANS, help="Memory per GPU. Default: 90% of what is free.")]
Device = Annotated[str, Parameter(group=_MEANS, help="auto, cpu, cuda or cuda:N.")]
Workers = Annotated[int | None, Parameter(group=_MEANS, help="Matrices in work at once. Default: one per processor.")]
Backend = Annotated[
    Literal["auto", "full", "gram"],
    Parameter(group=_MEANS, help="auto and gram: eigenvalues of ΔᵀΔ, certified; full: float64 QR and SVD, slow."),
]
Sigma = Annotated[
    Literal["median", "tail"], Parameter(group=_NUMBERS, help="Noise estimate: median (Gavish–Donoho) or tail.")
]
Scale = Annotated[float, Parameter(group=_NUMBERS, help="Factor on the threshold τ.")]
Include = Annotated[str | None, Parameter(group=_NUMBERS, help="Repair only tensors whose name matches this regex.")]
Exclude = Annotated[str | None, Parameter(group=_NUMBERS, help="Pass through tensors whose name matches this regex.")]
OutDtype = Annotated[
    Literal["same", "float32"], Parameter(group=_NUMBERS, help="same as FT, or float32: no rounding of the repair.")
]
OnNonfinite = Annotated[
    Literal["refuse", "copy-ft"],
    Parameter(group=_NUMBERS, help="Where an input holds NaN or Inf: refuse the pair, or pass that tensor through."),
]
Json = Annotated[bool, Parameter(group=_OUTPUT, negative=(), help="Machine-readable result on stdout.")]
Quiet = Annotated[
    bool, Parameter(group=_OUTPUT, negative=(), help="No progress, warnings or summary; errors are still said.")
]

app = App(
    name="streamrepair",
    help="Repair a fine-tuned checkpoint against its base, out of core: keep of Δ = FT − BASE what rises above the "
    "noise (Donoho–Gavish threshold), write BASE + Δ*.",
    version=f"streamrepair {__version__}",
    help_epilogue="Exit status: 0 done, 1 failed, 2 wrong usage, 3 bad input, 4 damage found, 5 does not fit memory or "
    "disk, 11 OUT is held by another run, 75 interrupted (the same command continues). `--debug` shows tracebacks.",
    result_action="return_value",
)


@app.default
@app.command
def repair(
    base: Base,
    ft: Ft,
    out: Out,
    /,
    *,
    ram: Ram = None,
    vram: Vram = None,
    device: Device = "auto",
    workers: Workers = None,
    backend: Backend = "auto",
    sigma: Sigma = "median",
    scale: Scale = 1.0,
    include: Include = None,
    exclude: Exclude = None,
    out_dtype: OutDtype = "same",
    on_nonfinite: OnNonfinite = "refuse",
    overwrite: Annotated[bool, Parameter(group=_OUTPUT, negative=(), help="Replace what OUT holds.")] = False,
    report: Annotated[str | None, Parameter(group=_OUTPUT, help="Second copy of the report.")] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Repair FT against BASE and write OUT; an interrupted run is continued by the same command."""
    stop = StopRequest()
    with _signals(stop, quiet=quiet):
        from streamrepair import api
        from streamrepair.terminal import Bar, print_json, print_summary

        result = api.repair(
            base,
            ft,
            out,
            ram=ram,
            vram=vram,
            device=device,
            workers=workers,
            backend=backend,
            sigma=sigma,
            scale=scale,
            include=include,
            exclude=exclude,
            out_dtype=out_dtype,
            on_nonfinite=on_nonfinite,
            overwrite=overwrite,
            report=report,
            watcher=Bar(quiet=quiet),
            stop=stop,
        )
    with _printing():
        if json:
            print_json(result)
        elif not quiet:
            print_summary(result, Path(out))
    return 0


@app.command
def plan(
    base: Base,
    ft: Ft,
    /,
    *,
    ram: Ram = None,
    vram: Vram = None,
    device: Device = "auto",
    workers: Workers = None,
    backend: Backend = "auto",
    sigma: Sigma = "median",
    scale: Scale = 1.0,
    include: Include = None,
    exclude: Exclude = None,
    out_dtype: OutDtype = "same",
    on_nonfinite: OnNonfinite = "refuse",
    json: Json = False,
) -> int:
    """Say what a repair would do and need, from headers alone; reads no weights, writes nothing."""
    from streamrepair import api
    from streamrepair.engine.run import plan_warnings
    from streamrepair.terminal import Bar, print_json, print_plan
    from streamrepair.views import plan_view

    settings = Settings(
        sigma=sigma,
        scale=scale,
        include=include,
        exclude=exclude,
        out_dtype=out_dtype,
        backend=backend,
        on_nonfinite=on_nonfinite,
    )
    planned = api.plan(base, ft, ram=ram, vram=vram, device=device, workers=workers, settings=settings)
    for message in plan_warnings(planned):
        Bar(quiet=False).warn(message)
    with _printing():
        if json:
            print_json(plan_view(planned))
        else:
            print_plan(planned)
    return 0


@app.command
def verify(
    out: Out,
    /,
    *,
    deep: Annotated[
        bool, Parameter(negative=(), help="Also recompute a sample of tensors in float64 from BASE and FT.")
    ] = False,
    sample: Annotated[int, Parameter(help="How many tensors --deep recomputes.")] = 5,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Check that OUT is whole: structure, completeness, and the digest of every tensor."""
    from streamrepair import api
    from streamrepair.terminal import print_json, print_verified

    result = api.verify(out, deep=deep, sample=sample)
    with _printing():
        if json:
            print_json(result)
        elif not quiet:
            print_verified(result, Path(out))
    if result.damage:
        first = result.damage[0]
        more = f" and {len(result.damage) - 1} more" if len(result.damage) > 1 else ""
        raise DamageError(f"{shown(out)}: {shown(first.where)}: {first.what}{more}: run the repair again")
    return 0


@app.command
def bench(
    base: Annotated[
        str | None,
        Parameter(help="Take the shapes of this checkpoint's matrices; with FT, of those a repair computes."),
    ] = None,
    ft: Annotated[str | None, Parameter(help="Fine-tuned checkpoint.")] = None,
    /,
    *,
    shape: Annotated[
        list[str] | None,
        Parameter(group=_NUMBERS, negative=(), help="ROWSxCOLUMNS, repeatable. Default: 1024x1024 and 4096x1024."),
    ] = None,
    spectrum: Annotated[
        list[str] | None,
        Parameter(
            group=_NUMBERS,
            negative=(),
            help="gapped: low rank and noise; heavy: runs through τ, as in real fine-tunes. Default: both.",
        ),
    ] = None,
    dtype: Annotated[str, Parameter(group=_NUMBERS, help="Of inputs and output: bf16, f16 or f32.")] = "bf16",
    check: Annotated[
        bool,
        Parameter(group=_NUMBERS, negative="--no-check", help="Hold results against a float64 SVD; slow where large."),
    ] = True,
    backend: Annotated[
        list[str] | None,
        Parameter(group=_MEANS, negative=(), help="Backends, repeatable or with commas. Default: all."),
    ] = None,
    device: Device = "auto",
    threads: Annotated[
        int | None, Parameter(group=_MEANS, help="Most threads of the reference. Default: one per processor.")
    ] = None,
    repeats: Annotated[int, Parameter(group=_MEANS, help="Timed runs of each; the median counts.")] = 3,
    plot: Annotated[Path | None, Parameter(group=_OUTPUT, help="Bar chart: FILE.svg or FILE.html.")] = None,
    json: Json = False,
) -> int:
    """Time the backends on this device, on synthetic deltas, against torch.linalg.svd in memory and float64."""
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
    with _printing():
        if json:
            print_json(result)
        else:
            print(render(result), end="", flush=True)
    if plot is not None:
        chart.save(result, plot)
    if result.faults:
        raise NumericalError(f"{'; '.join(result.faults)}: report it with the output of --json")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in tokens
    tokens = [token for token in tokens if token != "--debug"]
    _fill_standard_descriptors()
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal cannot show must not end the run.
        with contextlib.suppress(AttributeError, OSError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        return _run(tokens or ["--help"])
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            with contextlib.suppress(OSError):
                traceback.print_exc()
        return _failed(error)


def _failed(error: BaseException) -> int:
    """Say in one line what ended the command; returns the exit status."""
    if isinstance(error, InterruptedRunError):
        _say(f"{error}; finished work is kept: the same command continues it")
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        # Workers may be deep in LAPACK; what they do is not needed and what is on disk is consistent.
        os._exit(error.exit_status)
    if isinstance(error, StreamRepairError):
        _say(str(error))
        return error.exit_status
    if isinstance(error, KeyboardInterrupt):
        _say("interrupted by SIGINT")
        return InterruptedRunError.exit_status
    _say(f"unexpected {type(error).__name__}: {error}: this is a bug; --debug shows where")
    return 1


def _fill_standard_descriptors() -> None:
    """Open what the caller closed of 0, 1 and 2: else a weights file gets the number, and messages go into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


@contextlib.contextmanager
def _printing() -> Iterator[None]:
    """Nobody reading our output any more is no failure: the work itself is done.

    Raises:
        OutputError: standard output cannot take it, for lack of space for example.
    """
    try:
        yield
    except BrokenPipeError:
        _drop_standard_output()
    except OSError as error:
        if isinstance(error, StreamRepairError):
            raise
        _drop_standard_output()
        raise OutputError(
            f"standard output cannot be written ({error.strerror}): the work itself is done: send the output elsewhere"
        ) from error


def _drop_standard_output() -> None:
    """What is still buffered would fail once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(tokens: list[str]) -> int:
    _hint_near_miss(tokens)
    asks = not {"--help", "-h", "--version"}.isdisjoint(tokens)  # then all that happens is printing
    try:
        with _printing() if asks else contextlib.nullcontext():
            result = app(_joined(tokens), print_error=False, exit_on_error=False)
            sys.stdout.flush()
    except CycloptsError as error:
        raise UsageError(f"{' '.join(str(error).split())} (streamrepair --help lists the options)") from error
    except SystemExit:
        return 0  # rich, which prints the help, ends the process so when its reader leaves
    return result if isinstance(result, int) else 0


def _joined(tokens: list[str]) -> list[str]:
    """`--ram -5GB` as `--ram=-5GB`: what is wrong is then said of the size, and not of a missing one."""
    joined: list[str] = []
    for token in tokens:
        if joined and joined[-1] in ("--ram", "--vram") and re.match(r"-[0-9.]", token):
            joined[-1] += f"={token}"
        else:
            joined.append(token)
    return joined


def _hint_near_miss(tokens: list[str]) -> None:
    """`verfy OUT` would be read as a BASE called verfy.

    Raises:
        UsageError: the first word is nearly a command, or one of later versions, and names nothing on disk.
    """
    word = tokens[0]
    if word == "inspect" and not os.path.lexists(word):
        raise UsageError(
            "the command inspect is not in this version: verify --deep compares a result with float64 SVDs"
        )
    commands = ["repair", "plan", "verify", "bench"]
    close = difflib.get_close_matches(word, commands, n=1, cutoff=0.6)
    if word not in commands and close and not os.path.lexists(word):
        raise UsageError(f"no command and no checkpoint is called {shown(word)}: did you mean {close[0]}?")


def _say(message: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _signals(stop: StopRequest, *, quiet: bool) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGUSR1 ask the run to stop; the second one ends it at once (and it can still be resumed)."""
    answer = b"stopping: the tensors in hand are finished, which takes 25 s at most; the same again ends at once\n"

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop.requested:
            os.write(
                2, b"error: interrupted again: ended at once; finished work is kept: the same command continues it\n"
            )
            os._exit(InterruptedRunError.exit_status)
        stop.request(f"interrupted by {signal.Signals(number).name}")
        if not quiet:
            with contextlib.suppress(OSError):
                os.write(2, (b"\n" if sys.stderr.isatty() else b"") + answer)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
