"""Times on a device, what it held meanwhile, and failures that do not end all that there is."""

from __future__ import annotations

import math
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from streamrepair.errors import brief

EXPECTED = (RuntimeError, ArithmeticError)
"""No memory, no convergence, no such driver."""

Record = dict[str, Any]


def tried(work: Callable[[], Any]) -> Any:
    """What it gives, or why there is nothing: what a card has no memory for must not end all that it has."""
    try:
        return work()
    except Exception as error:
        return failed(error)


def failed(error: Exception) -> Record:
    """Whatever it is, the rest goes on: a card may not be had a second time. What is not expected is shown in full."""
    if not isinstance(error, EXPECTED):
        traceback.print_exception(error)
    return {"failed": brief(error) or type(error).__name__}


class Clock:
    """Runs what is to be timed, as long as there is time.

    Args:
        limit_s: of one contender. minutes: after which nothing is started any more.
    """

    def __init__(self, device: torch.device, repeats: int, limit_s: float, minutes: float = math.inf) -> None:
        self._device, self._repeats, self._limit_s = device, repeats, limit_s
        self._ends = time.perf_counter() + 60.0 * minutes
        self._rates: dict[str, float] = {}

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.perf_counter() >= self._ends

    def measure(
        self, name: str, flops: float, work: Callable[[], Any], check: Callable[[Any], Record] | None = None
    ) -> Record:
        """Seconds, peak bytes and the check of the answer, or why there are none.

        The first run is a warm-up, unless it is long.
        """
        if refusal := self._refusal(name, flops):
            return {"name": name, "left_out": refusal}
        try:
            before = self._begin()
            first_s, result = self._once(work)
            peak = self._peak(before)
            checked = {"check": check(result)} if check else {}
            del result
            long = first_s > self._limit_s / (self._repeats + 1)
            samples = [first_s] if long else [self._once(work)[0] for _ in range(self._repeats)]
        except Exception as error:
            return {"name": name, **failed(error)}
        seconds = statistics.median(samples)
        self._rates[name] = flops / seconds
        return {"name": name, "seconds": seconds, "samples": samples, "first_s": first_s, **peak, **checked}

    def once(self, name: str, flops: float, work: Callable[[], Any]) -> Any:
        """What it gives, done once, or a record of why there is nothing."""
        if refusal := self._refusal(name, flops):
            return {"left_out": refusal}
        try:
            seconds, result = self._once(work)
        except Exception as error:
            return failed(error)
        self._rates[name] = flops / seconds
        return result

    def _refusal(self, name: str, flops: float) -> str:
        """Why something is not begun; empty if it is."""
        expected_s = flops / self._rates[name] if name in self._rates else 0.0
        if expected_s > self._limit_s:
            return f"expected to take {expected_s:.0f} s"
        return "no time is left" if time.perf_counter() + expected_s >= self._ends else ""

    def _once(self, work: Callable[[], Any]) -> tuple[float, Any]:
        self.wait()
        began = time.perf_counter()
        result = work()
        self.wait()
        return time.perf_counter() - began, result

    def wait(self) -> None:
        """For the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _begin(self) -> int:
        """Let peaks start from now; bytes that are held already."""
        if self._device.type != "cuda":
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        return int(torch.cuda.memory_allocated(self._device))

    def _peak(self, before: int) -> Record:
        if self._device.type != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info(self._device)
        return {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(self._device) - before,
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(self._device) - before,
            # The context, libraries, and other programs: what `engine/memory` has CUDA_CONTEXT_BYTES for.
            "beside_torch_bytes": total - free - torch.cuda.memory_reserved(self._device),
        }
