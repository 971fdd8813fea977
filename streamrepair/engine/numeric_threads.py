"""One BLAS thread per call: workers run side by side instead, and results do not depend on how many cores there are.

OpenBLAS splits sums differently with another number of threads, so a fixed number is what makes the output's bytes the
same on every machine of one kind. The settings are the process's, so they are put back after a run.
"""

from __future__ import annotations

import mmap
import threading
from typing import TYPE_CHECKING

from streamrepair.decompose import lapack
from streamrepair.engine import address_space

if TYPE_CHECKING:
    from threadpoolctl import threadpool_limits


class _Process:
    """The runs that hold this process's BLAS, and what was set before the first of them; to be used under its lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._holding: set[int] = set()
        self._limits: threadpool_limits | None = None

    def limit(self, holder: object) -> None:
        from threadpoolctl import ThreadpoolController

        check_address_space()
        lapack.tables()  # a library is limited only once it is loaded
        _become_controlling()
        # OpenMP's own number, torch's, is that of each thread: what a worker found there is not the program's.
        limits = ThreadpoolController().select(user_api="blas").limit(limits=1)
        self._limits = self._limits or limits  # the first one knows what was set before
        self._holding.add(id(holder))

    def release(self, holder: object) -> None:
        self._holding.discard(id(holder))
        if self._limits is not None and not self._holding:
            _become_controlling()
            self._limits.restore_original_limits()
            self._limits = None


_process = _Process()


class NumericThreads:
    """Holds every BLAS in the process to one thread from the first `hold` to `release`.

    Where several runs do, as a program's threads may start them, to the last one's `release`.
    """

    def __init__(self) -> None:
        self._here = threading.local()

    def hold(self) -> None:
        """Load the numeric libraries and limit them; cheap after a thread's first time.

        To be called by every thread that computes: a BLAS built on OpenMP keeps its number for each thread.

        Raises:
            MemoryError: a limit leaves the libraries no memory to begin with.
        """
        if getattr(self._here, "held", False):
            return
        with _process.lock:
            _process.limit(self)
            self._here.held = True

    def release(self) -> None:
        """Put the process's settings back, unless another run goes on."""
        with _process.lock:
            _process.release(self)
            self._here = threading.local()


def check_address_space() -> None:
    """Fail where OpenBLAS would not: refused its buffer, by `ulimit -v` for example, it asks again for ever.

    `address_fit` has seen to it that there is room; this is for programs whose own threads map memory meanwhile.

    Raises:
        MemoryError: the system has no room for a thread's buffers, of NumPy's copy and of SciPy's, or to load that.
    """
    need_bytes = 2 * address_space.BUFFER_BYTES
    if not lapack.is_loaded():
        need_bytes += address_space.lapack_bytes()
    try:
        mmap.mmap(-1, need_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError as error:
        raise MemoryError(f"no {need_bytes >> 20} MiB of address space are left for a thread") from error


def _become_controlling() -> None:
    """Let this thread set limits: threadpoolctl 3.7 and later listens only to the first thread that ever did."""
    from threadpoolctl import OpenBLASController

    clear = getattr(OpenBLASController, "clear_controlling_thread", None)
    if clear is not None:
        clear(force=True)
