"""How far a repair has come, for the eye: counted where panels pass, estimated inside a long LAPACK call.

The shares of a repair's steps are those of its operations, at the rates of one processor: products run at the full
rate, the factorisation is half bound by memory. Between panels, and in the factorisation, which says nothing until it
is done, a timer advances an estimate by the rate seen so far; it never runs past its step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from streamrepair.engine.memory import MatrixShape

_PRODUCT_FLOPS_PER_S = 35e9
_FACTOR_FLOPS_PER_S = 14e9
_TICK_S = 0.25
_LEAST_S = 0.5
"""Repairs that are expected to take less need no timer."""
_MOST = 0.95
"""Of a step, before it is known to be done."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Expected seconds of a repair on one processor."""

    gram_s: float
    factor_s: float
    merge_s: float

    @property
    def total_s(self) -> float:
        """All three."""
        return self.gram_s + self.factor_s + self.merge_s


def steps(shape: MatrixShape, backend: str) -> Steps:
    """Of a repair that keeps a tenth of the rank."""
    m, n = float(shape.rows), float(shape.cols)
    factor = 20 * n**3 if backend == "full" else 4 / 3 * n**3
    gram = (2 if backend == "full" else 1) * m * n * n
    return Steps(gram / _PRODUCT_FLOPS_PER_S, factor / _FACTOR_FLOPS_PER_S, 0.4 * m * n * n / _PRODUCT_FLOPS_PER_S)


def with_merge(shape: MatrixShape, backend: str, share: float) -> float:
    """The share of a repair that is done when such a share of its merge is."""
    expected = steps(shape, backend)
    return 1.0 - expected.merge_s / expected.total_s * (1.0 - share)


class Pace:
    """The first pass and the factorisation of one matrix; as a context it ticks.

    Args:
        shape, backend: the matrix, and the backend planned for it.
        tell: gets the share of the whole repair that is done. clock: seconds.
    """

    def __init__(
        self,
        shape: MatrixShape,
        backend: str,
        tell: Callable[[float], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._expected, self._rows = steps(shape, backend), shape.rows
        self._tell, self._clock = tell, clock
        self._began = self._last = clock()
        self._done_rows = 0
        self._told = 0.0
        self._slower = 1.0  # how many times the expected seconds the Gram pass takes
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def advance(self, rows: int) -> None:
        """So many more rows have passed; what passes again, for another backend, is not counted."""
        with self._lock:
            if self._done_rows >= self._rows:
                return
            self._done_rows += rows
            self._last = self._clock()
            self._slower = (self._last - self._began) / (self._expected.gram_s * self._share)
            self._say(self._expected.gram_s * self._share)

    def tick(self) -> None:
        """Tell what is likely by now."""
        with self._lock:
            since = (self._clock() - self._last) / max(1e-9, self._slower)  # in expected seconds
            gram, factor = self._expected.gram_s, self._expected.factor_s
            if self._share < 1.0:
                self._say(min(gram * self._share + since, _MOST * gram))
            else:
                self._say(gram + min(since, _MOST * factor))

    @property
    def _share(self) -> float:
        """Of the rows that have passed."""
        return min(1.0, self._done_rows / self._rows)

    def _say(self, done_s: float) -> None:
        share = done_s / self._expected.total_s
        if share > self._told:
            self._told = share
            self._tell(share)

    def __enter__(self) -> Self:
        if self._expected.total_s >= _LEAST_S:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(_TICK_S):
            self.tick()
