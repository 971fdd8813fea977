"""The command line: arguments, signals and exit status, nothing else.

torch, SciPy and the engine's heavy parts are imported by the work itself, so that `--help`, usage errors and `plan`
answer at once.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from cyclopts.exceptions import CycloptsError

from streamrepair.checkpoint.refusals import OPEN_FILES, TOO_MANY
from streamrepair.cli_bench import bench
from streamrepair.cli_options import (
    OUTPUT,
    Backend,
    Base,
    Device,
    Exclude,
    Ft,
    Include,
    Json,
    NoiseEstimate,
    OnNonfinite,
    Out,
    OutDtype,
    Quiet,
    Ram,
    Scale,
    Sigma,
    Vram,
    Workers,
    whole_number,
)
from streamrepair.console import bound_columns, printing, stop_on_signals
from streamrepair.engine.address_space import prepare_for_numpy, tightest
from streamrepair.engine.stop import StopRequest
from streamrepair.errors import (
    DamageError,
    InterruptedRunError,
    StreamRepairError,
    UsageError,
    shown,
)
from streamrepair.streams import prepare, speaking
from streamrepair.units import counted
from streamrepair.version import __version__

_LISTED = 5  # faults in the one line of a failure; all of them are on stdout

app = App(
    name="streamrepair",
    help="Repair a fine-tuned checkpoint against its base, out of core: keep of Δ = FT − BASE what rises above the "
    "noise (Donoho–Gavish threshold), write BASE + Δ*.",
    version=f"streamrepair {__version__}",
    help_epilogue="Exit status: 0 done, 1 failed, 2 wrong usage, 3 BASE, FT or OUT refused, 4 damage found, or no "
    "result to verify, 5 does not fit memory or disk, 11 OUT is held by another run, 75 interrupted (the same command "
    "continues). `--debug` shows tracebacks.",
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
    noise_estimate: NoiseEstimate = "exact",
    scale: Scale = 1.0,
    include: Include = None,
    exclude: Exclude = None,
    out_dtype: OutDtype = "same",
    on_nonfinite: OnNonfinite = "refuse",
    overwrite: Annotated[
        bool,
        Parameter(
            group=OUTPUT,
            negative=(),
            help="Replace an earlier result in OUT, or write into a folder that holds other things, but no weights of "
            "other origin. Files with a sidecar's name are replaced; an unfinished run of this command is continued.",
        ),
    ] = False,
    report: Annotated[str | None, Parameter(group=OUTPUT, help="Second copy of the report.")] = None,
    trace: Annotated[str | None, Parameter(group=OUTPUT, help="Timeline of the run, for ui.perfetto.dev.")] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Repair FT against BASE and write OUT; an interrupted run is continued by the same command."""
    stop = StopRequest()
    with stop_on_signals(stop, quiet=quiet):
        from streamrepair import api
        from streamrepair.terminal import Bar, print_json, print_summary

        result = api.repair(
            base, ft, out, ram=ram, vram=vram, device=device, workers=workers, backend=backend, sigma=sigma,
            noise_estimate=noise_estimate, scale=scale, include=include, exclude=exclude, out_dtype=out_dtype,
            on_nonfinite=on_nonfinite, overwrite=overwrite, report=report, trace=trace, watcher=Bar(quiet=quiet),
            stop=stop,
        )  # fmt: skip
        with printing():
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
    noise_estimate: NoiseEstimate = "exact",
    scale: Scale = 1.0,
    include: Include = None,
    exclude: Exclude = None,
    out_dtype: OutDtype = "same",
    on_nonfinite: OnNonfinite = "refuse",
    json: Json = False,
) -> int:
    """Say what a repair would do and need, from headers alone; reads no weights, writes nothing.

    Of a Hub id all weights are downloaded first, here too.
    """
    from streamrepair import api
    from streamrepair.engine.notices import plan_warnings
    from streamrepair.terminal import Bar, print_json, print_plan
    from streamrepair.views import plan_view

    planned = api.plan(
        base, ft, ram=ram, vram=vram, device=device, workers=workers, backend=backend, sigma=sigma,
        noise_estimate=noise_estimate, scale=scale, include=include, exclude=exclude, out_dtype=out_dtype,
        on_nonfinite=on_nonfinite,
    )  # fmt: skip
    for message in plan_warnings(planned):
        Bar(quiet=False).warn(message)
    with printing():
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
    sample: Annotated[int, Parameter(converter=whole_number, help="How many tensors --deep recomputes.")] = 5,
    repair: Annotated[
        bool,
        Parameter(
            negative=(),
            help="Do damaged tensors again, copy FT's files again where they were edited, nothing else; then verify "
            "once more.",
        ),
    ] = False,
    ram: Ram = None,
    device: Device = "auto",
    workers: Workers = None,
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Check that OUT is whole: structure, completeness, and the digest of every tensor and every copied file.

    --sample is for --deep, --ram, --device and --workers are for --repair; without it they do nothing.
    """
    stop = StopRequest()
    with stop_on_signals(stop, quiet=quiet) if repair else contextlib.nullcontext():
        from streamrepair import api
        from streamrepair.terminal import Bar, print_json, print_verified
        from streamrepair.verification import STRAY

        result = api.verify(
            out, deep=deep, sample=sample, repair=repair, ram=ram, device=device, workers=workers,
            watcher=Bar(quiet=quiet), stop=stop,
        )  # fmt: skip
        with printing(worse=bool(result.damage)):
            if json:
                print_json(result)
            elif not quiet:
                print_verified(result, Path(out))
    if result.damage:
        listed = "; ".join(f"{shown(d.where)}: {d.what}" for d in result.damage[:_LISTED])
        more = f"; and {len(result.damage) - _LISTED} more" if len(result.damage) > _LISTED else ""
        stray = repair or all(d.what == STRAY for d in result.damage)
        remedy = "remove what is not the result's" if stray else "do it again with verify --repair"
        raise DamageError(f"{shown(out)}: {counted(len(result.damage), 'fault')}: {listed}{more}: {remedy}")
    return 0


app.command(bench)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in tokens
    tokens = [token for token in tokens if token != "--debug"]
    try:
        prepare()
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
    _say(_unforeseen(error))
    return 1


def _unforeseen(error: BaseException) -> str:
    """What is said of an error that is none of ours: mostly a limit of the system."""
    match error:
        case OSError(filename=of) if of is not None:  # a number where a descriptor was given
            if error.errno in TOO_MANY:  # which file it was says nothing: often it is one of this package
                return f"{error.strerror}: {OPEN_FILES} and run the same command again"
            name = f"descriptor {of}" if isinstance(of, int) else shown(os.fsdecode(of))
            return f"{name}: {error.strerror}: check the path and its mode"
        case MemoryError():
            return _out_of_memory(str(error) or "none was left")
        case RuntimeError() if "start new thread" in str(error):
            return (
                "the system lets this process start no more threads; finished work is kept: give fewer --workers, or "
                "raise the limit on processes or memory (ulimit -u, ulimit -v), and run the same command again"
            )
        case ImportError():
            return (
                f"a library cannot be loaded ({error}): install streamrepair anew, or raise the limit on memory "
                "(ulimit -v)"
            )
    return f"unexpected {type(error).__name__}: {error}: this is a bug; --debug shows where"


def _out_of_memory(what: str) -> str:
    if (limit := tightest()) is not None:
        finding, remedy = f"the limit on {limit.name} leaves no memory", "raise it"
    else:
        finding, remedy = "the system has less memory than --ram allows", "give a smaller --ram"
    return f"{finding} ({what}); finished work is kept: {remedy} and run the same command again"


def _run(tokens: list[str]) -> int:
    _hint_near_miss(tokens)
    asks = not {"--help", "-h", "--version"}.isdisjoint(tokens)  # then all that happens is printing
    if asks:
        bound_columns()
    else:
        prepare_for_numpy()
    try:
        with printing() if asks else contextlib.nullcontext():
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
    with speaking, contextlib.suppress(OSError, ValueError):
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
