"""What bench/cuda.py compares: the GPU route, torch.linalg.svd by each driver, a plain Gram matrix and eigh."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamrepair.benchmark.sources import MemorySource
from streamrepair.decompose import certify, cholesky_count, gram, ladder
from streamrepair.decompose.arithmetic import on_host
from streamrepair.decompose.batched import truncate_batch
from streamrepair.decompose.convert import Doubles
from streamrepair.decompose.device import DeviceArithmetic
from streamrepair.decompose.device.spectrum import EighSpectrum, GramMatrix
from streamrepair.decompose.truncation import Truncation, decide
from streamrepair.errors import NumericalError, brief
from streamrepair.spectral.threshold import HardThreshold

RULE = HardThreshold()
RANK_TOLERANCE, DELTA_TOLERANCE = 1e-5, 1e-4


@dataclass(frozen=True, slots=True)
class Result:
    """A contender's answer."""

    rank: int
    vh: Tensor
    """(rank, n) right singular vectors (of the tall orientation) as rows, on the device."""
    backend: str
    climbed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """The float64 truth: R of Δ = Q·R, its singular values and right vectors."""

    r: Tensor
    vh: Tensor
    rank: int
    close: int

    def check(self, result: Result) -> dict[str, Any]:
        """Rank and Δ*, through R: Q changes no norm."""
        exact = self.r @ self.vh[: self.rank].T @ self.vh[: self.rank]
        rows = result.vh.to(torch.float64)
        off = torch.linalg.vector_norm((self.r @ rows.T) @ rows - exact)
        error = float(off / (torch.linalg.vector_norm(exact) or 1.0))
        agrees = abs(result.rank - self.rank) <= self.close
        return {
            "rank": result.rank,
            "rank_exact": self.rank,
            "delta_error": error if math.isfinite(error) else None,  # JSON has no NaN
            "passed": agrees and error <= DELTA_TOLERANCE,
            "backend": result.backend,
            "climbed": list(result.climbed),
        }


def answer(source: MemorySource, device: torch.device) -> Answer:
    """By QR and gesvd in float64 on the device."""
    r = torch.linalg.qr(_delta(source, device, torch.float64), mode="r").R
    _, s, vh = torch.linalg.svd(r, driver="gesvd" if device.type == "cuda" else None)
    threshold = RULE.estimate(s.cpu().numpy(), source.rows, source.cols)
    close = int((torch.abs(s - threshold.tau) <= RANK_TOLERANCE * threshold.tau).sum())
    return Answer(r, vh, threshold.rank_kept, close)


def ours(source: MemorySource, device: str) -> Callable[[], Result]:
    """Both passes of a repair, certificate and all."""
    out = np.zeros_like(source.base)

    def repair() -> Result:
        arithmetic = DeviceArithmetic(device)  # new for each matrix, as in a run
        truncation = ladder.decompose(source, RULE, arithmetic=arithmetic, backend="auto")
        merger = arithmetic.merger(truncation.vh, "BF16")
        for block, merged in merger.merged(source.panels()):
            rows = slice(block.start, block.start + block.rows)
            out[(slice(None), rows) if block.wide else rows] = merged
        vh = getattr(truncation.vh, "rows", None)
        rows_kept = vh if vh is not None else torch.from_numpy(on_host(truncation.vh)).to(arithmetic.device)
        climbed = truncation.climbed + merger.climbed
        return Result(truncation.threshold.rank_kept, rows_kept, truncation.backend, climbed)

    return repair


def others(source: MemorySource, device: torch.device) -> Iterator[tuple[str, Callable[[], Result]]]:
    """The plain ways, each with everything in the device's memory."""
    yield "eigh-float64", lambda: _eigh(source, device)
    for driver in ("default", "gesvd", "gesvdj", "gesvda") if device.type == "cuda" else ("default",):
        yield f"svd-{driver}", lambda driver=driver: _svd(source, device, driver)


def _svd(source: MemorySource, device: torch.device, driver: str) -> Result:
    delta = _delta(source, device, torch.float32)
    _, s, vh = torch.linalg.svd(delta, full_matrices=False, driver=None if driver == "default" else driver)
    rank = RULE.estimate(s.cpu().numpy().astype(np.float64), source.rows, source.cols).rank_kept
    _merged(source, device, delta, vh[:rank])
    return Result(rank, vh[:rank], f"svd-{driver}")


def _eigh(source: MemorySource, device: torch.device) -> Result:
    delta = _delta(source, device, torch.float32)
    wide = delta.double()
    values, vectors = torch.linalg.eigh(wide.T @ wide)
    del wide
    s = np.sqrt(np.maximum(values.cpu().numpy(), 0.0))
    rank = RULE.estimate(s, source.rows, source.cols).rank_kept
    vh = vectors[:, source.cols - rank :].T
    _merged(source, device, delta, vh.float())
    return Result(rank, vh, "eigh-float64")


def _delta(source: MemorySource, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Δ, tall, all of it on the device."""
    ft, base = _loaded(source.ft, device), _loaded(source.base, device)
    delta = (ft.float() - base.float()).to(dtype)  # exact to 2⁻²⁴ in either
    return delta.T.contiguous() if source.wide else delta


def _merged(source: MemorySource, device: torch.device, delta: Tensor, vh: Tensor) -> Tensor:
    star = (delta @ vh.T) @ vh
    return (_loaded(source.base, device).float() + (star.T if source.wide else star)).bfloat16().cpu()


def _loaded(raw: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    return torch.from_numpy(raw).to(device).view(torch.bfloat16)


def stages(
    source: MemorySource, arithmetic: DeviceArithmetic, wait: Callable[[], None], found: dict[str, float]
) -> None:
    """Seconds of each stage in float64, and the share of their allowance that rounding errors took in the proofs.

    Args:
        found: gets them one by one, so that a stage that fails takes none of those before it along. The rounding errors
            come before the proofs, which they may make fail.
    """
    probes, last = certify.probe_vectors(source.cols), time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        wait()
        found[name], last = time.perf_counter() - last, time.perf_counter()

    arithmetic.gram(source, probes, "float64")  # buffers and libraries
    lap("warm_up_s")
    summed = arithmetic.gram(source, probes, "float64")
    lap("gram_s")
    spectrum = summed.factorise()
    assert isinstance(spectrum, EighSpectrum)
    lap("eigh_s")
    bound = certify.solver_bound(float(spectrum.values[-1]), source.cols)
    threshold, _ = decide(spectrum.values, bound, RULE, source.rows, source.cols)
    lap("decide_s")
    found |= _rounding(spectrum, threshold.tau**2, bound, probes)
    lap("rounding_s")
    spectrum.count_above(threshold.tau**2, bound)
    lap("count_s")
    kept = spectrum.values[source.cols - threshold.rank_kept :]
    certify.check_vectors(spectrum.top(threshold.rank_kept), kept, probes, summed.images)
    lap("vectors_s")
    gram.conclude(summed, spectrum, RULE, source.rows, "float64")
    lap("conclude_s")


def _rounding(spectrum: EighSpectrum, shift: float, bound: float, probes: Doubles) -> dict[str, float]:
    """Rounding errors that the proofs of the count met, in their unit √n·ε·λ_max."""
    n = len(spectrum.values)
    count = cholesky_count.deflation(spectrum.values, shift, bound).count
    matrix, vectors, values = GramMatrix(spectrum.gram), spectrum.top(count), spectrum.values[n - count :]
    unit = certify.solver_bound(float(spectrum.values[-1]), n)
    residual = matrix.residual(vectors, values)[0] if count else 0.0
    difference = matrix.deflated(shift, vectors, values, probes)[1]
    return {"residual_units": residual / unit, "formed_units": certify.spectral_bound(difference) / unit}


def batched(sources: Sequence[MemorySource], arithmetic: DeviceArithmetic) -> dict[str, Callable[[], Any]]:
    """Many decisions at once, and one after another."""
    return {
        "batched": lambda: truncate_batch(sources, RULE, arithmetic),
        "one by one": lambda: [
            gram.truncate(source, RULE, arithmetic=arithmetic, precision="float64") for source in sources
        ],
    }


def decided(results: Sequence[Truncation | NumericalError]) -> dict[str, Any]:
    """How many members of a batch have an answer, and why others have none: they do not fail with it."""
    failures = [result for result in results if isinstance(result, NumericalError)]
    return {"decided": len(results) - len(failures), "why": sorted({brief(failure) for failure in failures})}
