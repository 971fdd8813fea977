"""The devices of a run and what memory was used: --device, the default of --vram, the measured peaks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from streamrepair.engine.gpu import unusable
from streamrepair.errors import UsageError, shown

VRAM_SHARE = 0.9
"""Share of what every card has free which a run may take when --vram is not given."""


def resolve_devices(text: str, *, absent: bool = False) -> tuple[str, ...]:
    """ "cpu" and CUDA devices from what the user asked for: "auto", "cpu", "cuda" (all cards), "cuda:0,cuda:1,cpu".

    Args:
        absent: whether cards that are named need not be here.

    Raises:
        UsageError: no such device here.
    """
    words = [word.strip() for word in text.split(",")] if isinstance(text, str) else [""]
    if set(words) == {"cpu"} or (words == ["auto"] and (not _driver_present() or _cards_are_out_of_reach())):
        return ("cpu",)  # without loading torch to be told so: a CPU's projection has no room for it
    for word in words:
        name, colon, index = word.partition(":")
        understood = word == "cpu" or (name == "cuda" and (not colon or (index.isascii() and index.isdigit())))
        if not understood and words != ["auto"]:
            raise UsageError(
                f"--device {shown(repr(text))} is not understood: use auto, cpu, cuda, or a list such as cuda:0,cuda:1"
            )
    named = absent and words != ["auto"]
    cards = 0 if named else _cards()
    if words == ["auto"]:
        return tuple(f"cuda:{i}" for i in range(cards)) or ("cpu",)
    found: list[str] = []
    for word in words:
        _, _, index = word.partition(":")
        numbers = [int(index)] if index else list(range(max(1, cards)))
        found += ["cpu"] if word == "cpu" else [f"cuda:{number}" for number in numbers]
        if word != "cpu" and numbers[-1] >= cards and not named:
            raise UsageError(f"--device {word}: this machine has {cards} CUDA devices that torch can use")
    return tuple(dict.fromkeys(found))


def _cards() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _driver_present() -> bool:
    return Path("/proc/driver/nvidia").exists() or any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def _cards_are_out_of_reach() -> bool:
    """Whether torch would find no card, whatever there is: all are hidden from it, or it was built for CPUs."""
    from importlib import metadata

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip()
    if not visible or visible.startswith("-"):  # the list ends at the first number that is none
        return True
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("torch").endswith("+cpu")
    return False


def default_vram_bytes(gpus: Sequence[str]) -> int:
    """VRAM_SHARE of what the card with the least free memory has free, what torch keeps for later included.

    Raises:
        UsageError: a card cannot be used.
    """
    return int(VRAM_SHARE * min(map(_free_bytes, gpus)))


def _free_bytes(gpu: str) -> int:
    import torch

    card = torch.device(gpu)
    try:
        free = torch.cuda.mem_get_info(card)[0]
    except RuntimeError as error:
        raise unusable(gpu, error) from error
    return int(free + torch.cuda.memory_reserved(card) - torch.cuda.memory_allocated(card))


def reset_peak() -> None:
    """Let the measured peak start from now (Linux keeps one high-water mark per process)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_bytes() -> int:
    """The process's resident memory now (VmRSS); 0 where that cannot be told."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def peak_bytes() -> int:
    """The process's peak resident memory (VmHWM)."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_peak_bytes(gpus: Sequence[str]) -> int | None:
    """The largest peak of device memory that torch reserved on any card; None without one."""
    if not gpus:
        return None
    import torch

    if not torch.cuda.is_available():
        return None  # the work was done by a stand-in
    return max(int(torch.cuda.max_memory_reserved(torch.device(gpu))) for gpu in gpus)
