"""A worker as its task sees it: a device, working memory, a lane of the timeline, a share of the ledger."""

from __future__ import annotations

from dataclasses import dataclass, field

from streamrepair.checkpoint import direct
from streamrepair.decompose.halves import Both, in_turn
from streamrepair.decompose.scratch import Scratch
from streamrepair.engine.lanes import Place
from streamrepair.engine.ledger import Ledger
from streamrepair.engine.timeline import Lane


class Pieces:
    """A buffer for a piece of each side, kept from tensor to tensor: fresh memory costs as much as the copying."""

    def __init__(self) -> None:
        self._of_base, self._of_ft = bytearray(), memoryview(b"")

    def of(self, nbytes: int) -> tuple[bytearray, memoryview]:
        """One of at least `nbytes` for BASE, and one for FT that begins at a page of memory and is a page longer."""
        if len(self._of_base) < nbytes:
            self._of_base, self._of_ft = bytearray(nbytes), direct.page_aligned(nbytes + direct.PAGE_BYTES)
        return self._of_base, self._of_ft


@dataclass(frozen=True, slots=True)
class Worker:
    """A thread that runs tasks on one device."""

    number: int
    device: str
    scratch: Scratch
    lane: Lane
    ledger: Ledger
    peers: int
    """Workers that take tasks from the same queue, this one included."""
    both: Both = in_turn
    """Does two pieces of work on a large matrix."""
    pieces: Pieces = field(default_factory=Pieces)

    @property
    def place(self) -> Place:
        """Which tasks it takes."""
        return "cpu" if self.device == "cpu" else "cuda"

    def grow(self, more_bytes: int) -> bool:
        """Reserve more for the task in hand; False if it cannot be had."""
        with self.lane.waiting_for_more():
            return self.ledger.grow(self.number, more_bytes)
