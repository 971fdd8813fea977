"""The plain way in memory that backends are compared with: torch.linalg.svd of the whole delta in float32.

That is what a script does that loads both checkpoints: convert, subtract, a full SVD, the product of the kept part,
add, round. torch is optional for the rest of the package and is loaded in functions only.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from streamrepair.benchmark.sources import MemorySource
from streamrepair.errors import NumericalError, brief
from streamrepair.spectral.threshold import HardThreshold

if TYPE_CHECKING:
    from torch import Tensor

NAME = "torch.linalg.svd"


def absence() -> str:
    """Why there is no reference here; empty if there is one."""
    return "" if importlib.util.find_spec("torch") else "torch is not installed"


def repaired(source: MemorySource, rule: HardThreshold, device: str) -> tuple[int, Tensor]:
    """(kept rank, Δ* on the device, oriented as stored); W_base + Δ* is made too and ends in host memory.

    Raises:
        NumericalError: torch found no SVD, or no memory for it.
    """
    import torch

    stored = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}[source.dtype]
    try:
        W_base, W_ft = (torch.from_numpy(raw).to(device).view(stored) for raw in (source.base, source.ft))
        u, s, vh = torch.linalg.svd(W_ft.float() - W_base.float(), full_matrices=False)
        rank = rule.estimate(s.cpu().numpy().astype(np.float64), source.rows, source.cols).rank_kept
        star = (u[:, :rank] * s[:rank]) @ vh[:rank]
        (W_base.float() + star).to(stored).cpu()  # waits for a GPU
    except RuntimeError as error:  # torch's LinAlgError and OutOfMemoryError are RuntimeErrors
        raise NumericalError(brief(error)) from error
    return rank, star


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch with so many threads; the process's setting is put back."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def begin_device_peak(device: str) -> None:
    """Let the peak of device memory start from what is held now; nothing on the CPU."""
    if device != "cpu":
        import torch

        # The reset does not see to it, and raises where nothing was done on a card before.
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(torch.device(device))


def device_peak_bytes(device: str) -> int | None:
    """Peak of torch's allocations on the device since `begin_device_peak`; None on the CPU."""
    if device == "cpu":
        return None
    import torch

    return int(torch.cuda.max_memory_allocated(torch.device(device)))


def device_name(device: str) -> str | None:
    """The GPU's name; None for the CPU."""
    if device == "cpu":
        return None
    import torch

    return str(torch.cuda.get_device_name(torch.device(device)))
