"""Which backends are tried for a matrix, in which order, and what happens when one cannot answer.

A rung that fails (no convergence, a wrong answer, too little precision, no device memory) is recorded and the next one
is tried, down to a float64 SVD on the CPU. Past that it is an error: the fine-tuned tensor is never passed off as
repaired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from streamrepair.decompose import full, gram, row_space
from streamrepair.decompose.arithmetic import Arithmetic, Precision
from streamrepair.decompose.choose import Backend, Estimate, held_share, krylov_share
from streamrepair.decompose.convert import Doubles, difference
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.operator import PanelSource, blocks
from streamrepair.decompose.truncation import NonFiniteDeltaError, Truncation, UnresolvedError, without_noise
from streamrepair.errors import NumericalError, brief
from streamrepair.spectral.threshold import HardThreshold

Rung = tuple[str, Callable[[], Truncation]]

_LEAST_FLOAT32 = 32
"""Below this many columns the errors of float32 are too few to be measured by probes."""
_GRAM_ON_CPU = "gram-float64-cpu"


def precisions(arithmetic: Arithmetic, rule: HardThreshold, cols: int, *, sharp: bool) -> list[Precision]:
    """In which precisions a Gram matrix is tried, in order.

    Args:
        sharp: whether the output's dtype could tell float32 products from float64 ones.
    """
    blunt = not sharp and rule.sigma == "median" and cols >= _LEAST_FLOAT32
    return [precision for precision in arithmetic.precisions if precision == "float64" or blunt]


def decompose(
    source: PanelSource,
    rule: HardThreshold,
    *,
    arithmetic: Arithmetic,
    backend: Backend,
    sharp: bool = False,
    full_fits: bool = True,
    estimate: Estimate = "exact",
    host: HostArithmetic | None = None,
    batched: Truncation | NumericalError | None = None,
) -> Truncation:
    """The truncated delta of one matrix, by the first backend that can prove its answer.

    Args:
        sharp: whether the output's dtype could tell float32 products from float64 ones.
        full_fits: whether the memory budget has room for the reference route.
        host: the CPU that a device's work falls back to; a fresh one by default.
        batched: what came of the first of `precisions` in a batch with other matrices; it goes before all else.

    Raises:
        NonFiniteDeltaError: an input holds NaN or Inf.
        NumericalError: every backend failed; the message has each one's reason.
    """
    on_cpu = isinstance(arithmetic, HostArithmetic)
    host = arithmetic if isinstance(arithmetic, HostArithmetic) else host or HostArithmetic()
    rungs: list[Rung] = []
    left: list[str] = []
    drowning: list[Doubles] = []
    again = {_GRAM_ON_CPU}
    if batched is not None:
        first = f"gram-{precisions(arithmetic, rule, source.cols, sharp=sharp)[0]}"
        again.add(first)
        rungs.append((f"{first} in a batch", partial(_given, batched)))
    if backend != "full":
        by_gram = partial(
            gram.truncate,
            source,
            rule,
            arithmetic=arithmetic,
            krylov=krylov_share(backend, estimate, source.cols),
            estimate=estimate,
            held=held_share(backend, estimate, source.rows, source.cols),
            left=left,
            drowning=drowning,
        )
        for precision in precisions(arithmetic, rule, source.cols, sharp=sharp):
            rungs.append((f"gram-{precision}", partial(by_gram, precision=precision)))
        if not on_cpu:
            rungs.append((_GRAM_ON_CPU, partial(gram.truncate, source, rule, arithmetic=host, precision="float64")))
        rungs.append(("rows", partial(_mostly_empty, source, rule)))
        if on_cpu:
            rungs.append(("deflated", partial(gram.without, drowning, source, rule, host)))
        # On a GPU's behalf only the cheap bases: its own SVD is quicker than a large one on the CPU.
        rungs.append(("row-space", partial(row_space.truncate, source, rule, thorough=on_cpu or not full_fits)))
    rungs.append(("full", partial(full.truncate, source, rule, arithmetic=arithmetic) if full_fits else _too_large))
    if full_fits and not on_cpu:
        rungs.append(("full-cpu", partial(full.truncate, source, rule, arithmetic=host)))
    return _climbed(rungs, left, again=again)


def _climbed(rungs: Sequence[Rung], left: list[str], *, again: Container[str]) -> Truncation:
    """The answer of the first rung that has one.

    Args:
        left: gets why each before it was left; a rung that has several ways adds why it left one for the next.
        again: rungs that are no sharper than the one before: they are there for a device without memory or with a
            faulty solver.

    Raises:
        NonFiniteDeltaError, NumericalError: as `decompose` does.
    """
    too_blunt = False
    for name, attempt in rungs:
        if name in again and too_blunt:
            continue
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # squares that overflow pass no check
                found = attempt()
            return replace(found, climbed=tuple(left))
        except NonFiniteDeltaError as error:
            if not name.startswith("gram"):
                raise
            left.append(f"{name}: {error}")  # squares can overflow where the input is sound
        except (ArithmeticError, RuntimeError, np.linalg.LinAlgError) as error:
            too_blunt = isinstance(error, UnresolvedError)
            left.append(f"{name}: {brief(error)}")
    raise NumericalError("; ".join(left))


def _given(found: Truncation | NumericalError) -> Truncation:
    if isinstance(found, NumericalError):
        raise found
    return found


def _mostly_empty(source: PanelSource, rule: HardThreshold) -> Truncation:
    """A delta with at most (n − 1) // 2 rows that are not zero has rank below half of n: its median is zero.

    Embeddings fine-tuned on text that meets few tokens are like that, and a full SVD of them is dear.

    Raises:
        NonFiniteDeltaError: the delta is not finite.
        NumericalError: too many rows are not zero to tell.
    """
    n, occupied, norm = source.cols, 0, 0.0
    for block in blocks(source):
        delta = np.empty(block.ft.shape)
        difference(block.ft, block.ft_dtype, block.base, block.base_dtype, delta)
        # No squares before they are scaled: they could overflow or vanish where the delta does neither.
        axis = 0 if block.wide else 1
        largest = np.maximum(delta.max(axis=axis), -delta.min(axis=axis))
        if not np.isfinite(largest).all():
            raise NonFiniteDeltaError("a row of the delta is not finite")
        occupied += int(np.count_nonzero(largest))
        norm = math.hypot(norm, full.scaled_norm(delta, overwrite=True))
        if occupied > (n - 1) // 2:
            raise NumericalError("too many rows are not zero to prove that the median is")
    return without_noise(n, source.rows, rule, norm=norm, backend="rows")


def _too_large() -> Truncation:
    raise NumericalError("the float64 SVD does not fit the memory budget")
