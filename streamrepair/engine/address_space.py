"""What a limit on memory (`ulimit -v`, `ulimit -d`, a batch system's h_vmem) leaves this process, and what BLAS takes.

Such a limit counts what is mapped, used or not: OpenBLAS's buffers, stacks, what malloc sets aside. Refused a buffer,
OpenBLAS asks again for ever with the interpreter's lock held, ends the process or goes on without, so what it will map
is held against the limit before it is loaded, and before workers use it. Nothing is loaded by this module;
`address_fit` holds a plan against the limit. Where none is set, all of it is two system calls.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from streamrepair.errors import BudgetError
from streamrepair.units import format_apart

BUFFER_BYTES = 1 << 25
"""OpenBLAS maps this for each of its threads when it is loaded, and for each of its callers at once.

NumPy's copy does, and SciPy's.
"""
_NUMPY_BYTES = 80 << 20
"""Mapped by NumPy's libraries without buffers, and by what of ours comes with them; 57 MiB were measured."""
_LAPACK_BYTES = 40 << 20
"""Mapped by SciPy's, likewise; 25 MiB were measured."""
_BENCHMARK_BYTES = 1 << 30
"""Mapped by all of SciPy and by torch, built for CPUs; 0.9 GiB were measured."""
_DEFAULT_STACK_BYTES = 8 << 20
"""Of a thread where no limit says; glibc takes 2 MiB then."""
_THREADS = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")
"""What OpenBLAS goes by, the first that is set."""
_MOST_THREADS = 64
"""NumPy's and SciPy's builds of it have no more."""
TAKEN_OTHERWISE_BYTES = 4 << 20
"""By how much what has been mapped at one point may differ from time to time; 0.4 MB were met."""
_ROUND_KB = 10_000
"""To what a limit that is asked for is rounded."""
_ARENA_MAX = -8
"""mallopt's M_ARENA_MAX."""


@dataclass(frozen=True, slots=True)
class Limit:
    """The tightest limit on what this process may map."""

    name: str
    limit_bytes: int
    left_bytes: int

    def hold(self, need_bytes: int, what: str, instead: str = "") -> None:
        """Refuse work that has to map more than is left.

        Args:
            instead: what else can be done, from ", or" on.

        Raises:
            BudgetError: it has to.
        """
        if need_bytes <= self.left_bytes:
            return
        needs, leaves = format_apart(need_bytes, self.left_bytes)
        least_bytes = self.limit_bytes + need_bytes + TAKEN_OTHERWISE_BYTES - self.left_bytes
        least_kb = -(-least_bytes // (_ROUND_KB * 1024)) * _ROUND_KB
        raise BudgetError(
            f"the limit on {self.name} leaves {leaves}, and {what} needs {needs}: "
            f"raise it to {least_kb} kB or more{instead}"
        )


def tightest(statm: Path = Path("/proc/self/statm")) -> Limit | None:
    """The limit that leaves least; None where none is set."""
    kinds = {
        "address space (ulimit -v)": (resource.RLIMIT_AS, 0),
        "data (ulimit -d)": (resource.RLIMIT_DATA, 5),
    }
    found = []
    for name, (kind, field) in kinds.items():
        soft = resource.getrlimit(kind)[0]
        if soft != resource.RLIM_INFINITY:
            taken = 0
            with contextlib.suppress(OSError, ValueError, IndexError):
                taken = int(statm.read_text().split()[field]) * os.sysconf("SC_PAGE_SIZE")
            found.append(Limit(name, soft, max(0, soft - taken)))
    return min(found, key=lambda limit: limit.left_bytes, default=None)


def stack_bytes() -> int:
    """What a thread's stack maps."""
    soft = resource.getrlimit(resource.RLIMIT_STACK)[0]
    return threading.stack_size() or (_DEFAULT_STACK_BYTES if soft == resource.RLIM_INFINITY else soft)


def lapack_bytes() -> int:
    """What SciPy's LAPACK and BLAS map when they are loaded."""
    return _LAPACK_BYTES + _buffers_bytes()


def prepare_for_numpy() -> None:
    """To be called by the command before NumPy is imported, which fails without a word where it finds no memory.

    Under a limit OpenBLAS is told to start one thread, unless the user has set a number: more are never used in a run,
    and each maps 40 MB, twice.

    Raises:
        BudgetError: the limit leaves it too little.
    """
    limit = tightest()
    if limit is None or "numpy" in sys.modules:
        return
    share_one_arena()
    if not any(os.environ.get(name) for name in _THREADS):
        os.environ[_THREADS[0]] = "1"
    limit.hold(_NUMPY_BYTES + _buffers_bytes(), "loading NumPy")


def prepare_for_benchmark() -> None:
    """To be called before `bench` imports what it compares with.

    Raises:
        BudgetError: the limit leaves it too little.
    """
    if (limit := tightest()) is not None:
        limit.hold(lapack_bytes() + _BENCHMARK_BYTES, "loading SciPy and torch")


def share_one_arena() -> None:
    """Let threads that begin from now on share one arena: glibc sets 64 MiB of address space aside for each one's own.

    What matters in a run is too large for arenas to make it quicker. It stays so, since arenas cannot be moved.
    """
    import ctypes

    with contextlib.suppress(AttributeError, OSError):  # a C library that has no arenas
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)


def _buffers_bytes() -> int:
    """The buffers of one copy of OpenBLAS when it is loaded, and the stacks of its threads."""
    return BUFFER_BYTES + (_blas_threads() - 1) * (BUFFER_BYTES + stack_bytes())


def _blas_threads() -> int:
    """How many threads OpenBLAS computes on, the caller's included."""
    count = len(os.sched_getaffinity(0))
    for name in _THREADS:
        with contextlib.suppress(ValueError):
            if (wanted := int(os.environ.get(name, ""))) > 0:
                count = min(count, wanted)
                break
    return min(count, _MOST_THREADS)
