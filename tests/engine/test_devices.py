"""Several devices at work, without one: each "GPU" is torch on the CPU behind the same seam; cards that are full."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from streamrepair.api import Silent
from streamrepair.checkpoint.layout import open_checkpoint
from streamrepair.decompose.arithmetic import Arithmetic, Gram, Merger, Precision, Vectors
from streamrepair.decompose.convert import Doubles
from streamrepair.decompose.device import DeviceArithmetic
from streamrepair.decompose.operator import PanelSource
from streamrepair.decompose.scratch import Scratch
from streamrepair.engine import budget
from streamrepair.engine.plan import Plan, make_plan
from streamrepair.engine.run import execute
from streamrepair.engine.stop import StopRequest
from streamrepair.errors import BudgetError, NumericalError, UsageError
from streamrepair.report import Report, Settings
from tests.pairs import Pair, read_tensors, shard_bytes, values, write_pair

SHAPES = {"tall": (700, 300), "wide": (200, 500), "square": (256, 256), "norm": (300,), "small": (64, 48)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("devices"), SHAPES, shards=(1, 2))


def planned(
    pair: Pair, devices: tuple[str, ...], *, ram: int = 8_000_000_000, vram: int = 2_000_000_000, scale: float = 1.0
) -> Plan:
    return make_plan(
        open_checkpoint(str(pair.base), side="BASE"),
        open_checkpoint(str(pair.ft), side="FT"),
        Settings(scale=scale),
        devices=devices,
        workers=2,
        ram_bytes=ram,
        vram_bytes=vram if devices != ("cpu",) else None,
    )


class Seen:
    """Hands out arithmetics and remembers for which devices."""

    def __init__(self, make: Callable[[], Arithmetic] = lambda: DeviceArithmetic("cpu")) -> None:
        self._make = make
        self.devices: list[str] = []

    def __call__(self, device: str, scratch: Scratch) -> Arithmetic:
        from streamrepair.decompose.host import HostArithmetic

        self.devices.append(device)
        return HostArithmetic(scratch) if device == "cpu" else self._make()


def run(plan: Plan, out: Path, seen: Seen | None = None, trace: Path | None = None) -> Report:
    return execute(plan, out, stop=StopRequest(), watcher=Silent(), arithmetic=seen or Seen(), trace=trace)


def test_numbers_do_not_depend_on_how_many_gpus_there_are(pair: Pair, tmp_path: Path) -> None:
    seen = Seen()
    run(planned(pair, ("cuda:0",)), tmp_path / "one")
    report = run(planned(pair, ("cuda:0", "cuda:1", "cuda:2")), tmp_path / "three", seen)
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "three")
    assert set(seen.devices) <= {"cuda:0", "cuda:1", "cuda:2"}
    assert len(seen.devices) == 4
    assert report.device == "cuda:0,cuda:1,cuda:2"
    assert [use.name for use in report.utilisation] == ["cuda:0", "cuda:1", "cuda:2", "cpu 0", "files"]


def test_beside_a_gpu_the_cpu_takes_copies_and_if_named_small_matrices(pair: Pair, tmp_path: Path) -> None:
    alone, both = planned(pair, ("cuda:0",)), planned(pair, ("cuda:0", "cpu"))
    assert {t.name: t.place for t in alone.tasks if t.shape} == dict.fromkeys(SHAPES.keys() - {"norm"}, "cuda")
    assert {t.place for t in alone.tasks if not t.shape} == {"cpu"}
    assert {t.name for t in both.tasks if t.place == "cpu"} == SHAPES.keys()  # all of them are small
    seen = Seen()
    run(both, tmp_path / "out", seen)
    assert set(seen.devices) == {"cpu"}


def test_what_no_gpu_holds_is_refused_or_goes_to_the_cpu_if_that_was_named(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {"large": (2207, 2203)})
    with pytest.raises(
        BudgetError, match=r"large .*--vram allows 1\.2 GB.* --vram \d+MB, or let the CPU do the work: --device cpu"
    ):
        planned(pair, ("cuda:0",), vram=1_200_000_000)
    assert [t.place for t in planned(pair, ("cuda:0", "cpu"), vram=1_200_000_000).tasks] == ["cpu"]
    assert [t.place for t in planned(pair, ("cuda:0", "cpu"), vram=4_000_000_000).tasks] == ["cuda"]


class Full:
    """A card that another process filled: every step fails that has more than so many elements of a block.

    Args:
        inner: what does the work otherwise. most_elements: of one block. everything: nothing works at all.
    """

    precisions: tuple[Precision, ...] = ("float64",)

    def __init__(self, inner: Arithmetic, *, most_elements: int) -> None:
        self._inner, self._most = inner, most_elements
        self.refused = 0

    def _check(self, elements: int) -> None:
        if elements > self._most:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    def gram(self, source: PanelSource, probes: Doubles, precision: Precision) -> Gram:
        for panel in source.panels():
            for block in panel.blocks():
                self._check(block.ft.size)
        return self._inner.gram(source, probes, precision)

    def triangular_factor(self, source: PanelSource) -> Doubles:
        self._check(1 << 60)
        return self._inner.triangular_factor(source)

    def svd(self, matrix: Doubles, driver: str) -> tuple[Doubles, Doubles, Doubles]:
        return self._inner.svd(matrix, driver)

    def merger(self, vh: Vectors, out_dtype: str) -> Merger:
        return self._inner.merger(vh, out_dtype)  # sees to its memory itself: tests/decompose/test_device_memory


def _full_run(
    pair: Pair, out: Path, most_elements: int, *, ram: int = 8_000_000_000, scale: float = 1.0
) -> tuple[Report, int]:
    card = Full(DeviceArithmetic("cpu"), most_elements=most_elements)
    return run(planned(pair, ("cuda:0",), ram=ram, scale=scale), out, Seen(lambda: card)), card.refused


def test_a_full_card_is_met_with_smaller_pieces(pair: Pair, tmp_path: Path) -> None:
    """Down to a sixteenth of a block; sums over smaller pieces may change a last bit."""
    run(planned(pair, ("cuda:0",)), tmp_path / "easy")
    report, refused = _full_run(pair, tmp_path / "tight", 300 * 300)
    assert refused > 0
    assert {r.backend for r in report.tensors.values() if r.action == "repaired"} == {"gram-float64"}
    easy, tight = read_tensors(tmp_path / "easy"), read_tensors(tmp_path / "tight")
    for name in SHAPES:
        np.testing.assert_allclose(values(tight[name]), values(easy[name]), rtol=2**-7, atol=1e-6)
        assert np.mean(values(tight[name]) != values(easy[name])) < 1e-3


def test_a_card_without_any_memory_hands_its_work_to_the_cpu(pair: Pair, tmp_path: Path) -> None:
    before = run(planned(pair, ("cuda:0",)), tmp_path / "easy")
    report, _ = _full_run(pair, tmp_path / "none", 0)
    repaired = [r for r in report.tensors.values() if r.action == "repaired"]
    assert {r.backend for r in repaired} == {"gram-float64"}  # the CPU's
    assert len(repaired) == 4
    assert all("out of memory" in r.climbed[0] for r in repaired)
    # Another device's sums: the same ranks, and values that are at most neighbours in bfloat16.
    easy, none = read_tensors(tmp_path / "easy"), read_tensors(tmp_path / "none")
    for name in SHAPES:
        assert report.tensors[name].rank_kept == before.tensors[name].rank_kept
        np.testing.assert_allclose(values(none[name]), values(easy[name]), rtol=2**-7, atol=1e-6)
        assert np.mean(values(none[name]) != values(easy[name])) < 1e-3


def test_where_the_cpu_has_no_room_either_the_run_fails_naming_the_tensor(tmp_path: Path) -> None:
    """--ram is kept: the CPU's part reserves its bytes before it starts, and here there are none.

    At scale 0.3 most of the rank may be kept: then the CPU needs more than the card's pinned buffers take.
    """
    pair = write_pair(tmp_path, {"large": (1500, 1500)})
    with pytest.raises(BudgetError) as refused:
        planned(pair, ("cuda:0",), ram=1_000_000, scale=0.3)
    least = int(str(refused.value).rpartition(" ")[2].removesuffix("MB")) * 1_000_000
    with pytest.raises(NumericalError, match=r"tensor large .*out of memory.*--ram has no room for"):
        _full_run(pair, tmp_path / "out", 0, ram=least, scale=0.3)
    report, _ = _full_run(pair, tmp_path / "out", 0, ram=least + 400_000_000, scale=0.3)
    assert report.tensors["large"].action == "repaired"


def test_other_errors_of_a_device_are_not_taken_for_a_full_card(pair: Pair, tmp_path: Path) -> None:
    class Broken(Full):
        def _check(self, elements: int) -> None:
            self.refused += elements > 0
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    card = Broken(DeviceArithmetic("cpu"), most_elements=0)
    report = run(planned(pair, ("cuda:0",)), tmp_path / "out", Seen(lambda: card))
    reasons = [r.climbed[0] for r in report.tensors.values() if r.action == "repaired"]
    assert all("illegal memory access" in reason for reason in reasons)
    assert card.refused == 4  # once for the sums of each matrix: no smaller pieces


@pytest.mark.parametrize("text", ["cuda:x", "gpu", "cpu,tpu", "cuda:0,,", "auto,cpu", ""])
def test_devices_that_are_not_understood(text: str) -> None:
    with pytest.raises(UsageError, match=r"--device .* is not understood"):
        budget.resolve_devices(text)


def test_no_test_sees_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that has one they would hold its budgets and its last bits against the CPU's."""
    monkeypatch.setattr(budget, "_driver_present", lambda: True)
    assert not torch.cuda.is_available()
    assert budget.resolve_devices("auto") == ("cpu",)


@pytest.mark.parametrize("text", ["cuda", "cuda:0", "cuda:0,cuda:1", "cpu,cuda"])
def test_devices_that_are_not_here(text: str) -> None:
    with pytest.raises(UsageError, match="this machine has 0 CUDA devices"):
        budget.resolve_devices(text)


def test_the_trace_is_of_chromes_format(pair: Pair, tmp_path: Path) -> None:
    """Every event has what the format asks for; the spans of one track nest; every task is there."""
    trace = tmp_path / "trace.json"
    report = run(planned(pair, ("cuda:0", "cuda:1")), tmp_path / "out", trace=trace)
    content = json.loads(trace.read_text())
    assert set(content) == {"traceEvents", "displayTimeUnit"}
    events = content["traceEvents"]
    names: dict[int, str] = {}
    spans: dict[int, list[tuple[float, float]]] = {}
    for event in events:
        assert {"name", "ph", "pid", "tid"} <= event.keys()
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event["ph"] in ("X", "M")
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name", "thread_sort_index")
            if event["name"] == "thread_name":
                names[event["tid"]] = event["args"]["name"]
        else:
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            spans.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    assert set(names.values()) >= {"cuda:0", "cuda:1", "cpu 0", "cuda:0 reader", "commits"}
    assert spans.keys() <= names.keys()
    for track in spans.values():
        for start, stop in track:
            for other_start, other_stop in track:
                disjoint = stop <= other_start + 0.002 or other_stop <= start + 0.002
                inside = start - 0.002 <= other_start and other_stop <= stop + 0.002
                around = other_start - 0.002 <= start and stop <= other_stop + 0.002
                assert disjoint or inside or around
    done = {event["name"] for event in events if event.get("cat") == "task"}
    assert done == report.tensors.keys()


class _TakesTheFolderAway(Silent):
    """A watcher under whom a folder vanishes once the work has begun."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.warnings: list[str] = []

    def begin(self, plan: Plan, done_bytes: int) -> None:  # noqa: ARG002 – the protocol's
        self._folder.rmdir()

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def test_a_trace_that_cannot_be_written_in_the_end_is_a_warning(pair: Pair, tmp_path: Path) -> None:
    """Hours of work do not fail for it."""
    folder = tmp_path / "traces"
    folder.mkdir()
    watcher = _TakesTheFolderAway(folder)
    plan = planned(pair, ("cpu",))
    report = execute(plan, tmp_path / "out", stop=StopRequest(), watcher=watcher, trace=folder / "trace.json")
    assert report.tensors.keys() == SHAPES.keys()
    assert any(message.startswith("no trace: ") for message in watcher.warnings)


def test_the_account_of_every_lane_adds_up(pair: Pair, tmp_path: Path) -> None:
    report = run(planned(pair, ("cuda:0", "cuda:1")), tmp_path / "out")
    for use in report.utilisation:
        total = use.busy_s + use.idle_s + sum(use.waiting_s.values())
        assert total == pytest.approx(report.timings.wall_s, rel=0.02, abs=0.01)
    assert sum(use.busy_s for use in report.utilisation[:2]) > 0
    assert 0 < report.utilisation[-1].busy_s <= report.timings.wall_s
    assert report.timings.cpu_s > 0
    assert np.isfinite(report.timings.cpu_s)
