"""Repairs by the GPU's route, planned for a card and done by torch on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from streamrepair import api
from streamrepair.checkpoint.layout import open_checkpoint
from streamrepair.decompose import lapack
from streamrepair.decompose.device import DeviceArithmetic, arithmetic
from streamrepair.decompose.device.rates import Rates
from streamrepair.decompose.device.spectrum import DeviceVectors
from streamrepair.engine.plan import Plan, make_plan
from streamrepair.engine.run import execute
from streamrepair.engine.stop import StopRequest
from streamrepair.errors import BudgetError, NumericalError, UsageError
from streamrepair.report import Report, Settings
from streamrepair.units import parse_bytes
from tests.decompose.memory_faults import BRIEFLY, MESSAGE
from tests.engine.results import check_result
from tests.pairs import Pair, read_tensors, rounded_share, values, write_pair

SHAPES = {"tall": (5_000, 64), "wide": (64, 5_000), "square": (96, 96), "norm": (64,)}


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return write_pair(tmp_path, SHAPES)


def _plan(pair: Pair, ram_bytes: int) -> Plan:
    return make_plan(
        open_checkpoint(str(pair.base), side="BASE"),
        open_checkpoint(str(pair.ft), side="FT"),
        Settings(),
        devices=("cuda:0",),
        workers=1,
        ram_bytes=ram_bytes,
        vram_bytes=2_000_000_000,
    )


def _repaired(pair: Pair, out: Path, *, ram_bytes: int = 4_000_000_000) -> Report:
    return execute(
        _plan(pair, ram_bytes),
        out,
        stop=StopRequest(),
        watcher=api.Silent(),
        arithmetic=lambda _device, _scratch: DeviceArithmetic("cpu", measured=Rates(1.0, 1.0)),
    )


def _smallest_budget(pair: Pair) -> int:
    """Of the host's memory: panels are one block high."""
    with pytest.raises(BudgetError) as refusal:
        _plan(pair, 1_000_000)
    return parse_bytes(str(refusal.value).rpartition(" ")[2])


@pytest.mark.parametrize("arithmetic", ["device", "both"])
def test_a_device_that_adds_wrongly_is_caught_and_the_cpu_merges(
    arithmetic: str, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the CPU does too, the run fails naming the tensor: nothing of it is passed off as repaired."""
    right = _repaired(pair, tmp_path / "right")
    original = torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda out, *factors: original(out, *factors).mul_(1.1))
    if arithmetic == "both":
        monkeypatch.setattr(lapack, "add_product", lambda *_, **__: None)
        with pytest.raises(NumericalError, match=r"tensor .* where W_base"):
            _repaired(pair, tmp_path / "out")
        return
    report = _repaired(pair, tmp_path / "out")
    check_result(pair, tmp_path / "out", report)
    for name in ("tall", "wide", "square"):
        assert report.tensors[name].climbed[-1].startswith("merge: the result has")
        assert report.tensors[name].rank_kept == right.tensors[name].rank_kept


def test_a_device_that_breaks_for_good_in_a_merge_is_named_with_its_tensor(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives nothing any more: neither to the check of what it merged nor to the CPU in its place."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(DeviceVectors, "__array__", broken)
    with pytest.raises(NumericalError, match=r"^tensor \w+ .*are lost with their device \(CUDA error: an ill[^\n]*\)"):
        _repaired(pair, tmp_path / "out")


def test_a_repair_on_a_device_is_the_textbooks(pair: Pair, tmp_path: Path) -> None:
    report = _repaired(pair, tmp_path / "out")
    check_result(pair, tmp_path / "out", report)
    for name in ("tall", "wide", "square"):
        assert report.tensors[name].backend.startswith("gram-float")
        assert not [reason for reason in report.tensors[name].climbed if not reason.startswith("gram-float32")]
    assert not api.verify(tmp_path / "out").damage


@pytest.mark.parametrize("dtypes", [("F16", "F16"), ("F32", "BF16"), ("F64", "F64")])
def test_other_dtypes(tmp_path: Path, dtypes: tuple[str, str]) -> None:
    pair = write_pair(tmp_path, SHAPES, dtypes=dtypes)
    check_result(pair, tmp_path / "out", _repaired(pair, tmp_path / "out"))


def _no_memory_in_merges(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> list[int]:
    """torch's in-place product fails in float32, which 16-bit merges use and sums in float64 do not."""
    original = torch.Tensor.addmm_
    calls = [0]

    def addmm_(self: torch.Tensor, *arguments: Any, **knobs: Any) -> torch.Tensor:
        if self.dtype == torch.float32:
            calls[0] += 1
            if fails(calls[0]):
                raise torch.OutOfMemoryError(MESSAGE)
        return original(self, *arguments, **knobs)

    monkeypatch.setattr(torch.Tensor, "addmm_", addmm_)
    return calls


@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize("panels", ["whole", "blocks"])
def test_a_merge_without_memory_is_finished_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path, first: int, panels: str
) -> None:
    """From some block of the first matrix on; digests are of what was written."""
    sound = _repaired(pair, tmp_path / "sound")
    _no_memory_in_merges(monkeypatch, lambda call: call >= first)
    ram_bytes = 4_000_000_000 if panels == "whole" else _smallest_budget(pair)
    report = _repaired(pair, tmp_path / "out", ram_bytes=ram_bytes)
    check_result(pair, tmp_path / "out", report)
    assert not api.verify(tmp_path / "out").damage
    left = [name for name, record in report.tensors.items() if f"merge: {BRIEFLY}" in record.climbed]
    assert {"tall", "wide"} <= set(left) <= {"tall", "wide", "square"}  # the smallest may have been done before
    found, before = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "sound")
    for name in ("tall", "wide", "square"):
        assert rounded_share(values(found[name]), values(before[name]), "BF16") >= 0.999
        assert report.tensors[name].rounding_loss == pytest.approx(sound.tensors[name].rounding_loss, rel=1e-3)


def test_memory_that_runs_out_once_is_made_do_with(monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path) -> None:
    calls = _no_memory_in_merges(monkeypatch, lambda call: call == 2)
    report = _repaired(pair, tmp_path / "out")
    assert calls[0] > 2
    check_result(pair, tmp_path / "out", report)
    assert not any("merge" in reason for record in report.tensors.values() for reason in record.climbed)


def test_a_device_without_memory_for_anything(monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path) -> None:
    def no_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError(MESSAGE)

    monkeypatch.setattr(torch, "zeros", no_memory)
    monkeypatch.setattr(torch.Tensor, "addmm_", no_memory)
    report = _repaired(pair, tmp_path / "out")
    check_result(pair, tmp_path / "out", report)
    assert f"gram-float64: {BRIEFLY}" in report.tensors["tall"].climbed


def test_a_card_that_computes_nothing_is_named(monkeypatch: pytest.MonkeyPatch, pair: Pair, tmp_path: Path) -> None:
    """One too new for this torch, or full: the run ends, and does not go to the CPU unasked."""

    def refuse(device: torch.device) -> Rates:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with …")

    monkeypatch.setattr(arithmetic, "rates", refuse)
    with pytest.raises(UsageError, match=r"^cuda:0 cannot be used \(CUDA error: no kernel image .* device\): free it"):
        execute(_plan(pair, 4_000_000_000), tmp_path / "out", stop=StopRequest(), watcher=api.Silent())
