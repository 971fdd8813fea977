"""What a device multiplies in a second in float32 and in float64, measured: it decides which precision is tried first.

Cards with fast float64 (A100, H100: about the rate of float32) form every Gram matrix in float64; consumer cards (1/32
to 1/64 of it) try float32 first. Measured, since no list of names is ever complete.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch

from streamrepair.decompose.arithmetic import Precision

SLOW_FLOAT64 = 8.0
"""float32 is tried first where it is so many times faster. Cards lie at 1 to 2 or at 32 and above: none is near, so
that noise in the measurement cannot change a run's precision."""

_PRODUCT_FLOPS = {"cuda": 2.0 * 2048**3, "cpu": 2.0 * 256**3}
_REPEATS = 5

_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Rates:
    """Floating-point operations per second of large matrix products."""

    float32: float
    float64: float

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Precisions worth trying for a Gram matrix, cheapest first."""
        return ("float32", "float64") if self.float32 > SLOW_FLOAT64 * self.float64 else ("float64",)


def rates(device: torch.device) -> Rates:
    """The rates of a device, measured once per process; some tens of milliseconds.

    Raises:
        RuntimeError: torch's: the device does not compute, or has no memory.
    """
    with _lock:  # two probes at once would halve each other
        return _measured(str(device))


@cache
def _measured(device: str) -> Rates:
    place = torch.device(device)
    # torch loads its solvers when the first of them is called, and raises if two threads call at once: here, one does.
    torch.linalg.eigh(torch.eye(2, dtype=torch.float64, device=place))
    with ieee_products():
        return _of_products(place)


def _of_products(device: torch.device) -> Rates:
    """In turn: a card that was idle gets faster meanwhile, and one precision alone would look slow."""
    flops = _PRODUCT_FLOPS.get(device.type, _PRODUCT_FLOPS["cuda"])
    side = round((flops / 2.0) ** (1 / 3))
    factors = [torch.full((side, side), 0.5, dtype=dtype, device=device) for dtype in (torch.float32, torch.float64)]
    products = [torch.empty_like(factor) for factor in factors]
    shortest = [float("inf")] * len(factors)
    for _ in range(1 + _REPEATS):  # the first loads the library
        for i, factor in enumerate(factors):
            _wait(device)
            began = time.perf_counter()
            torch.mm(factor, factor, out=products[i])
            _wait(device)
            shortest[i] = min(shortest[i], time.perf_counter() - began)
    return Rates(flops / shortest[0], flops / shortest[1])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Ieee:
    """The process-wide setting for float32 products, held at IEEE while anyone needs it and then put back."""

    def __init__(self) -> None:
        self._lock, self._holders, self._before = threading.Lock(), 0, ""

    def hold(self) -> None:
        with self._lock:
            if self._holders == 0:
                self._before = _get_product_setting()
                _set_product_setting("ieee")
            self._holders += 1

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                _set_product_setting(self._before)


_ieee = _Ieee()


@contextlib.contextmanager
def ieee_products() -> Iterator[None]:
    """float32 products in float32: TF32 has ten bits, and would break Δ* wherever a program has allowed it."""
    _ieee.hold()
    try:
        yield
    finally:
        _ieee.release()


def _get_product_setting() -> str:
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9; reading the older setting is an error once this one was used
        return str(matmul.fp32_precision)
    return "tf32" if matmul.allow_tf32 else "ieee"


def _set_product_setting(setting: str) -> None:
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        matmul.fp32_precision = setting
    else:
        matmul.allow_tf32 = setting == "tf32"
