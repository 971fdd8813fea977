"""What lanes did, counted up to now: a run that is killed in a long task was not idle in it."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from types import SimpleNamespace

import pytest

from streamrepair.engine import timeline
from streamrepair.engine.timeline import Lane, Span, Timeline
from streamrepair.engine.trace import chrome_trace


def test_busy_waiting_and_idle_add_up_to_the_wall_time_in_the_middle_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(timeline, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    kept = Timeline()
    lane = Lane(kept, "cpu 0")
    clock[0] += 2
    with lane.task("w"):
        clock[0] += 3
        with lane.waiting("read"):
            clock[0] += 4
        with lane.file("write"):
            clock[0] += 5
            worker, files = kept.uses(["cpu 0"], clock[0] - 100)
    assert (worker.busy_s, worker.waiting_s, worker.idle_s) == (3, {"read": 4, "write": 5, "memory": 0}, 2)
    assert (files.busy_s, files.idle_s) == (5, 9)
    assert kept.uses(["cpu 0"], clock[0] - 100) == (worker, files)


def test_a_worker_that_is_lent_is_busy_and_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lent in the middle of its wait for memory, into a task of its own, and once it has no more tasks."""
    clock = [0.0]
    monkeypatch.setattr(timeline, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    kept = Timeline()
    lane = Lane(kept, "cpu 1")

    def seen() -> tuple[float, float, float, float]:
        worker, _ = kept.uses(["cpu 1"], clock[0])
        return worker.busy_s, worker.waiting_s["memory"], worker.waiting_s["write"], worker.idle_s

    lent = contextlib.ExitStack()
    with lane.waiting("memory"):
        clock[0] += 2
        lent.enter_context(lane.lent())
        clock[0] += 3
        assert seen() == (3, 2, 0, 0)
    with lane.task("w"):
        clock[0] += 10
        assert seen() == (13, 2, 0, 0)
        lent.close()
        clock[0] += 20
    assert seen() == (33, 2, 0, 0)
    with lane.waiting_for_disk(), lane.lent():
        clock[0] += 100
    clock[0] += 200
    with lane.lent():
        clock[0] += 1000
        assert seen() == (1133, 2, 0, 200)
    assert seen() == (1133, 2, 0, 200)


def test_a_trace_is_made_in_little_more_memory_than_it_takes() -> None:
    """A run of a hundred thousand small tensors has a million events; its end is no time to run out of memory."""
    kept = Timeline(keep=True)
    kept.spans.extend(Span("cpu 0", "task", f"layers.{i}.weight", i / 7, (i + 1) / 7) for i in range(20_000))
    tracemalloc.start()
    try:
        trace = chrome_trace(kept, ["cpu 0"])
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [event["name"] for event in json.loads(trace)["traceEvents"]][-1] == "layers.19999.weight"
    assert peak_bytes < 3 * len(trace)
