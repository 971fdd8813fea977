"""The crash campaign: for every N, the Nth file operation of a run fails, is done by half, or is its last.

    python -m tests.crash.campaign [--every K] [--json FILE]

After each fault the judge looks at what is left; then the same command runs again without faults, and the judge looks
once more. `test_campaign` runs a sample of this in the suite; the script runs all of it and prints the table of
docs/durability.md.
"""

from __future__ import annotations

import argparse
import errno
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from streamrepair.checkpoint import osfile
from streamrepair.errors import DiskSpaceError, InputError, OutputError, StreamRepairError
from tests.crash import powercut
from tests.crash.judge import Undisturbed, judge_fault, judge_resumed, undisturbed
from tests.faults import ALL, Fault, Kernel, fails, kills, none, short
from tests.pairs import write_pair

SHAPES = {"a": (48, 40), "b": (40, 48), "v": (40,), "c": (64, 32), "d": (33, 70)}
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EDQUOT": errno.EDQUOT, "EINTR": errno.EINTR}

FAULTS: dict[str, Callable[[int], Fault]] = {
    **{f"{name}, once": lambda n, e=error: fails(n, e) for name, error in ERRORS.items()},  # type: ignore[misc]
    **{
        f"{name}, from then on": lambda n, e=error: fails(n, e, ever_after=True)  # type: ignore[misc]
        for name, error in ERRORS.items()
        if name != "EINTR"  # a kernel that interrupts for ever is waited for
    },
    "half done, once": short,
    "half done, from then on": lambda n: short(n, ever_after=True),
}
KILL = "SIGKILL"
CUT = "power cut"


@dataclass(frozen=True)
class Row:
    """The runs of one kind of fault."""

    fault: str
    operations: int
    """Fault points that an undisturbed run has."""
    runs: int
    failed: int
    """Runs that the fault ended; the others got over it."""
    kept: int
    """Finished tensors found again by the runs that followed, all of them together."""
    seconds: float


def operations(reference: Undisturbed, out: Path) -> list[str]:
    """The calls of an undisturbed run, in their order."""
    kernel = Kernel(ALL, none)
    _under(kernel, lambda: reference.repair(out))
    return kernel.calls


def one_fault(reference: Undisturbed, out: Path, fault: Fault) -> tuple[bool, int]:
    """A run with a fault and one without; whether the first failed, and how many tensors the second found finished."""
    failed, before = False, _descriptors()
    try:
        _under(Kernel(ALL, fault), lambda: reference.repair(out))
    except (OutputError, DiskSpaceError, InputError):
        failed = True
    assert _descriptors() == before, "a descriptor was left open"
    return failed, _resumed(reference, out)


def one_kill(reference: Undisturbed, out: Path, number: int) -> tuple[bool, int]:
    """A process that `kill -9` ends before its operation `number`, and a run after it; what `one_fault` gives.

    A run's last numbers may not be reached: inputs that are not open yet are not looked at before a commit.
    """
    child = multiprocessing.get_context("fork").Process(target=_killed, args=(reference, out, number))
    child.start()
    child.join()
    assert child.exitcode in (-signal.SIGKILL, 0)
    return child.exitcode != 0, _resumed(reference, out)


def campaign(reference: Undisturbed, work: Path, *, every: int = 1, tell: Callable[[Row], None]) -> list[Row]:
    """All faults at every `every`-th operation."""
    count = len(operations(reference, work / "counted"))
    rows = []
    for name in (*FAULTS, KILL):
        began, failed, kept = time.perf_counter(), 0, 0
        numbers = range(1 + len(rows) % every, count + 1, every)
        for number in numbers:
            out = work / f"{name}-{number}"
            if name == KILL:
                ended, found = one_kill(reference, out, number)
            else:
                ended, found = one_fault(reference, out, FAULTS[name](number))
            failed, kept = failed + ended, kept + found
        rows.append(Row(name, count, len(numbers), failed, kept, time.perf_counter() - began))
        tell(rows[-1])
    for grouped in (False, True):
        rows.append(_power_cuts(replace(reference, grouped=grouped), work, every))
        tell(rows[-1])
    return rows


def _power_cuts(reference: Undisturbed, work: Path, every: int) -> Row:
    began, name = time.perf_counter(), CUT + (", one commit" if reference.grouped else "")
    disk = powercut.recorded(reference, work / f"recorded {name}")
    points = range(0, len(disk.operations) + 1, every)
    runs = kept = 0
    for at in points:
        for mode in powercut.MODES:
            out = work / f"{name}-{at}-{mode}"
            kept += powercut.one_cut(reference, disk, at, out, mode=mode, rng=random.Random(at))
            runs += 1
    return Row(name, len(disk.operations), runs, runs, kept, time.perf_counter() - began)


def _resumed(reference: Undisturbed, out: Path) -> int:
    finished = judge_fault(reference, out)
    report = reference.repair(out)
    judge_resumed(reference, out, finished, report)
    return len(finished)


def _killed(reference: Undisturbed, out: Path, number: int) -> None:
    try:
        _under(Kernel(ALL, kills(number)), lambda: reference.repair(out))
    except StreamRepairError:
        os._exit(1)
    os._exit(0)


def _under(kernel: Kernel, do: Callable[[], object]) -> None:
    osfile.os = kernel  # type: ignore[assignment]
    try:
        do()
    finally:
        osfile.os = os


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def main() -> int:
    """Run it and print the table; 1, with what was found, if an invariant did not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every", type=int, default=1, metavar="K", help="only every K-th operation")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    print(f"{'fault':26}{'operations':>11}{'runs':>7}{'failed':>8}{'kept':>7}{'seconds':>9}")
    with tempfile.TemporaryDirectory() as folder:
        reference = undisturbed(write_pair(Path(folder), SHAPES, shards=(1, 2)), Path(folder, "undisturbed"))

        def tell(row: Row) -> None:
            counts = f"{row.operations:>11}{row.runs:>7}{row.failed:>8}{row.kept:>7}{row.seconds:>9.1f}"
            print(f"{row.fault:26}{counts}", flush=True)

        rows = campaign(reference, Path(folder), every=arguments.every, tell=tell)
    print(f"{sum(row.runs for row in rows)} runs, each followed by a second one; every invariant held")
    if arguments.json:
        sys.path.append("bench")
        from machine import machine_record

        record = {"name": "crash-campaign", "machine": machine_record(), "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
