"""Blocks on their way to a device and back: pinned buffers, streams of their own, so that copies and products overlap.

Blocks cross the bus as stored, half the bytes of float32, and are widened on the device. A copy from ordinary memory
would make the host wait for the device; one from pinned memory is queued. The host therefore runs ahead: it fills one
buffer while another crosses and a third is computed on, and waits only when a buffer it needs is still crossing.

On torch's "cpu" device streams and events exist and do nothing, so that the same steps run there, one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamrepair.decompose.convert import STORED_TYPE, Doubles, Raw
from streamrepair.decompose.device.faults import no_memory
from streamrepair.decompose.operator import Panel

TORCH_TYPE = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

_UPLOAD_SLOTS = 4
"""Two blocks of two sides: one computed on, one crossing."""
_DOWNLOAD_SLOTS = 2
"""One handed to the caller, one crossing."""
_MOST_PIECES = 256
"""Of a block that does not fit whole: then a few hundred kilobytes are missing, and the CPU will do."""


class _Slot:
    """A pinned buffer, perhaps its twin on the device, and how far the copy between them is."""

    def __init__(self, device: torch.device) -> None:
        self._place = device
        self.host = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.twin = torch.empty(0, dtype=torch.uint8, device=device)
        self.copied = _streams(device).Event()
        self.consumed = _streams(device).Event()

    def grow(self, nbytes: int, *, twin_on: Any = None) -> None:
        """At least so many bytes; contents are lost. With a twin if it is said on which stream it will be written."""
        if len(self.host) >= nbytes:
            return
        self.let_go()
        if twin_on is not None:
            self.twin = torch.empty(nbytes, dtype=torch.uint8, device=self._place)
            _used_on(twin_on, self.twin)
            twin_on.wait_stream(_current(self._place))  # where whoever had this memory before may still be at work
        self.host = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=self._place.type == "cuda")

    def let_go(self) -> None:
        """Hold nothing any more."""
        if len(self.host) and self._place.type == "cuda":
            torch.cuda.synchronize(self._place)  # another stream may still be at it
        self.host = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.twin = torch.empty(0, dtype=torch.uint8, device=self._place)


class Upload:
    """Stored numbers to the device.

    Args:
        device: a CUDA device or "cpu".
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = _stream(device)
        self._slots = [_Slot(device) for _ in range(_UPLOAD_SLOTS)]
        self._next = 0
        self._pieces = 1

    def delta(self, block: Panel, out: Tensor) -> Tensor:
        """`out` ← Δ of a block as stored (of its shape), subtracted in the dtype of `out`, or in float64 if a side is.

        Raises:
            torch.OutOfMemoryError: the device has no memory, not even for a small piece.
        """
        self._in_pieces(len(block.ft), lambda rows: self._subtract(block, rows, out[rows]))
        return out

    def base(self, block: Panel, out: Tensor) -> Tensor:
        """`out` ← W_base of a block as stored, exactly.

        Raises:
            torch.OutOfMemoryError: likewise.
        """
        self._in_pieces(len(block.base), lambda rows: self._widen(block.base[rows], block.base_dtype, out[rows]))
        return out

    def _in_pieces(self, rows: int, step: Callable[[slice], None]) -> None:
        """`step` on all rows; in smaller and smaller pieces, here and from now on, where memory runs out.

        What arrives is the same: sums are formed of whole blocks.
        """
        start = 0
        while start < rows:
            height = -(-rows // self._pieces)
            piece = slice(start, min(rows, start + height))
            if _fits(step, piece, last=height == 1 or self._pieces >= _MOST_PIECES):
                start = piece.stop
                continue
            self._pieces *= 4
            for slot in self._slots:
                slot.let_go()

    def _subtract(self, block: Panel, rows: slice, out: Tensor) -> None:
        wider = "F64" in (block.ft_dtype, block.base_dtype) and out.dtype != torch.float64
        work = torch.empty(out.shape, dtype=torch.float64, device=self.device) if wider else out
        self._widen(block.ft[rows], block.ft_dtype, work)
        slot, stored = self._cross(block.base[rows], block.base_dtype)
        work.sub_(stored)  # widened as it is read, exactly
        slot.consumed.record(_current(self.device))
        if wider:
            out.copy_(work)

    def _widen(self, raw: Raw, dtype: str, out: Tensor) -> None:
        slot, stored = self._cross(raw, dtype)
        out.copy_(stored)
        slot.consumed.record(_current(self.device))

    def _cross(self, raw: Raw, dtype: str) -> tuple[_Slot, Tensor]:
        """Stored numbers on the device, for work queued on the current stream until the slot is marked consumed."""
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        slot.copied.synchronize()
        slot.grow(raw.nbytes, twin_on=self._stream)
        _fill(slot.host[: raw.nbytes], raw)
        twin = slot.twin[: raw.nbytes]
        self._stream.wait_event(slot.consumed)
        with _streams(self.device).stream(self._stream):
            twin.copy_(slot.host[: raw.nbytes], non_blocking=True)
        slot.copied.record(self._stream)
        _current(self.device).wait_event(slot.copied)
        return slot, twin.view(TORCH_TYPE[dtype]).view(raw.shape)


@dataclass(frozen=True, slots=True)
class Crossing:
    """A result on its way to the host."""

    source: Tensor
    """Held until it has crossed."""
    host: Tensor
    copied: Any
    """The event of its arrival."""
    kind: np.dtype[Any]

    def arrived(self) -> Raw:
        """Wait for it; the array is valid until the next but one result is sent."""
        self.copied.synchronize()
        raw: Raw = self.host.numpy().view(self.kind).reshape(tuple(self.source.shape))
        return raw


class Download:
    """Results to the host, one crossing while the one before is used."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream(device)
        self._slots = [_Slot(device) for _ in range(_DOWNLOAD_SLOTS)]
        self._next = 0

    def send(self, values: Tensor, out_dtype: str) -> Crossing:
        """Queue the copy of contiguous `values`, stored as `out_dtype`."""
        slot = self._slots[self._next]
        stored = values.view(-1).view(torch.uint8)
        slot.grow(len(stored))
        host = slot.host[: len(stored)]
        self._stream.wait_stream(_current(self._device))
        with _streams(self._device).stream(self._stream):
            host.copy_(stored, non_blocking=True)
        slot.copied.record(self._stream)
        _used_on(self._stream, values)
        self._next = (self._next + 1) % len(self._slots)  # only now: a result on its way is never overwritten
        return Crossing(values, host, slot.copied, np.dtype(STORED_TYPE[out_dtype]))


def to_device(array: Doubles, device: torch.device) -> Tensor:
    """A float64 array on the device, as a copy."""
    tensor = torch.empty(array.shape, dtype=torch.float64, device="cpu")  # whatever the program's default
    tensor.numpy()[...] = array
    return tensor.to(device)


def _fits(step: Callable[[slice], None], piece: slice, *, last: bool) -> bool:
    """Do a step; False if memory ran out. The error is gone on return, and with it what its traceback holds."""
    try:
        step(piece)
    except RuntimeError as error:
        if last or not no_memory(error):
            raise
        return False
    return True


def _fill(host: Tensor, raw: Raw) -> None:
    """host ← the bytes of `raw` in C order: on torch's threads, or by NumPy, since torch warns of a read-only array."""
    bits = np.dtype(f"i{raw.itemsize}")
    if raw.flags.writeable:
        host.view(_BITS[raw.itemsize]).view(raw.shape).copy_(torch.from_numpy(raw.view(bits)))
    else:
        np.copyto(host.numpy().view(raw.dtype).reshape(raw.shape), raw)


def _streams(device: torch.device) -> Any:
    """Where torch keeps Stream, Event and stream() for such a device."""
    return torch.cuda if device.type == "cuda" else torch.cpu


def _stream(device: torch.device) -> Any:
    """A stream for copies.

    torch deals its 32 streams of each priority out in turn: one of the common priority could be the computing one.
    """
    if device.type == "cuda":
        return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
    return torch.cpu.Stream()


def _current(device: torch.device) -> Any:
    return _streams(device).current_stream(device)


def _used_on(stream: Any, tensor: Tensor) -> None:
    """Keep the tensor's memory from others until the stream is done with it, even if an error lets go of it early."""
    if tensor.device.type == "cuda":
        tensor.record_stream(stream)
