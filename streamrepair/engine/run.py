"""A run, from two names to a sealed result: open, plan, refuse or resume, execute, commit, seal, report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec

from streamrepair.checkpoint import refusals, wholefile
from streamrepair.checkpoint.headers import ShardHeader
from streamrepair.checkpoint.read import InputFiles
from streamrepair.checkpoint.sidecars import check_sidecars, copy_sidecars, sidecars
from streamrepair.checkpoint.write import ShardFile
from streamrepair.decompose.arithmetic import Arithmetic
from streamrepair.decompose.scratch import Scratch
from streamrepair.engine import budget, gpu, limits, memory
from streamrepair.engine.commit import Committer
from streamrepair.engine.finite import search
from streamrepair.engine.fit import fits_climb, full_budget
from streamrepair.engine.job import Outcome, Spent, Surroundings
from streamrepair.engine.local import LocalExecutor
from streamrepair.engine.nonfinite import NonFiniteInputError, nonfinite_error
from streamrepair.engine.notices import plan_warnings, task_warnings
from streamrepair.engine.numeric_threads import NumericThreads
from streamrepair.engine.overlap import refuse_beside_overlap, refuse_overlap
from streamrepair.engine.pagecache import PageCache, lets_go
from streamrepair.engine.plan import Plan, Task
from streamrepair.engine.side_files import check_path_beside
from streamrepair.engine.statement import fingerprint, make_report, shard_index, statement_bytes
from streamrepair.engine.stop import StopRequest
from streamrepair.engine.task import run_task
from streamrepair.engine.timeline import Timeline
from streamrepair.engine.trace import chrome_trace
from streamrepair.engine.worker import lane_names
from streamrepair.engine.workspace import Workspace
from streamrepair.errors import InputError, OutputError, shown
from streamrepair.report import (
    REPORT_NAME,
    Report,
    Session,
    TensorRecord,
)


class Watcher(Protocol):
    """Who is told how a run goes on."""

    def begin(self, plan: Plan, done_bytes: int) -> None:
        """The work starts; so many output bytes were finished by an earlier run."""
        ...

    def advance(self, done_bytes: int) -> None:
        """So many more output bytes are done."""
        ...

    def warn(self, message: str) -> None:
        """Something the user should know."""
        ...

    def note(self, message: str) -> None:
        """Something the user may like to know."""
        ...

    def end(self) -> None:
        """The work is over, one way or another."""
        ...


@dataclass(frozen=True, slots=True)
class _Run:
    plan: Plan
    workspace: Workspace
    stop: StopRequest
    watcher: Watcher
    files: InputFiles
    threads: NumericThreads
    warnings: list[str]
    """Those of no single tensor's work: its own stand in its record, so that they survive an interruption."""
    timeline: Timeline
    arithmetic: Callable[[str, Scratch], Arithmetic] | None
    spent: Spent = field(default_factory=Spent)
    began: float = field(default_factory=time.perf_counter)
    began_cpu: float = field(default_factory=time.process_time)

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        self.watcher.warn(message)

    def record_session(self) -> None:
        """Write down what this start of the command has taken so far."""
        timings = self.spent.timings(
            wall_s=time.perf_counter() - self.began, cpu_s=time.process_time() - self.began_cpu
        )
        self.workspace.accounts.record(
            Session(
                timings=timings,
                ram_measured_bytes=budget.peak_bytes(),
                vram_measured_bytes=budget.device_peak_bytes(self.plan.gpus),
                warnings=tuple(self.warnings),
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
    stop.heeded = True
    inputs = {"BASE": plan.base, "FT": plan.ft}
    refuse_overlap(out, inputs)
    for option, beside in (("--report", report), ("--trace", trace)):
        if beside is not None:
            refuse_beside_overlap(option, beside, inputs)
            check_path_beside(option, beside, out)
    beside_bytes = check_sidecars(plan.ft) + statement_bytes(plan)
    budget.reset_peak()
    gpu.cap_memory(plan.gpus, plan.vram_allowed_bytes)
    # Past the page cache is slower where there is room in it, and kinder where there is not.
    direct = lets_go(plan, limits.free_bytes())
    workspace = Workspace(out, plan.layouts, beside_bytes=beside_bytes, direct=direct)
    timeline = Timeline(keep=trace is not None)
    run = _Run(plan, workspace, stop, watcher, InputFiles(), NumericThreads(), [], timeline, arithmetic)
    try:
        journalled = workspace.open(fingerprint(plan), overwrite=overwrite, finished=finished)
        for path in workspace.damaged:
            run.warn(f"{refusals.shown_path(path)}: length or header is damaged and is written again")
        return _execute(run, journalled, report)
    except NonFiniteInputError:
        # Refused inputs leave no output behind: what was finished belongs to no result.
        workspace.discard()
        raise
    finally:
        watcher.end()
        if trace is not None:
            _write_trace(run, trace)
        run.files.close()
        run.threads.release()
        workspace.close()


def _execute(run: _Run, journalled: dict[str, TensorRecord], report_path: Path | None) -> Report:
    plan = run.plan
    for message in plan_warnings(plan):
        run.watcher.warn(message)
    done = _sound(run, journalled)
    run.watcher.begin(plan, sum(t.out.nbytes for t in plan.tasks if t.name in done))
    finished = _finished_report(run, done)
    if finished is not None:
        run.workspace.finish()
        _write_copy(finished, report_path)
        return finished
    if done and (before := run.workspace.began_on) not in ("", fingerprint(plan).device):
        run.warn(
            f"{len(done)} tensors were finished on {before}, the rest is done on {plan.device}: "
            "values may differ in the last place from a run on one device"
        )
    unchanged = _unchanged_check(run)
    _check_dropped(run)
    free_bytes = limits.free_bytes()
    committer = Committer(
        run.workspace,
        done,
        before_commit=unchanged,
        after_commit=run.record_session,
        stop=run.stop,
        lets_go=lets_go(plan, free_bytes),
    )
    cache = PageCache(plan, run.files, free_bytes=free_bytes)
    try:
        _work(run, committer, cache, [task for task in plan.tasks if task.name not in done])
    finally:
        cache.close()
    run.stop.check_at_once()  # from here on it is a matter of moments
    unchanged()
    names = _write_beside(run)
    run.record_session()
    report = make_report(
        plan,
        committer.records,
        run.workspace.accounts.sessions,
        sidecars=names,
        utilisation=run.timeline.uses(lane_names(plan.lanes), time.perf_counter() - run.began),
    )
    wholefile.write_atomic(run.workspace.out / REPORT_NAME, _as_text(report))
    run.workspace.finish()
    _write_copy(report, report_path)
    return report


def _write_copy(report: Report, path: Path | None) -> None:
    if path is not None:
        wholefile.write_atomic(path, _as_text(report))


def _write_trace(run: _Run, path: Path) -> None:
    """The result does not hang on it, so that it cannot be written is no failure."""
    try:
        wholefile.write_atomic(path, chrome_trace(run.timeline, lane_names(run.plan.lanes)))
    except OutputError as error:
        run.watcher.warn(f"no trace: {error}")


def _as_text(report: Report) -> bytes:
    return msgspec.json.format(msgspec.json.encode(report)) + b"\n"


def _sound(run: _Run, journalled: dict[str, TensorRecord]) -> dict[str, TensorRecord]:
    """The journalled tensors whose bytes are still what their records say; the others are done again."""
    sound: dict[str, TensorRecord] = {}
    for shard in run.workspace.shards:
        damaged = []
        for name in shard.layout.entries:
            run.stop.check_at_once()
            if name in journalled and _reads_as(shard, name, journalled[name].digest):
                sound[name] = journalled[name]
            elif name in journalled or shard.sealed:
                damaged.append(name)
        if damaged and shard.sealed:
            shard.unseal()
        for name in damaged:
            if name in journalled:
                run.warn(f"{shown(str(shard.path))}: tensor {shown(name)} is damaged and is done again")
    return sound


def _reads_as(shard: ShardFile, name: str, digest: str | None) -> bool:
    """Whether a tensor of OUT has its digest; one that cannot be read has not: writing it anew may cure the disk."""
    try:
        return shard.digest(name) == digest
    except OutputError:
        return False


def _finished_report(run: _Run, done: dict[str, TensorRecord]) -> Report | None:
    """The report of an earlier run that this one has nothing to add to."""
    plan, out = run.plan, run.workspace.out
    whole = all(shard.sealed for shard in run.workspace.shards)
    whole = whole and all((out / name).exists() for name in sidecars(plan.ft)) and _index_is_whole(plan, out)
    if not whole or len(done) < len(plan.tasks):
        return None
    try:
        report = msgspec.json.decode(wholefile.read_whole(out / REPORT_NAME), type=Report)
    except (InputError, msgspec.MsgspecError):
        return None
    if any(report.tensors.get(name) != record for name, record in done.items()):
        return None
    run.watcher.note("nothing to do: the result is whole")
    return report


def _index_is_whole(plan: Plan, out: Path) -> bool:
    if plan.ft.index_name is None:
        return True
    try:
        return wholefile.read_whole(out / plan.ft.index_name) == shard_index(plan)
    except InputError:
        return False


def _work(run: _Run, committer: Committer, cache: PageCache, tasks: list[Task]) -> None:
    """Run the tasks, committing as they finish; what is finished is committed however this ends."""
    plan = run.plan
    fits = {backend: fits_climb(plan, backend) for backend in ("full",)}
    around = Surroundings(
        base=plan.base,
        ft=plan.ft,
        settings=plan.settings,
        files=run.files,
        shards=run.workspace.shards,
        progress=run.watcher,
        check_stop=run.stop.check,
        fits=lambda task, backend: fits[backend][task.name],
        full_budget=lambda task: full_budget(plan, task),
        arithmetic=run.arithmetic,
        done_with=cache.done_with,
        hold_threads=run.threads.hold,
    )
    room = plan.ram_allowed_bytes - memory.run_bytes(plan.workers, tensors=plan.tensors, gpus=len(plan.gpus))
    executor = LocalExecutor(
        lanes=plan.lanes, room_bytes=room, stop=run.stop, timeline=run.timeline, upcoming=cache.upcoming
    )
    try:
        for outcome in executor.run(tasks, lambda task, worker: run_task(task, around, worker)):
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
        shard, entry = run.plan.base.shards[pairing.base.shard], pairing.base.entry

        def read(offset: int, buffer: memoryview, shard: ShardHeader = shard, start: int = entry.start) -> None:
            began = time.perf_counter()
            run.files.read_into(shard, start + offset, buffer)
            run.spent.read_s += time.perf_counter() - began
            run.spent.bytes_read += len(buffer)

        if (index := search(read, entry, run.stop.check_at_once)) is not None:
            raise nonfinite_error(shard.path, entry, index)


def _take(run: _Run, committer: Committer, outcome: Outcome) -> None:
    task, warnings = outcome.task, tuple(task_warnings(outcome))
    committer.add(task.name, task.shard, msgspec.structs.replace(outcome.record, warnings=warnings), task.out.nbytes)
    run.spent.add(outcome.spent)
    for message in warnings:
        run.watcher.warn(message)


def _unchanged_check(run: _Run) -> Callable[[], None]:
    shards = [*run.plan.base.shards, *run.plan.ft.shards]
    return lambda: run.files.check_unchanged(shards)


def _write_beside(run: _Run) -> tuple[str, ...]:
    """Sidecars first, the index last: it is what makes loaders see a sharded checkpoint."""
    plan, out = run.plan, run.workspace.out
    names = sidecars(plan.ft)
    copy_sidecars(plan.ft, names, out, dtype="float32" if plan.settings.out_dtype == "float32" else None)
    if plan.ft.index_name is not None:
        wholefile.write_atomic(out / plan.ft.index_name, shard_index(plan))
    return names
