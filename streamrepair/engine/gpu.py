"""A GPU as its worker's thread has it: a stream of its own, and a cap on its memory.

Kernels and copies of one card then do not queue behind another thread's. Not measured on hardware with several cards.
torch is imported late: nothing here is called with a device other than "cpu" unless a GPU is used.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from streamrepair.engine.memory import CUDA_CONTEXT_BYTES
from streamrepair.errors import UsageError, brief

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def own_stream(device: str) -> Iterator[None]:
    """This thread's work goes to `device`, in a stream of its own."""
    if device == "cpu" or not _available():
        yield
        return
    import torch

    with torch.cuda.device(device), torch.cuda.stream(_stream_of(device)):
        yield


@cache
def _stream_of(device: str) -> torch.cuda.Stream:
    """The same in every run of a program: torch keeps a workspace of cuBLAS, 32 MiB on Hopper, for each it ever saw."""
    import torch

    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def capped_memory(gpus: Sequence[str], vram_bytes: int | None) -> Iterator[None]:
    """Let torch take no more of each card than --vram allows: beyond it, it raises as if the card were full.

    What the program had there before is its own matter: its limit is put back, and what torch would keep of the run's
    memory, for a stream that nobody else has, is let go. The measured peak starts from here.

    Raises:
        UsageError: a card cannot be used.
    """
    if not gpus or vram_bytes is None or not _available():
        yield
        return
    with contextlib.ExitStack() as limits:
        for gpu in gpus:
            _capped(gpu, vram_bytes, limits)
        yield


@dataclass(slots=True)
class _Allowed:
    """What torch is allowed of one card."""

    before: float = 1.0
    """The share that the program had set before the first of the runs that go on; put back by the last."""
    shares: list[float] = field(default_factory=list)
    """What each of them allows itself; the largest is in force."""


_lock = threading.Lock()
_allowed: dict[str, _Allowed] = {}
"""By card; to be used under the lock."""


def _capped(gpu: str, vram_bytes: int, limits: contextlib.ExitStack) -> None:
    """Limit one card, until `limits` is closed."""
    import torch

    card = torch.device(gpu)
    asked = getattr(torch.cuda.memory, "get_per_process_memory_fraction", None)  # torch 2.8
    with _lock:
        allowed = _allowed.setdefault(gpu, _Allowed())
        try:
            torch.cuda.empty_cache()
            held = torch.cuda.memory_reserved(card)
            total = torch.cuda.get_device_properties(card).total_memory
            share = max(0.0, held + vram_bytes - CUDA_CONTEXT_BYTES) / total
            if not allowed.shares:
                allowed.before = 1.0 if asked is None else float(asked(card))
            torch.cuda.reset_peak_memory_stats(card)
            allowed.shares.append(share)
            limits.callback(_uncapped, gpu, share)
            _limit(gpu, allowed)
        except RuntimeError as error:
            raise unusable(gpu, error) from error


def _uncapped(gpu: str, share: float) -> None:
    """Put back the share of a card that torch was allowed; one that broke meanwhile does not undo what was done."""
    with _lock, contextlib.suppress(RuntimeError):
        _allowed[gpu].shares.remove(share)
        _limit(gpu, _allowed[gpu])
        release_memory()


def _limit(gpu: str, allowed: _Allowed) -> None:
    import torch

    share = min(allowed.before, max(allowed.shares, default=1.0))
    with torch.cuda.device(gpu):  # torch leaves the card current for which it set a limit
        torch.cuda.set_per_process_memory_fraction(share, torch.device(gpu))


def release_memory() -> None:
    """Give back what torch keeps of its cards for later."""
    if _available():
        import torch

        torch.cuda.empty_cache()


def unusable(device: str, error: RuntimeError) -> UsageError:
    """What is to be said of a card that torch found and cannot compute on."""
    return UsageError(f"{device} cannot be used ({brief(error)}): free it, or name others with --device, such as cpu")


def _available() -> bool:
    import torch

    return torch.cuda.is_available()
