"""What a benchmark says of the machine it ran on, and how much memory and time one command took on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from streamrepair.engine.limits import cpu_model

REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE_INTERVAL_S = 0.05


@dataclass(slots=True)
class Peaks:
    """The largest values seen so far of one process tree."""

    tree_bytes: int = 0
    """Sum of RSS over the process and its descendants; a page shared by two of them counts twice."""
    tree_anonymous_bytes: int = 0
    """The same without pages of mapped files, which the kernel may drop."""
    high_water_bytes: int = 0
    """The kernel's own peak RSS (VmHWM) of the process itself, without its descendants."""
    samples: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """One finished command."""

    status: int
    wall_s: float
    peaks: Peaks
    output: str = field(repr=False)
    """The end of its stdout and stderr."""


def measure(command: Sequence[str]) -> Measured:
    """Runs a command to its end in the repository's root, sampling the memory of its process tree every 50 ms."""
    peaks = Peaks()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=REPOSITORY, env=_environment()
        )
        sampler = threading.Thread(target=_sample, args=(process, peaks))
        sampler.start()
        try:
            status = process.wait()
            wall_s = time.perf_counter() - start
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            sampler.join()
        log.seek(0)
        return Measured(status, wall_s, peaks, log.read()[-4000:])


def _environment() -> dict[str, str]:
    # `python bench/in_memory.py` has bench/ on its path, not the repository, unless the package is installed
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    # What pip installs is compiled once; a source tree is too, unless this forbids it.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPATH": path}


def _sample(process: subprocess.Popen[bytes], peaks: Peaks) -> None:
    root = psutil.Process(process.pid)
    while process.returncode is None:
        try:
            pids = [root.pid, *(child.pid for child in root.children(recursive=True))]
        except psutil.NoSuchProcess:
            return
        statuses = [_status_bytes(pid) for pid in pids]
        peaks.tree_bytes = max(peaks.tree_bytes, sum(s.get("VmRSS", 0) for s in statuses))
        peaks.tree_anonymous_bytes = max(peaks.tree_anonymous_bytes, sum(s.get("RssAnon", 0) for s in statuses))
        peaks.high_water_bytes = max(peaks.high_water_bytes, statuses[0].get("VmHWM", 0))
        peaks.samples += 1
        time.sleep(SAMPLE_INTERVAL_S)


def _status_bytes(pid: int) -> dict[str, int]:
    """VmRSS, RssAnon and VmHWM of a process; empty if it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (line.split(":", 1) for line in lines if line.startswith(("VmRSS", "RssAnon", "VmHWM")))
    return {key: int(value.split()[0]) * 1024 for key, value in pairs}


def machine_record() -> dict[str, Any]:
    """Processor, cores and memory of this machine, the versions in use and the time."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "numpy", "scipy", "safetensors")},
        "streamrepair_commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit checked out, with "+changes" where the package's tracked files differ from it."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    return f"{commit}+changes" if commit and _git("status", "--porcelain", "--", "streamrepair") else commit


def _git(*arguments: str) -> str | None:
    result = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None
