"""Which backends are tried for a matrix, in which order, and what happens when one cannot answer.

A rung that fails (no convergence, a wrong answer, too little precision, no device memory) is recorded and the next one
is tried, down to a float64 SVD on the CPU. Past that it is an error: the fine-tuned tensor is never passed off as
repaired.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import torch

from streamrepair.decompose import certify, full, gram
from streamrepair.decompose.operator import PanelSource, delta_blocks
from streamrepair.decompose.truncation import NonFiniteDeltaError, Truncation
from streamrepair.errors import NumericalError
from streamrepair.spectral.threshold import HardThreshold

Backend = Literal["auto", "full", "gram"]
Rung = tuple[str, Callable[[], Truncation]]

_CPU = torch.device("cpu")


def decompose(
    source: PanelSource, rule: HardThreshold, *, device: torch.device, backend: Backend, full_fits: bool = True
) -> Truncation:
    """The truncated delta of one matrix, by the first backend that can prove its answer.

    Args:
        full_fits: whether the memory budget has room for the reference route.

    Raises:
        NonFiniteDeltaError: an input holds NaN or Inf.
        NumericalError: every backend failed; the message has each one's reason.
    """
    failures: list[str] = []
    for name, attempt in _rungs(source, rule, device, backend, full_fits):
        try:
            return replace(attempt(), climbed=tuple(failures))
        except NonFiniteDeltaError as error:
            if name != "gram-float32":
                raise
            failures.append(f"{name}: {error}")  # float32 sums can overflow where the input is sound
        except (NumericalError, RuntimeError) as error:
            failures.append(f"{name}: {_first_line(error)}")
    raise NumericalError("; ".join(failures))


def _rungs(
    source: PanelSource, rule: HardThreshold, device: torch.device, backend: Backend, full_fits: bool
) -> list[Rung]:
    rungs: list[Rung] = []
    if backend != "full":
        precisions: tuple[gram.Precision, ...] = ("float32", "float64") if device.type == "cpu" else ("float64",)
        for precision in precisions:
            attempt = partial(gram.truncate, source, rule, device=device, precision=precision)
            rungs.append((f"gram-{precision}", attempt))
        rungs.append(("empty", partial(_mostly_empty, source, rule, device=device)))
    if not full_fits:
        return [*rungs, ("full", _too_large)]
    rungs.append(("full", partial(full.truncate, source, rule, device=device)))
    if device.type != "cpu":
        rungs.append(("full-cpu", partial(full.truncate, source, rule, device=_CPU)))
    return rungs


def _mostly_empty(source: PanelSource, rule: HardThreshold, *, device: torch.device) -> Truncation:
    """A delta most of whose rows are zero has rank below half: its median is zero, which a count of rows proves.

    Embeddings fine-tuned on text that meets few tokens are like that, and a full SVD of them is dear.

    Raises:
        NumericalError: too many rows are not zero to tell.
    """
    n, occupied, square = source.cols, 0, 0.0
    for block in delta_blocks(source, device, torch.float64):
        norms = block.square().sum(dim=1)
        occupied += int((norms > 0).sum())
        square += float(norms.sum())
        if occupied > (n - 1) // 2:
            raise NumericalError(f"more than {occupied - 1} rows are not zero")
    threshold = rule.estimate(np.zeros(n), source.rows, n)
    certificate = certify.Certificate(0.0, 0.0, 0.0)
    return Truncation(
        values=np.zeros(n),
        threshold=threshold,
        vh=torch.zeros((0, n), device=device),
        frob_delta_in=square**0.5,
        backend="rows",
        certificate=certificate,
        noise_free=True,
    )


def _too_large() -> Truncation:
    raise NumericalError("the float64 SVD does not fit the memory budget: raise --ram")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
