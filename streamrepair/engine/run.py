"""A run, from two names to a sealed result: open, plan, refuse or resume, execute, commit, seal, report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec

from streamrepair.checkpoint import refusals, wholefile
from streamrepair.checkpoint.pairing import Side
from streamrepair.checkpoint.read import InputFiles
from streamrepair.checkpoint.sidecars import check_sidecars, copy_sidecars, sidecars
from streamrepair.decompose.arithmetic import Arithmetic
from streamrepair.decompose.scratch import Scratch
from streamrepair.engine import address_fit, budget, gpu, limits
from streamrepair.engine.backlog import Backlog
from streamrepair.engine.commit import Committer
from streamrepair.engine.earlier import finished_report, other_sidecars, sound
from streamrepair.engine.finite import search
from streamrepair.engine.fit import full_budget, full_fits
from streamrepair.engine.job import Outcome, Spent, Surroundings
from streamrepair.engine.lanes import lane_names
from streamrepair.engine.local import LocalExecutor
from streamrepair.engine.nonfinite import NonFiniteInputError, nonfinite_error
from streamrepair.engine.notices import machine_warnings, plan_warnings, result_warnings, task_warnings
from streamrepair.engine.numeric_threads import NumericThreads
from streamrepair.engine.overlap import refuse_overlap
from streamrepair.engine.pagecache import PageCache, lets_go
from streamrepair.engine.plan import Plan, Unit
from streamrepair.engine.side_files import check_beside, check_places
from streamrepair.engine.statement import (
    fingerprint,
    make_report,
    sealed,
    shard_index,
    stated_dtype,
    statement_bytes,
)
from streamrepair.engine.stop import StopRequest
from streamrepair.engine.task import run_unit
from streamrepair.engine.timeline import Timeline
from streamrepair.engine.trace import chrome_trace
from streamrepair.engine.watcher import Watcher
from streamrepair.engine.worker import Worker
from streamrepair.engine.workspace import Workspace
from streamrepair.errors import OutputError, shown
from streamrepair.report import REPORT_NAME, Report, Session, TensorRecord


@dataclass(frozen=True, slots=True)
class _Run:
    plan: Plan
    workspace: Workspace
    stop: StopRequest
    watcher: Watcher
    free_bytes: int
    """Memory that the machine had free when it began."""
    large: bool
    """Whether it leaves the page cache as it found it."""
    files: InputFiles
    threads: NumericThreads
    warnings: list[str]
    """Those of no single tensor's work: its own stand in its record, so that they survive an interruption."""
    timeline: Timeline
    arithmetic: Callable[[str, Scratch], Arithmetic] | None
    mending: bool
    """Whether it is to put right a finished result."""
    sidecars: tuple[str, ...]
    """As FT had them when it began: what has gone since is missed."""
    spent: Spent = field(default_factory=Spent)
    began: float = field(default_factory=time.perf_counter)
    began_cpu: float = field(default_factory=time.process_time)

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        self.watcher.warn(message)

    def record_session(self) -> None:
        """Write down what this start of the command has taken so far."""
        wall_s = time.perf_counter() - self.began
        timings = self.spent.timings(wall_s=wall_s, cpu_s=time.process_time() - self.began_cpu)
        self.workspace.accounts.record(
            Session(
                timings=timings,
                ram_measured_bytes=budget.peak_bytes(),
                vram_measured_bytes=budget.device_peak_bytes(self.plan.gpus),
                warnings=tuple(self.warnings),
                utilisation=self.timeline.uses(lane_names(self.plan.lanes), wall_s),
            )
        )


def execute(
    plan: Plan,
    out: Path,
    *,
    stop: StopRequest,
    watcher: Watcher,
    overwrite: bool = False,
    report: Path | None = None,
    finished: Mapping[str, TensorRecord] | None = None,
    trace: Path | None = None,
    arithmetic: Callable[[str, Scratch], Arithmetic] | None = None,
) -> Report:
    """Carry out a plan and write OUT; continues an interrupted run of the same plan.

    Args:
        report: a second copy of the report. trace: a timeline in Chrome's format, however the run ends.
        arithmetic: how a device computes, in place of the usual.
        finished: records of OUT's report, which go where the journal has none: a finished result is to be mended.

    Raises:
        StreamRepairError: by the tree in `errors`; finished work is kept but for a refused input.
    """
    stop.heeded, stop.over = True, False
    names = sidecars(plan.ft)
    beside_bytes = _looked_at(plan, out, {"--report": report, "--trace": trace}, names)
    # Past the page cache is slower where there is room in it, and kinder where there is not.
    free_bytes = limits.free_bytes()
    large = lets_go(plan, free_bytes)
    shards = len(plan.base.shards) + len(plan.ft.shards) + len(plan.layouts)
    limits.allow_open_files(shards)
    address_fit.refuse_without_room(plan)
    budget.reset_peak()
    direct = large and limits.may_open(shards + len(plan.layouts))  # a second descriptor of each in OUT
    workspace = Workspace(out, plan.layouts, beside_bytes=beside_bytes, direct=direct)
    timeline = Timeline(keep=trace is not None)
    files, threads = InputFiles(), NumericThreads()
    run = _Run(
        plan, workspace, stop, watcher, free_bytes, large, files, threads, [], timeline, arithmetic,
        mending=finished is not None, sidecars=names,
    )  # fmt: skip
    with contextlib.ExitStack() as ends:  # all of them come, whatever one raises
        ends.callback(workspace.close)
        ends.callback(threads.release)
        ends.callback(files.close)
        if trace is not None:
            ends.callback(_write_trace, run, trace)
        ends.callback(watcher.end)
        try:
            journalled = workspace.open(fingerprint(plan), overwrite=overwrite, finished=finished)
            for path in workspace.damaged:
                run.warn(f"{refusals.shown_path(path)}: length or header is damaged and is written again")
            result = _execute(run, journalled, report)
        except NonFiniteInputError:
            # Refused inputs leave no output behind: what was finished belongs to no result.
            with contextlib.suppress(OutputError):  # OUT is not there any more: NaN is what there is to say
                workspace.discard()
            raise
    stop.over = True
    return result


def _looked_at(plan: Plan, out: Path, options: Mapping[str, Path | None], names: tuple[str, ...]) -> int:
    """Refuse what can be refused before anything is written; the bytes of what will lie beside the shards."""
    beside = {option: path for option, path in options.items() if path is not None}
    refuse_overlap(out, {"BASE": plan.base, "FT": plan.ft}, beside)
    check_beside(beside, out)
    check_places(out, names)
    return check_sidecars(plan.ft, names) + statement_bytes(plan)


def _execute(run: _Run, journalled: dict[str, TensorRecord], report_path: Path | None) -> Report:
    plan = run.plan
    for message in plan_warnings(plan):
        run.watcher.warn(message)
    done = sound(run.workspace.shards, journalled, stop=run.stop, warn=run.warn)
    run.watcher.begin(plan, sum(t.out.nbytes for t in plan.tasks if t.name in done))
    finished = finished_report(plan, run.workspace, done, mending=run.mending)
    if finished is not None:
        others = list(other_sidecars(plan, run.workspace.out))
        run.watcher.note("nothing to do: " + ("every tensor is there" if others else "the result is whole"))
        for message in others:
            run.warn(message)
        run.workspace.finish()
        report, text = finished
        _write_copy(text, report_path)
        return report
    for before, now in run.workspace.elsewhere if done else ():
        run.warn(
            f"{len(done)} tensors were finished on {shown(before)}, the rest is done on {shown(now)}: "
            "values may differ in the last place from a run on one"
        )
    unchanged = _unchanged_check(run)
    _check_dropped(run)
    for message in machine_warnings(plan, free_bytes=run.free_bytes, resident_bytes=budget.resident_bytes()):
        run.warn(message)
    backlog = Backlog(run.stop, free_bytes=run.free_bytes)
    committer = Committer(
        run.workspace,
        done,
        before_commit=unchanged,
        after_commit=run.record_session,
        synced=backlog.synced,
        stop=run.stop,
        lets_go=run.large,
    )
    cache = PageCache(run.files, free_bytes=run.free_bytes, lets_go=run.large, timeline=run.timeline)
    try:
        with gpu.capped_memory(plan.gpus, plan.vram_allowed_bytes):
            _work(run, committer, cache, backlog, done.keys())
    finally:
        cache.close()
    for message in result_warnings(committer.records):
        run.warn(message)
    run.stop.check_at_once()  # from here on it is a matter of moments
    unchanged()
    run.workspace.check_held()
    copied = _write_beside(run)
    run.record_session()
    report, text = sealed(make_report(plan, committer.records, run.workspace.accounts.sessions, sidecars=copied))
    wholefile.write_atomic(run.workspace.out / REPORT_NAME, text)
    run.workspace.finish()
    _write_copy(text, report_path)
    return report


def _write_copy(text: bytes, path: Path | None) -> None:
    if path is not None:
        wholefile.write_atomic(path, text, among_others=True)


def _write_trace(run: _Run, path: Path) -> None:
    """The result does not hang on it, so that it cannot be written is no failure."""
    try:
        wholefile.write_atomic(path, chrome_trace(run.timeline, lane_names(run.plan.lanes)), among_others=True)
    except OutputError as error:
        run.watcher.warn(f"no trace: {error}")


def _work(run: _Run, committer: Committer, cache: PageCache, backlog: Backlog, done: Set[str]) -> None:
    """Run what is not done, committing tasks as they finish; what is finished is committed however this ends."""
    plan = run.plan
    units = [unit for unit in plan.units if any(task.name not in done for task in unit.tasks)]
    around = Surroundings(
        settings=plan.settings,
        files=run.files,
        shards=run.workspace.shards,
        advance=run.watcher.advance,
        check_stop=run.stop.check,
        full_fits=full_fits(plan),
        full_budget=partial(full_budget, plan),
        arithmetic=run.arithmetic,
        done_with=cache.done_with,
        hold_threads=run.threads.hold,
        finished=done,
    )
    executor = LocalExecutor(
        lanes=plan.lanes,
        room_bytes=plan.room_bytes,
        stop=run.stop,
        timeline=run.timeline,
        upcoming=cache.upcoming,
        hold=backlog.wait,
    )

    def do(unit: Unit, worker: Worker) -> Iterator[Outcome]:
        for outcome in run_unit(unit, around, worker):
            backlog.wrote(outcome.task.out_bytes)
            yield outcome

    try:
        for outcome in executor.run(units, do):
            if outcome is not None:
                _take(run, committer, outcome)
            # Once a stop is requested, all that is ready: at the end there may be no time for a large sync.
            if committer.due or run.stop.requested:
                with _committing(run):
                    committer.flush()
    except NonFiniteInputError:
        raise  # all of it is about to be removed
    except BaseException:
        committer.flush()
        with contextlib.suppress(OutputError):  # what ended the run is what is to be said
            run.record_session()
        raise
    with _committing(run):
        committer.flush()


def _committing(run: _Run) -> contextlib.AbstractContextManager[None]:
    return run.timeline.span("commits", "sync", "sync, read back, seal", file=True)


def _check_dropped(run: _Run) -> None:
    """Read what only BASE has: no number is made of it, but an input that is broken is refused.

    Raises:
        NonFiniteInputError: it holds NaN or infinity.
    """
    if run.plan.settings.on_nonfinite != "refuse":
        return
    for pairing in run.plan.dropped:
        assert pairing.base is not None
        index = search(partial(_read, run, pairing.base), pairing.base.entry, run.stop.check_at_once)
        if index is not None:
            raise nonfinite_error(pairing.base, index)


def _read(run: _Run, side: Side, offset: int, buffer: memoryview) -> None:
    began = time.perf_counter()
    run.files.read_into(side.shard, side.entry.start + offset, buffer)
    run.spent.read_s += time.perf_counter() - began
    run.spent.bytes_read += len(buffer)


def _take(run: _Run, committer: Committer, outcome: Outcome) -> None:
    task, warnings = outcome.task, tuple(task_warnings(outcome))
    committer.add(task.name, task.shard, msgspec.structs.replace(outcome.record, warnings=warnings), task.out.nbytes)
    run.spent.add(outcome.spent)
    for message in warnings:
        run.watcher.warn(message)


def _unchanged_check(run: _Run) -> Callable[[], None]:
    shards = [*run.plan.base.shards, *run.plan.ft.shards]
    return lambda: run.files.check_unchanged(shards)


def _write_beside(run: _Run) -> dict[str, str]:
    """Sidecars first, the index last: it is what makes loaders see a sharded checkpoint; the sidecars' digests."""
    plan, out = run.plan, run.workspace.out
    run.workspace.note_sidecars(run.sidecars)
    digests = copy_sidecars(plan.ft, run.sidecars, out, dtype=stated_dtype(plan))
    if plan.ft.index_name is not None:
        wholefile.write_atomic(out / plan.ft.index_name, shard_index(plan))
    return digests
