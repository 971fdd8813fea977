"""What memory there is and what was used: defaults for --ram and --vram, and the measured peaks."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psutil

from streamrepair.errors import UsageError, shown

RAM_SHARE = 0.8
"""Share of the memory that is free now which a run may take when --ram is not given."""
VRAM_SHARE = 0.9
"""Likewise for --vram, of the card's free memory."""


def default_ram_bytes() -> int:
    """RAM_SHARE of what the machine, and the control group this process is in, have free."""
    free = psutil.virtual_memory().available
    for limit, used in _cgroup_limits():
        free = min(free, max(0, limit - used))
    return int(RAM_SHARE * free)


def _cgroup_limits() -> list[tuple[int, int]]:
    """(limit, used) bytes of every control group above this process that has a limit (v2, or v1's memory one)."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers == "":
                root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                root, names = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
            else:
                continue
            folder = root / group.lstrip("/")
            for place in (folder, *folder.parents):
                if place.is_relative_to(root):
                    with contextlib.suppress(OSError, ValueError):  # "max", or no such file at the root
                        found.append((int((place / names[0]).read_text()), int((place / names[1]).read_text())))
    return found


def default_workers() -> int:
    """One worker per processor this process may use."""
    return max(1, len(os.sched_getaffinity(0)))


def resolve_device(device: str, *, absent: bool = False) -> str:
    """ "cpu" or a CUDA device from what the user asked for.

    Args:
        absent: whether a device that is named need not be here.

    Raises:
        UsageError: no such device here.
    """
    if device == "cpu":
        return device
    if device == "auto" and not _driver_present():
        return "cpu"  # without loading torch to be told so
    name, colon, index = device.partition(":") if isinstance(device, str) else ("", "", "")
    if device != "auto" and (name != "cuda" or (colon and not (index.isascii() and index.isdigit()))):
        raise UsageError(f"--device {shown(repr(device))} is not understood: use auto, cpu, cuda or cuda:N")
    number = int(index or 0)
    if absent and device != "auto":
        return f"cuda:{number}"
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda:0" if count else "cpu"
    if number >= count:
        raise UsageError(f"--device {device}: this machine has {count} CUDA devices that torch can use")
    return f"cuda:{number}"


def _driver_present() -> bool:
    return Path("/proc/driver/nvidia").exists() or any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def default_vram_bytes(device: str) -> int:
    """VRAM_SHARE of what the card has free."""
    import torch

    free, _ = torch.cuda.mem_get_info(torch.device(device))
    return int(VRAM_SHARE * free)


def reset_peak() -> None:
    """Let the measured peak start from now (Linux keeps one high-water mark per process)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The process's peak resident memory (VmHWM)."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_peak_bytes(device: str) -> int | None:
    """Peak device memory that torch reserved; None on the CPU."""
    if device == "cpu":
        return None
    import torch

    return int(torch.cuda.max_memory_reserved(torch.device(device)))
