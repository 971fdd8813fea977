"""The bar moves inside a large matrix: by what is counted where it can be, by the clock where not, never back."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from streamrepair import api
from streamrepair.decompose import lapack
from streamrepair.engine import pace
from streamrepair.engine.memory import MatrixShape
from streamrepair.engine.pace import Pace, steps, with_merge
from streamrepair.engine.plan import Plan
from tests.pairs import write_pair

SQUARE = MatrixShape(rows=4096, cols=4096, base_item_bytes=2, ft_item_bytes=2, out_item_bytes=2)


def test_the_shares_are_those_of_the_operations() -> None:
    """Of a square matrix the factorisation takes most of the time, of a very tall one the passes."""
    square = steps(SQUARE, "gram")
    assert square.factor_s > 0.6 * square.total_s
    tall = steps(MatrixShape(rows=128 * 1024, cols=1024, base_item_bytes=2, ft_item_bytes=2, out_item_bytes=2), "gram")
    assert tall.factor_s < 0.1 * tall.total_s
    assert with_merge(SQUARE, "gram", 1.0) == 1.0
    assert with_merge(SQUARE, "gram", 0.0) == pytest.approx((square.gram_s + square.factor_s) / square.total_s)


def test_the_clock_fills_a_step_and_stays_in_it() -> None:
    """The Gram pass took twice what was expected: so will the factorisation."""
    now, told = [0.0], [0.0]
    expected = steps(SQUARE, "gram")
    running = Pace(SQUARE, "gram", told.append, clock=lambda: now[0])
    in_gram, in_factor = expected.gram_s / expected.total_s, (expected.gram_s + expected.factor_s) / expected.total_s
    now[0] = 0.5 * expected.gram_s
    running.tick()
    assert told[-1] == pytest.approx(0.5 * in_gram)
    now[0] = 50 * expected.gram_s
    running.tick()
    assert 0.9 * in_gram < told[-1] < in_gram
    running = Pace(SQUARE, "gram", told.append, clock=lambda: now[0])
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
    monkeypatch.setattr(pace, "_FACTOR_FLOPS_PER_S", 1e6)  # so that the bar has far to go
    threads = threading.active_count()
    report = api.repair(pair.base, pair.ft, tmp_path / "out", workers=1, watcher=watcher)
    assert seen == [True] * 3
    assert report.tensors["w"].climbed == ()
    assert watcher.done_bytes == watcher.total_bytes
    assert threading.active_count() == threads
