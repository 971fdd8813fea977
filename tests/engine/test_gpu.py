"""What torch is told and asked of a card, with a card made of numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from streamrepair.engine import budget, gpu
from streamrepair.engine.gpu import capped_memory
from streamrepair.engine.memory import CUDA_CONTEXT_BYTES
from streamrepair.errors import UsageError

GB = 1_000_000_000


class Card:
    """80 GB, of which others have 10; of torch's 30 the program uses 20."""

    total, free, reserved, allocated, fraction = 80 * GB, 40 * GB, 30 * GB, 20 * GB, 0.9

    def __init__(self) -> None:
        self.peaks_began = 0

    def empty(self) -> None:
        self.free += self.reserved - self.allocated
        self.reserved = self.allocated

    def limit(self, fraction: float, _: object) -> None:
        self.fraction = fraction

    def begin_peak(self, _: object) -> None:
        self.peaks_began += 1


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()
    told = {
        "is_available": lambda: True,
        "device": lambda _: contextlib.nullcontext(),
        "mem_get_info": lambda _: (card.free, card.total),
        "memory_reserved": lambda _: card.reserved,
        "memory_allocated": lambda _: card.allocated,
        "empty_cache": card.empty,
        "get_device_properties": lambda _: SimpleNamespace(total_memory=card.total),
        "set_per_process_memory_fraction": card.limit,
        "reset_peak_memory_stats": card.begin_peak,
    }
    for name, answer in told.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch.cuda.memory, "get_per_process_memory_fraction", lambda _: card.fraction)
    return card


def test_what_torch_keeps_for_later_is_free(card: Card) -> None:
    assert budget.default_vram_bytes(["cuda:0"]) == int(budget.VRAM_SHARE * 50 * GB)


def test_the_limit_is_for_the_run_alone(card: Card) -> None:
    """Beside what the program holds, and until the end: what it had allowed itself before is put back."""
    with capped_memory(["cuda:0"], 32 * GB):
        assert card.fraction * card.total == pytest.approx(20 * GB + 32 * GB - CUDA_CONTEXT_BYTES)
        assert card.peaks_began == 1
    assert card.fraction == 0.9
    with pytest.raises(KeyError), capped_memory(["cuda:0"], 32 * GB):
        raise KeyError
    assert card.fraction == 0.9


def test_what_torch_keeps_of_a_run_is_let_go_at_its_end(card: Card) -> None:
    """It lies in the pool of the run's stream, where the program's own would not look for it."""
    with capped_memory(["cuda:0"], 32 * GB):
        assert card.reserved == card.allocated
        card.reserved += 5 * GB
    assert card.reserved == card.allocated


def test_of_two_runs_at_once_the_last_puts_the_limit_back(card: Card) -> None:
    """Whichever began first; meanwhile the one with the larger budget has it."""
    small, large = (capped_memory(["cuda:0"], size * GB) for size in (12, 32))

    def allowed() -> float:
        return card.fraction * card.total - 20 * GB + CUDA_CONTEXT_BYTES

    small.__enter__()
    assert allowed() == pytest.approx(12 * GB)
    large.__enter__()
    assert allowed() == pytest.approx(32 * GB)
    small.__exit__(None, None, None)
    assert allowed() == pytest.approx(32 * GB)
    large.__exit__(None, None, None)
    assert card.fraction == 0.9


def test_a_card_that_breaks_during_a_run_does_not_undo_it(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its work was done by the CPU; that the limit cannot be put back is no failure."""

    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with capped_memory(["cuda:0"], 32 * GB):
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", broken)


def test_limits_are_put_back_where_a_further_card_cannot_be_used(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_alone(device: torch.device) -> SimpleNamespace:
        if device.index:
            raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")
        return SimpleNamespace(total_memory=card.total)

    monkeypatch.setattr(torch.cuda, "get_device_properties", one_alone)
    with pytest.raises(UsageError, match=r"^cuda:1 cannot"), capped_memory(["cuda:0", "cuda:1"], 32 * GB):
        pass
    assert card.fraction == 0.9


def test_a_run_allows_itself_no_more_than_the_program_did(card: Card) -> None:
    with capped_memory(["cuda:0"], 100 * GB):
        assert card.fraction == 0.9


def test_no_memory_at_all_is_no_negative_share(card: Card) -> None:
    card.reserved = card.allocated = 0
    with capped_memory(["cuda:0"], 1_000):
        assert card.fraction == 0.0


def test_a_card_that_does_not_answer_is_named(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(_: object) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nmore")

    says = r"^cuda:1 cannot be used \(CUDA error: all .* unavailable\)"
    monkeypatch.setattr(torch.cuda, "mem_get_info", busy)
    with pytest.raises(UsageError, match=says):
        budget.default_vram_bytes(["cuda:1"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", busy)
    with pytest.raises(UsageError, match=says), capped_memory(["cuda:1"], 10 * GB):
        pass


def test_every_run_works_in_the_same_stream(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps a workspace for each one that ever multiplied."""
    seen: list[object] = []

    @contextlib.contextmanager
    def current(stream: object) -> Iterator[None]:
        seen.append(stream)
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: object())
    monkeypatch.setattr(torch.cuda, "stream", current)
    gpu._stream_of.cache_clear()
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        with gpu.own_stream(device):
            pass
    gpu._stream_of.cache_clear()
    assert seen[0] is seen[2] is not seen[1]
