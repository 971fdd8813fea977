"""One BLAS thread per call: workers run side by side instead, and results do not depend on how many cores there are.

OpenBLAS splits sums differently with another number of threads, so a fixed number is what makes the output's bytes the
same on every machine of one kind. The settings are the process's, so they are put back after a run.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from threadpoolctl import threadpool_limits


class NumericThreads:
    """Holds every BLAS in the process to one thread from `hold` to `release`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._limits: threadpool_limits | None = None

    def hold(self) -> None:
        """Load the numeric libraries and limit them; cheap after the first time."""
        with self._lock:
            if self._limits is None:
                import scipy.linalg.cython_blas
                import scipy.linalg.cython_lapack  # noqa: F401 – a library is limited only once it is loaded
                from threadpoolctl import threadpool_limits

                self._limits = threadpool_limits(limits=1)

    def release(self) -> None:
        """Put the process's settings back."""
        with self._lock:
            if self._limits is not None:
                self._limits.restore_original_limits()
                self._limits = None
