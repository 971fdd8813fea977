"""The order of copies and products on a device that, as a GPU, runs behind the host and in no fixed order of streams.

torch's CPU does everything at once, so that a missing event shows nowhere. Here what is queued is done later, by
streams that take turns at random, and only as far as events let them.
"""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from streamrepair.decompose.device import staging
from streamrepair.decompose.device.staging import Download, Upload
from streamrepair.decompose.operator import Panel

CPU = torch.device("cpu")


class Late:
    """In place of torch.cpu: Stream, Event, stream(), current_stream(), with queues that are worked off at random."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.streams: list[Late._Stream] = []
        self.current = self.Stream()

    def Stream(self) -> _Stream:  # noqa: N802 – torch's name
        self.streams.append(self._Stream(self))
        return self.streams[-1]

    def Event(self) -> _Event:  # noqa: N802 – torch's name
        return self._Event(self)

    def current_stream(self, _: torch.device) -> _Stream:
        return self.current

    @contextlib.contextmanager
    def stream(self, chosen: _Stream) -> Iterator[None]:
        before, self.current = self.current, chosen
        yield
        self.current = before

    def step(self) -> bool:
        """One stream does one thing; False if none can."""
        ready = [stream for stream in self.streams if stream.queue and stream.queue[0][0]()]
        if ready:
            self._random.choice(ready).queue.popleft()[1]()
        return bool(ready)

    def queued(self, work: Callable[[], object]) -> None:
        """Work for the current stream; meanwhile some of what waits is done."""
        self.current.queue.append((lambda: True, work))
        for _ in range(self._random.randrange(4)):
            self.step()

    class _Stream:
        def __init__(self, late: Late) -> None:
            self._late = late
            self.queue: deque[tuple[Callable[[], bool], Callable[[], object]]] = deque()

        def wait_event(self, event: Late._Event) -> None:
            number = event.recorded
            self.queue.append((lambda: event.reached >= number, lambda: None))

        def wait_stream(self, other: Late._Stream) -> None:
            event = self._late.Event()
            event.record(other)
            self.wait_event(event)

    class _Event:
        def __init__(self, late: Late) -> None:
            self._late, self.recorded, self.reached = late, 0, 0

        def record(self, stream: Late._Stream) -> None:
            self.recorded += 1
            number = self.recorded
            stream.queue.append((lambda: True, lambda: setattr(self, "reached", max(self.reached, number))))

        def synchronize(self) -> None:
            while self.reached < self.recorded:
                assert self._late.step(), "the host waits for what nobody does"


@pytest.fixture(params=range(20))
def late(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Late:
    late = Late(request.param)
    fill, on_host = staging._fill, [False]

    def filled(*arguments: Any) -> None:
        on_host[0] = True
        fill(*arguments)
        on_host[0] = False

    def later(original: Callable[..., Any]) -> Callable[..., Any]:
        def queued(out: torch.Tensor, *others: Any, **_: Any) -> torch.Tensor:
            if on_host[0]:
                original(out, *others)
            else:
                late.queued(lambda: original(out, *others))
            return out

        return queued

    monkeypatch.setattr(staging, "_streams", lambda _: late)
    monkeypatch.setattr(staging, "_stream", lambda _: late.Stream())
    monkeypatch.setattr(staging, "_fill", filled)
    for name in ("copy_", "sub_"):
        monkeypatch.setattr(torch.Tensor, name, later(getattr(torch.Tensor, name)))
    return late


def test_blocks_arrive_whole_however_late_they_are_asked_for(late: Late) -> None:
    """Larger and smaller ones, of other dtypes, in buffers that are used again and again."""
    rng = np.random.default_rng(0)
    upload, expected, found = Upload(CPU), [], []
    for number in range(40):
        rows = int(rng.integers(1, 60))
        ft = rng.standard_normal((rows, 5)).astype(np.float16 if number % 3 else np.float32)
        base = rng.standard_normal((rows, 5)).astype(np.float32)
        block = Panel(0, base, ft, "F32", "F16" if number % 3 else "F32", wide=False)
        expected += [ft.astype(np.float64) - base, base.astype(np.float64)]
        for side in (upload.delta, upload.base):
            found.append(side(block, torch.full((rows, 5), np.nan, dtype=torch.float64)))
        base[...], ft[...] = np.nan, np.nan  # a panel's memory holds the next one soon
    while late.step():
        pass
    for right, tensor in zip(expected, found, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), right)


def test_results_cross_while_the_next_is_computed(late: Late) -> None:
    """One is with the caller while another is on its way, as a merge has them."""
    rng = np.random.default_rng(1)
    download, waiting = Download(CPU), deque[tuple[Any, Any]]()
    for _ in range(40):
        right = rng.standard_normal((int(rng.integers(1, 30)), 3))
        result = torch.full(right.shape, np.nan, dtype=torch.float64)
        result.copy_(torch.from_numpy(right.copy()))  # computed, some time
        waiting.append((right, download.send(result, "F64")))
        if len(waiting) > 1:
            expected, crossing = waiting.popleft()
            np.testing.assert_array_equal(crossing.arrived(), expected)
