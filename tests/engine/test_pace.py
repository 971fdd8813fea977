"""The bar moves inside a large matrix: by what is counted where it can be, by the clock where not, never back."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from streamrepair import api
from streamrepair.decompose import lapack
from streamrepair.decompose.speed import CPU, Stages
from streamrepair.engine import cost, pace
from streamrepair.engine.pace import Pace, with_merge
from streamrepair.engine.plan import Plan
from tests.pairs import write_pair

EXPECTED = Stages(gram_s=2.0, factor_s=6.5, merge_s=0.8)


def test_the_merge_takes_its_share_and_no_more() -> None:
    assert with_merge(EXPECTED, 1.0) == 1.0
    assert with_merge(EXPECTED, 0.0) == pytest.approx(8.5 / 9.3)
    assert with_merge(EXPECTED, 0.5) == pytest.approx(8.9 / 9.3)


def test_the_clock_fills_a_step_and_stays_in_it() -> None:
    """The Gram pass took twice what was expected: so will the factorisation."""
    now, told = [0.0], [0.0]
    expected = EXPECTED
    running = Pace(EXPECTED, 4096, told.append, clock=lambda: now[0])
    in_gram, in_factor = expected.gram_s / expected.total_s, (expected.gram_s + expected.factor_s) / expected.total_s
    now[0] = 0.5 * expected.gram_s
    running.tick()
    assert told[-1] == pytest.approx(0.5 * in_gram)
    now[0] = 50 * expected.gram_s
    running.tick()
    assert 0.9 * in_gram < told[-1] < in_gram
    running = Pace(EXPECTED, 4096, told.append, clock=lambda: now[0])
    began = now[0]
    for quarter in range(1, 5):
        now[0] = began + quarter * 0.5 * expected.gram_s
        running.advance(1024)
        running.tick()
        assert told[-1] == pytest.approx(quarter / 4 * in_gram)
        if quarter == 2:  # half a panel later
            now[0] += 0.25 * expected.gram_s
            running.tick()
            assert told[-1] == pytest.approx(2.5 / 4 * in_gram)
    now[0] += expected.factor_s
    running.tick()
    assert told[-1] == pytest.approx(in_gram + 0.5 * (in_factor - in_gram))
    running.advance(1024)  # another backend reads it once more
    before = list(told)
    running.tick()
    assert told == before
    now[0] += 100 * expected.factor_s
    running.tick()
    assert 0.9 * in_factor < told[-1] < in_factor


class Waiting:
    """A watcher that can be waited for."""

    def __init__(self) -> None:
        self.moved = threading.Semaphore(0)
        self.done_bytes = self.total_bytes = 0

    def begin(self, plan: Plan, done_bytes: int) -> None:
        """Remember what there is to do."""
        assert done_bytes == 0
        self.total_bytes = sum(t.out.nbytes for t in plan.tasks)

    def advance(self, done_bytes: int) -> None:
        """Add up, and wake who waits."""
        self.done_bytes += done_bytes
        self.moved.release()

    def warn(self, message: str) -> None:
        """Nothing is to be warned of."""
        raise AssertionError(message)

    def note(self, message: str) -> None:
        """Say nothing."""

    def end(self) -> None:
        """Say nothing."""


def test_the_bar_moves_while_lapack_is_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reduction does not go on until it has seen the bar move three times."""
    pair = write_pair(tmp_path, {"w": (200, 190)}, dtypes=("F32", "F32"), shards=(1, 1))
    watcher, seen = Waiting(), []
    reduce = lapack.tridiagonalise

    def slow(gram: np.ndarray) -> object:
        while watcher.moved.acquire(blocking=False):
            pass
        seen.extend(watcher.moved.acquire(timeout=60) for _ in range(3))
        return reduce(gram)

    monkeypatch.setattr(lapack, "tridiagonalise", slow)
    monkeypatch.setattr(pace, "_LEAST_S", 0.0)
    monkeypatch.setattr(pace, "_TICK_S", 0.001)
    slow_start = replace(CPU, start_s=60.0)  # so that the bar has far to go
    monkeypatch.setattr(cost.stages, "__defaults__", (slow_start,))
    threads = threading.active_count()
    report = api.repair(pair.base, pair.ft, tmp_path / "out", workers=1, watcher=watcher)
    assert seen == [True] * 3
    assert report.tensors["w"].climbed == ()
    assert watcher.done_bytes == watcher.total_bytes
    assert threading.active_count() == threads
