"""Order and placement, and what they are worth: runs of large models on a fake clock."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamrepair.engine import cost, schedule
from streamrepair.engine.lanes import Place
from streamrepair.engine.plan import Task
from streamrepair.engine.simulate import Simulated, Simulation
from tests.engine.tasks import bf16_task

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "bench"))


from timeline import least_s, model, svg

PLENTY = 10**13


def lanes_of(gpus: int, cpus: int = 1) -> list[str]:
    return [*(f"cuda:{i}" for i in range(gpus)), *["cpu"] * cpus]


def simulated(tasks: list[Task], lanes: list[str], **options: float) -> Simulated:
    return Simulation(schedule.order(tasks, lanes), lanes, PLENTY, **options).run()  # type: ignore[arg-type]


@pytest.mark.parametrize("disk_bytes_per_s", [1.5e9, 6e9])
@pytest.mark.parametrize("gpus", [1, 4, 8])
@pytest.mark.parametrize("name", ["llama-70b", "llama-405b"])
def test_large_models_keep_every_device_or_the_disk_busy(name: str, gpus: int, disk_bytes_per_s: float) -> None:
    """Within 1.1 times what no schedule could undercut: the work shared out evenly, or every byte moved once."""
    tasks = model(name)
    result = simulated(tasks, lanes_of(gpus), disk_bytes_per_s=disk_bytes_per_s)
    least = least_s(tasks, gpus, disk_bytes_per_s)
    assert least <= result.makespan_s <= 1.1 * least
    busy_s = sum(result.busy_s(f"cuda:{i}") for i in range(gpus))
    assert busy_s == pytest.approx(sum(cost.seconds(task, "cuda") for task in tasks if task.place == "cuda"))


def test_the_timeline_is_drawn_with_a_row_for_each_device() -> None:
    """Well-formed, and nothing is drawn outside."""
    root = ElementTree.fromstring(svg(simulated(model("llama-70b")[:40], lanes_of(2)), "a <title>"))
    space = "{http://www.w3.org/2000/svg}"
    assert {"a <title>", "cuda:0", "cuda:1", "cpu 0"} <= {text.text for text in root.iter(f"{space}text")}
    bars = [bar for bar in root.iter(f"{space}rect") if bar.find(f"{space}title") is not None]
    assert len(bars) > 20
    assert all(0 <= float(bar.attrib["x"]) <= float(root.attrib["width"]) for bar in bars)
    assert len({bar.attrib["y"] for bar in bars}) == 3


def test_shards_seal_early() -> None:
    """When half of the time is over, nearly half of the shards are whole."""
    tasks, lanes = model("llama-70b"), lanes_of(8)
    result = simulated(tasks, lanes)
    shard = {task.name: task.shard for task in tasks}
    ends: dict[int, float] = {}
    for span in result.spans:
        if span.kind == "compute" and span.name in shard:
            ends[shard[span.name]] = max(span.end_s, ends.get(shard[span.name], 0.0))
    whole = sum(end_s <= result.makespan_s / 2 for end_s in ends.values())
    assert whole >= 0.4 * len(ends)


def _tail(tasks: list[Task], lanes: list[str]) -> float:
    """Makespan over the work shared out evenly."""
    work_s = sum(cost.seconds(task, task.place) for task in tasks) / len(lanes)
    return simulated(tasks, lanes, disk_bytes_per_s=1e15).makespan_s / work_s


def test_a_large_matrix_of_the_last_shard_leaves_no_tail() -> None:
    """lm_head comes last in a file and takes longest: eight workers would wait for the one that has it."""
    tasks = [bf16_task(f"layer {i}", (512, 512), shard=i // 20) for i in range(200)]
    seconds = cost.seconds(tasks[0], "cpu")
    heads = (bf16_task("head", (rows, 512), shard=9) for rows in range(1024, 1 << 20, 1024))
    head = next(task for task in heads if cost.seconds(task, "cpu") > 15 * seconds)  # an eighth of all is 27 such
    lanes = ["cpu"] * 8
    assert _tail([*tasks, head], lanes) <= 1.1
    ordered = schedule.order([*tasks, head], lanes)
    assert ordered[0].shard == 0
    assert ordered.index(head) < 150
    by_shard = [task for task in ordered if task is not head]
    assert [task.shard for task in by_shard] == sorted(task.shard for task in by_shard)
    assert schedule.order([*tasks, head], ["cpu"]).index(head) == 180  # alone, nobody waits: by shard


SIDES = st.sampled_from([64, 200, 512, 1000])


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(SIDES, SIDES, st.integers(0, 3), st.sampled_from(["cpu", "cuda"])), max_size=30),
    gpus=st.integers(1, 3),
    cpus=st.integers(1, 3),
)
def test_every_order_is_a_permutation_and_runs_to_its_end(
    shapes: list[tuple[int, int, int, Place]], gpus: int, cpus: int
) -> None:
    """And never takes longer than the bound for lists: the even share, and one longest task."""
    tasks = [bf16_task(str(i), (m, n), shard=s, place=place) for i, (m, n, s, place) in enumerate(shapes)]
    lanes = lanes_of(gpus, cpus)
    ordered = schedule.order(tasks, lanes)
    assert sorted(task.name for task in ordered) == sorted(task.name for task in tasks)
    result = simulated(tasks, lanes, disk_bytes_per_s=1e18)
    assert {span.name for span in result.spans if span.kind == "compute"} == {task.name for task in tasks}
    bound = 0.0
    for place, workers in (("cuda", gpus), ("cpu", cpus)):
        work = [cost.seconds(task, task.place) for task in tasks if task.place == place]
        bound = max(bound, sum(work) / workers + max(work, default=0.0))
    assert result.makespan_s <= bound * (1 + 1e-6) + 1e-6


def test_memory_holds_tasks_back() -> None:
    """With room for one task at a time, two workers take as long as one."""
    tasks = [bf16_task(str(i), (512, 512), ram_bytes=60) for i in range(10)]
    work_s = sum(cost.seconds(task, "cpu") for task in tasks)
    for room, share in ((100, 1.0), (120, 0.5)):
        result = Simulation(tasks, ["cpu", "cpu"], room, disk_bytes_per_s=1e15).run()
        assert result.makespan_s == pytest.approx(share * work_s, rel=1e-3)


def test_copies_run_on_the_cpu_and_so_do_small_matrices_where_the_user_named_it() -> None:
    small, large, vector = bf16_task("s", (128, 64)), bf16_task("l", (8192, 8192)), bf16_task("v", (64,))

    def places(devices: list[str]) -> list[str]:
        return [schedule.place_of(task, devices) for task in (small, large, vector)]

    assert places(["cpu"]) == ["cpu", "cpu", "cpu"]
    assert places(["cuda:0", "cuda:1"]) == ["cuda", "cuda", "cpu"]
    assert places(["cuda:0", "cpu"]) == ["cpu", "cuda", "cpu"]


def test_where_a_matrix_runs_does_not_depend_on_how_many_devices_there_are() -> None:
    """Its last bits do depend on the kind of device, so a continued run must not find it elsewhere."""
    tasks = model("llama-70b")[:9]
    few = [schedule.place_of(task, ["cuda:0", "cpu"]) for task in tasks]
    assert few == [schedule.place_of(task, ["cuda:0", "cuda:1", "cuda:2", "cuda:3", "cpu"]) for task in tasks]
