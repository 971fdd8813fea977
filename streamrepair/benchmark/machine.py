"""What a benchmark says of the machine: processor, memory, GPU, versions, BLAS."""

from __future__ import annotations

import importlib.metadata
import os
import platform

from threadpoolctl import threadpool_info

from streamrepair.benchmark.records import Machine
from streamrepair.benchmark.reference import device_name
from streamrepair.engine import limits
from streamrepair.version import __version__

_PACKAGES = ("numpy", "scipy", "torch")


def describe(device: str) -> Machine:
    """This machine as seen after the libraries that compute are loaded."""
    libraries = {f"{lib['internal_api']} {lib['version']}" for lib in threadpool_info() if lib["user_api"] == "blas"}
    return Machine(
        cpu=limits.cpu_model() or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        ram_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        gpu=device_name(device),
        python=platform.python_version(),
        versions={"streamrepair": __version__, **{name: _version(name) for name in _PACKAGES}},
        blas=tuple(sorted(libraries)),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
