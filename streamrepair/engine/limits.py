"""What this process may use of the machine: memory and processors, as control groups (containers, SLURM) leave them.

And open files, as many as it may have; `address_space` has limits on what it may map. Linux only. Every group from the
process's own up to the root may have a limit, and the tightest counts; of version 1 and version 2 both are asked, as
hybrid machines have both. File pages that a group holds are the kernel's to drop, as `MemAvailable` counts them too, so
they do not count as used.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from streamrepair.errors import StreamRepairError

RAM_SHARE = 0.8
"""Share of the memory that is free now which a run may take when --ram is not given."""
MACHINE, GROUP = "the machine", "the control group"
"""Who may have least of it free."""


_OPEN_FILES = 1 << 16
"""Some four for each shard; checkpoints of hundreds of shards exist."""
_FILES_BESIDE = 5
"""The lock, the journal and its marks, a folder that is synced, a module that is imported; four were met."""


@dataclass(frozen=True, slots=True)
class System:
    """Where the kernel tells of itself; tests point it elsewhere."""

    membership: Path = Path("/proc/self/cgroup")
    groups: Path = Path("/sys/fs/cgroup")
    memory: Path = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class _Version:
    """The names that one version of control groups uses."""

    limits: tuple[str, ...]
    usage: str
    file_pages: tuple[str, ...]
    """Fields of memory.stat."""


_V1 = _Version(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = _Version(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))


def default_ram_bytes(system: System | None = None, *, available_bytes: int | None = None) -> int:
    """RAM_SHARE of what the machine, and every control group this process is in, have free.

    Args:
        available_bytes: free on the machine; the kernel's own estimate by default.
    """
    return int(RAM_SHARE * free_bytes(system, available_bytes=available_bytes))


def free_bytes(system: System | None = None, *, available_bytes: int | None = None) -> int:
    """What the machine, and every control group this process is in, have free."""
    return _free(system or System(), available_bytes)[0]


def whose_is_free(system: System | None = None, *, available_bytes: int | None = None) -> str:
    """Who has least free, and so decides the default: MACHINE or GROUP."""
    return _free(system or System(), available_bytes)[1]


def _free(system: System, available_bytes: int | None) -> tuple[int, str]:
    free = _available_bytes(system) if available_bytes is None else available_bytes
    whose = MACHINE
    for folder, version in _folders(system, "memory"):
        with contextlib.suppress(OSError, ValueError):  # no such file at the root
            left = max(0, _limit(folder, version) - _used(folder, version))
            if left < free:
                free, whose = left, GROUP
    return free, whose


def default_workers(system: System | None = None, *, processors: int | None = None) -> int:
    """One worker per processor this process may use, by its affinity and by every group's share of time.

    Args:
        processors: by affinity; the kernel's answer by default.
    """
    count = float(len(os.sched_getaffinity(0)) if processors is None else processors)
    for folder, version in _folders(system or System(), "cpu"):
        with contextlib.suppress(OSError, ValueError):
            if version is _V2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{word}_us").read_text() for word in ("quota", "period"))
            if quota != "max" and int(quota) > 0 and int(period) > 0:
                count = min(count, int(quota) / int(period))
    return max(1, math.ceil(count))


def cpu_model() -> str:
    """The processor by its name; "" where the kernel tells none."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(errors="replace") as lines:
        for line in lines:  # there are as many descriptions as processors, each made when it is read
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return ""


def allow_open_files(count: int) -> None:
    """As many descriptors as the system lets this process have: a run holds every shard of both sides and of OUT.

    It stays so after the run: others of the process may have come to need it.

    Args:
        count: that a run holds at once, beside a few; one for each shard.

    Raises:
        StreamRepairError: there are fewer to be had.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if not may_open(count):
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise StreamRepairError(
            f"this process may have {soft} files open, and a run of {count} shards, of both sides and of OUT, needs "
            f"{_open_below(soft) + count + _FILES_BESIDE}: raise the limit on open files (ulimit -n)"
        )


def may_open(count: int) -> bool:
    """Whether the limit leaves room for so many files, and a few beside them."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return soft == resource.RLIM_INFINITY or soft >= _open_below(soft) + count + _FILES_BESIDE


def _open_below(limit: int) -> int:
    """Descriptors in use of those that a limit leaves; others, from before it was set, take none of them."""
    with contextlib.suppress(OSError):
        return sum(int(entry.name) < limit for entry in Path("/proc/self/fd").iterdir()) - 1  # the folder itself
    return 3


def _available_bytes(system: System) -> int:
    """The kernel's estimate of what can be had without swapping; of free pages alone, should it not say."""
    with contextlib.suppress(OSError, ValueError):
        for line in system.memory.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _limit(folder: Path, version: _Version) -> int:
    found = []
    for name in version.limits:
        with contextlib.suppress(OSError, ValueError):  # "max"
            found.append(int((folder / name).read_text()))
    return min(found, default=1 << 62)


def _used(folder: Path, version: _Version) -> int:
    """What a group uses and the kernel could not drop."""
    used = int((folder / version.usage).read_text())
    with contextlib.suppress(OSError, ValueError):
        for line in (folder / "memory.stat").read_text().splitlines():
            field, _, value = line.partition(" ")
            if field in version.file_pages:
                used -= int(value)
    return max(0, used)


def _folders(system: System, controller: str) -> Iterator[tuple[Path, _Version]]:
    """Every group of this process that can limit `controller`, its own first, up to the root."""
    try:
        lines = system.membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        # A path that leads out of a container's view ("/../x") is looked for from the root of what can be seen.
        parts = [part for part in group.split("/") if part not in ("", "..")]
        if controllers == "":
            roots, version = [system.groups, system.groups / "unified"], _V2
        elif controller in controllers.split(","):
            roots, version = [system.groups / controller, system.groups / controllers], _V1
        else:
            continue
        for root in roots:
            for depth in range(len(parts), -1, -1):
                yield root.joinpath(*parts[:depth]), version
