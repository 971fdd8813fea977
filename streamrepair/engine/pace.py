"""How far a repair has come, for the eye: counted where panels pass, estimated inside a long LAPACK call.

The shares of a repair's stages are those that `cost` expects. Between panels, and in the factorisation, which says
nothing until it is done, a timer advances an estimate by the rate seen so far; it never runs past its stage.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Self

from streamrepair.decompose.speed import Stages

_TICK_S = 0.25
_LEAST_S = 0.5
"""Repairs that are expected to take less need no timer."""
_MOST = 0.95
"""Of a stage, before it is known to be done."""


def with_merge(expected: Stages, share: float) -> float:
    """The share of a repair that is done when such a share of its merge is."""
    return 1.0 - expected.merge_s / expected.total_s * (1.0 - share)


class Pace:
    """The first pass and the factorisation of one matrix; as a context it ticks.

    Args:
        expected: seconds of its stages, as planned. rows: of the tall orientation.
        tell: gets the share of the whole repair that is done. clock: seconds.
    """

    def __init__(
        self,
        expected: Stages,
        rows: int,
        tell: Callable[[float], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._expected, self._rows = expected, rows
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
