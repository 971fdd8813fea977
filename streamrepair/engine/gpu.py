"""A GPU as its worker's thread has it: a stream of its own, and a cap on its memory.

Kernels and copies of one card then do not queue behind another thread's. Not measured on hardware with several cards.
torch is imported late: nothing here is called with a device other than "cpu" unless a GPU is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from streamrepair.engine.memory import CUDA_CONTEXT_BYTES
from streamrepair.errors import UsageError


@contextlib.contextmanager
def own_stream(device: str) -> Iterator[None]:
    """This thread's work goes to `device`, in a stream of its own."""
    if device == "cpu" or not _available():
        yield
        return
    import torch

    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        yield


def cap_memory(gpus: Sequence[str], vram_bytes: int | None) -> None:
    """Let torch take no more of each card than --vram allows: beyond it, it raises as if the card were full."""
    if not gpus or vram_bytes is None or not _available():
        return
    import torch

    for gpu in gpus:
        total = torch.cuda.get_device_properties(torch.device(gpu)).total_memory
        share = max(0.0, vram_bytes - CUDA_CONTEXT_BYTES) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), torch.device(gpu))


def release_memory() -> None:
    """Give back what torch keeps of this thread's card for later."""
    if _available():
        import torch

        torch.cuda.empty_cache()


def unusable(device: str, error: RuntimeError) -> UsageError:
    """What is to be said of a card that torch found and cannot compute on."""
    reason = str(error).partition("\n")[0]
    return UsageError(f"{device} cannot be used ({reason}): free it, or name others with --device, such as cpu")


def _available() -> bool:
    import torch

    return torch.cuda.is_available()
