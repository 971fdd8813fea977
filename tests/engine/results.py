"""What comes of a run, held against a textbook; and a watcher that remembers what it was told."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from streamrepair.engine.plan import Plan
from streamrepair.report import Report
from tests.pairs import Pair, read_tensors, rounded_share, textbook, values


def check_result(pair: Pair, out: Path, report: Report, *, scale: float = 1.0) -> None:
    """Every repaired tensor has the textbook's rank and values; every other one is FT's; all are accounted for."""
    base, ft, found = read_tensors(pair.base), read_tensors(pair.ft), read_tensors(out)
    assert list(found) == list(ft)
    assert set(report.tensors) == set(base) | set(ft)
    for name, record in report.tensors.items():
        if record.action == "dropped":
            assert name not in ft
        elif record.action != "repaired":
            assert found[name] == ft[name]
        else:
            expected = textbook(values(base[name]), values(ft[name]), scale=scale)
            assert record.rank_kept == expected.rank
            assert record.threshold == pytest.approx(expected.tau, rel=1e-5)
            assert found[name][:2] == ft[name][:2]
            if found[name][0] == "F64":  # to the last place the textbook is no better
                off = np.linalg.norm(values(found[name]) - expected.sum)
                assert off <= 1e-10 * np.linalg.norm(expected.sum - values(base[name]))
            else:
                assert rounded_share(values(found[name]), expected.sum, found[name][0]) >= 0.999


class Recorder:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.done_bytes = self.total_bytes = self.found_bytes = 0
        self.ended = 0
        self._lock = threading.Lock()

    def begin(self, plan: Plan, done_bytes: int) -> None:
        """Remember what there is to do."""
        self.total_bytes, self.found_bytes = sum(t.out.nbytes for t in plan.tasks), done_bytes

    def advance(self, done_bytes: int) -> None:
        """Add up."""
        with self._lock:
            self.done_bytes += done_bytes

    def warn(self, message: str) -> None:
        """Remember."""
        self.warnings.append(message)

    def note(self, message: str) -> None:
        """Remember."""
        self.notes.append(message)

    def end(self) -> None:
        """Count."""
        self.ended += 1
