"""Who is decided together, and what that needs: from shapes alone, and never at the price of a pair that fits."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from streamrepair import api
from streamrepair.checkpoint.layout import open_checkpoint
from streamrepair.decompose.arithmetic import Precision
from streamrepair.decompose.batched import truncate_batch
from streamrepair.decompose.choose import MOST_BATCHED_COLUMNS
from streamrepair.decompose.device import DeviceArithmetic
from streamrepair.decompose.device.rates import Rates
from streamrepair.engine import batches, cost, memory, schedule
from streamrepair.engine.admission import Admission
from streamrepair.engine.batches import Batch
from streamrepair.engine.fit import full_budget, full_fits
from streamrepair.engine.memory import MatrixShape
from streamrepair.engine.plan import Plan, Task, Unit, make_plan
from streamrepair.engine.run import execute
from streamrepair.engine.simulate import Simulation
from streamrepair.engine.stop import StopRequest
from streamrepair.errors import BudgetError
from streamrepair.report import Settings
from streamrepair.spectral.threshold import HardThreshold
from streamrepair.units import parse_bytes
from streamrepair.views import groups, plan_view
from tests.decompose.sources import fine_tuned, from_delta
from tests.engine.tasks import bf16_task
from tests.engine.test_memory import _delta, half_kept
from tests.pairs import Pair, write_pair

PLENTY = 10**13
EVEN = Rates(1.0, 1.0)


def small(name: str, shape: tuple[int, int] = (96, 64), *, shard: int = 0) -> Task:
    task = bf16_task(name, shape, shard=shard, place="cuda")
    assert task.shape is not None
    return replace(task, panel_rows=task.shape.rows)


def formed(tasks: Sequence[Task]) -> list[Unit]:
    return batches.formed(tasks, lambda _: True)


def names(units: Sequence[Unit]) -> list[list[str]]:
    return [[task.name for task in unit.tasks] for unit in units]


def test_alike_are_those_of_one_shape_and_shard_in_either_orientation() -> None:
    tasks = [small("a"), small("wide", (64, 96)), small("b", shard=1), small("tall", (97, 64)), small("c")]
    tasks += [bf16_task("vector", (64,)), small("d", shard=1)]
    assert names(formed(tasks)) == [["a", "wide", "c"], ["b", "d"], ["tall"], ["vector"]]
    assert isinstance(formed(tasks)[0], Batch)
    assert formed(tasks)[2] is tasks[3]


def test_what_keeps_a_gpu_busy_is_no_gpus_or_is_read_in_pieces_stays_single() -> None:
    wide = MOST_BATCHED_COLUMNS
    for odd in (
        bf16_task("x", (96, 64)),
        replace(small("x"), backend="full"),
        replace(small("x", (5000, 64)), panel_rows=2048),
        small("x", (wide + 1, wide + 1)),
    ):
        pair = [odd, replace(odd)]
        assert formed(pair) == pair
    assert len(formed([small("x", (wide, wide)), small("y", (wide, wide))])) == 1


def test_parts_are_even() -> None:
    """Not 32 and one: several GPUs then have something to share."""
    units = formed([small(f"{i}") for i in range(33)])
    assert [len(unit.tasks) for unit in units] == [16, 17]
    assert names(units) == [[str(i) for i in range(16)], [str(i) for i in range(16, 33)]]


def test_those_that_the_budgets_do_not_hold_stay_single() -> None:
    tasks = [small(f"{i} {shape}", shape) for i in range(3) for shape in ((96, 64), (128, 64))]
    units = batches.formed(tasks, lambda batch: batch.shape.rows == 96)
    assert sorted(len(unit.tasks) for unit in units) == [1, 1, 1, 3]


SIDES = st.sampled_from([16, 64, 200, 512, 1000, 1024, 1100])


@settings(max_examples=60, deadline=None)
@given(shapes=st.lists(st.tuples(SIDES, SIDES, st.integers(0, 2)), max_size=80))
def test_every_task_is_in_one_unit_and_no_batch_is_large(shapes: list[tuple[int, int, int]]) -> None:
    tasks = [small(str(i), (m, n), shard=shard) for i, (m, n, shard) in enumerate(shapes)]
    units = formed(tasks)
    assert sorted(task.name for unit in units for task in unit.tasks) == sorted(task.name for task in tasks)
    for unit in units:
        if isinstance(unit, Batch):
            assert {(task.shape, task.shard) for task in unit.tasks} == {(unit.shape, unit.shard)}
            assert 2 <= len(unit.tasks) <= batches.MOST_MEMBERS
            assert sum(task.read_once_bytes for task in unit.tasks) <= batches.MOST_HOST_BYTES
            assert unit.vram_bytes - unit.tasks[0].vram_bytes <= batches.MOST_DEVICE_BYTES
    singles = {(unit.tasks[0].shape, unit.shard) for unit in units if not isinstance(unit, Batch)}
    assert len([unit for unit in units if unit.tasks[0].shape.cols <= 64 and len(unit.tasks) == 1]) <= len(singles)  # type: ignore[union-attr]


# Budgets


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    shapes = {f"w{i}": (431, 397) for i in range(9)} | {"norm": (64,), "head": (1009, 97)}
    return write_pair(tmp_path_factory.mktemp("batches"), shapes, shards=(1, 1))


def planned(pair: Pair, *, ram: int = 8_000_000_000, vram: int = 4_000_000_000, gpus: int = 1) -> Plan:
    return make_plan(
        open_checkpoint(str(pair.base), side="BASE"),
        open_checkpoint(str(pair.ft), side="FT"),
        Settings(),
        devices=[f"cuda:{i}" for i in range(gpus)],
        workers=1,
        ram_bytes=ram,
        vram_bytes=vram,
    )


def _least(pair: Pair, **budget: int) -> int:
    with pytest.raises(BudgetError) as refused:
        planned(pair, **budget)
    return parse_bytes(str(refused.value).partition("smallest budget that works is ")[2].split()[1].rstrip(","))


@pytest.mark.parametrize("which", ["ram", "vram"])
def test_batches_refuse_no_pair(pair: Pair, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    """The smallest budget is what it is without batches, and works; where they fit, they are there."""
    least = _least(pair, **{which: 1_000_000})
    with monkeypatch.context() as patch:
        patch.setattr(batches, "is_small", lambda _task: False)
        assert _least(pair, **{which: 1_000_000}) == least
    assert planned(pair, **{which: least}).batches == []
    (batch,) = planned(pair).batches
    need = {"ram": memory.batch_bytes(batch.shape, 9), "vram": memory.batch_device_bytes(batch.shape, 9)}[which]
    plan = planned(pair, **{which: least + need + 1_000_000})
    assert [len(batch.tasks) for batch in plan.batches] == [9]


def test_where_they_fit_they_are_the_same_whatever_the_budgets_and_devices(pair: Pair) -> None:
    def composed(**options: int) -> list[list[str]]:
        return sorted(names(planned(pair, **options).batches))

    assert composed() == [[f"w{i}" for i in range(9)]]
    assert composed(ram=100_000_000_000, vram=80_000_000_000) == composed(gpus=4) == composed()


def test_a_plan_projects_its_batches(pair: Pair) -> None:
    plan = planned(pair)
    (batch,) = plan.batches
    member = batch.tasks[0]
    assert batch.ram_bytes == member.ram_bytes + 8 * 4 * 431 * 397
    assert batch.vram_bytes == member.vram_bytes + 8 * (40 * 397**2 + 8 * 431 * 397)
    assert plan.vram_projected_bytes == memory.card_bytes(batch.vram_bytes)
    assert (
        plan.ram_unhindered_bytes
        == memory.run_bytes(2, records_bytes=memory.records_bytes(11), gpus=1) + batch.ram_bytes + memory.copy_bytes()
    )


def test_the_ledger_reserves_a_batch_as_a_whole(pair: Pair) -> None:
    plan = planned(pair)
    (batch,) = plan.batches
    state = Admission.of(plan.units, batch.ram_bytes)
    first = state.take(0, "cuda")
    assert first is batch
    assert state.free_bytes == 0
    assert state.take(1, "cpu") is None
    state.give_back(0)
    assert state.free_bytes == batch.ram_bytes


def test_beside_a_member_that_climbs_are_the_other_pairs(pair: Pair) -> None:
    """The float64 SVD of one fits only where the pairs of all do, too."""
    plan = planned(pair)
    (batch,) = plan.batches
    task = batch.tasks[3]
    assert task.shape is not None
    fixed = (
        memory.run_bytes(2, records_bytes=memory.records_bytes(11), gpus=1) + batch.ram_bytes
    )  # as if another worker had the neediest unit
    need = memory.repair_bytes(task.shape, "full", task.shape.block) + 8 * memory.pair_bytes(task.shape)
    for ram, fits in ((fixed + need, True), (fixed + need - 1, False)):
        assert full_fits(replace(plan, ram_allowed_bytes=ram))[task.name] == fits
    alone = next(other for other in plan.tasks if other.name == "head")
    assert full_budget(plan, task) - full_budget(plan, alone) == need - memory.repair_bytes(
        alone.shape,
        "full",
        alone.shape.block,  # type: ignore[arg-type, union-attr]
    )


# Time


def test_a_batch_takes_less_than_its_members_and_more_than_one() -> None:
    tasks = [small(f"{i}", (512, 512)) for i in range(8)]
    (batch,) = formed(tasks)
    together, alone = cost.seconds(batch, "cuda"), sum(cost.seconds(task, "cuda") for task in tasks)
    assert cost.seconds(tasks[0], "cuda") < together < 0.5 * alone
    assert alone - together == pytest.approx(7 * (1 - cost.BATCH_START) * cost.CUDA.start_s)


def test_a_batch_is_one_piece_of_work_on_one_gpu() -> None:
    """Units are simulated and ordered as they are run: two batches on two GPUs end in the time of one."""
    tasks = [small(f"{i}", (512, 512)) for i in range(64)]
    units = formed(tasks)
    assert [len(unit.tasks) for unit in units] == [32, 32]
    lanes = ["cuda:0", "cuda:1"]
    result = Simulation(schedule.order(units, lanes), lanes, PLENTY, disk_bytes_per_s=1e15).run()
    assert result.makespan_s == pytest.approx(cost.seconds(units[0], "cuda"), rel=1e-3)
    assert {span.name for span in result.spans if span.kind == "compute"} == {"0 and 31 alike", "32 and 31 alike"}
    assert cost.estimate_s(units, lanes, PLENTY) < 0.5 * cost.estimate_s(tasks, lanes, PLENTY)


def test_a_plan_tells_of_batches(pair: Pair) -> None:
    plan = planned(pair)
    view: Any = plan_view(plan)
    (batch,) = view["batches"]
    assert batch["tensors"] == [f"w{i}" for i in range(9)]
    assert batch["ram_bytes"] == plan.batches[0].ram_bytes
    assert [view["tensors"][name]["batch"] for name in ("w3", "head")] == [9, 1]
    assert "batch" not in view["tensors"]["norm"]
    assert sum(view["tensors"][f"w{i}"]["seconds"] for i in range(9)) == pytest.approx(batch["seconds"], rel=1e-3)
    (group,) = (group for group in groups(plan) if group.batch > 1)
    assert (group.treatment, group.count, group.batch) == ("repair, gram, on GPU in batches", 9, 9)
    assert group.ram_bytes == batch["ram_bytes"]
    on_cpu: Any = plan_view(api.plan(pair.base, pair.ft, ram="4GB"))
    assert on_cpu["batches"] == []


# Memory


def _device_peak(count: int, shape: tuple[int, int], absent: int, precision: Precision) -> int:
    """What torch's allocator holds at most while a batch is decided, with nearly half of every spectrum kept."""
    sources = [fine_tuned(_delta(shape, shape[1] // 2 - 2, i), "BF16") for i in range(count - absent)]
    sources += [from_delta(np.zeros(shape), "F32")] * absent
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        truncate_batch(sources, HardThreshold(), DeviceArithmetic("cpu", measured=EVEN), precision=precision)
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("absent", [0, 1], ids=["all", "one leaves"])
@pytest.mark.parametrize("shape", [(211, 211), (1009, 211), (5003, 211)])
def test_what_further_members_take_on_a_device(shape: tuple[int, int], absent: int, precision: Precision) -> None:
    """But for cuSOLVER's workspace, which torch on the CPU does not have: 12n² are left for that."""
    n = shape[1]
    more = _device_peak(9, shape, absent, precision) - _device_peak(4, shape, absent, precision)
    model = MatrixShape(*shape, 2, 2, 2)
    projected = memory.batch_device_bytes(model, 9) - memory.batch_device_bytes(model, 4)
    assert more <= projected
    assert projected - 5 * 12 * n * n <= 2.0 * more


@pytest.mark.usefixtures("one_torch_thread")
def test_what_further_members_take_in_host_memory(tmp_path: Path) -> None:
    """Every pair, read whole; and no more than is reserved, with nearly half of the rank kept."""
    half_kept(tmp_path, (1009, 499), ("BF16", "BF16"), copies=7)
    plan = planned(Pair(tmp_path / "base", tmp_path / "ft"))
    (batch,) = plan.batches
    device = DeviceArithmetic("cpu", measured=EVEN)
    tracemalloc.start()
    try:
        execute(
            plan,
            tmp_path / "out",
            stop=StopRequest(),
            watcher=api.Silent(),
            arithmetic=lambda _device, _scratch: device,
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 7 * memory.pair_bytes(batch.shape) < peak <= batch.ram_bytes
