"""What a plan decides from headers alone, and that the budget it names is one that works."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamrepair import api, units
from streamrepair.engine import limits
from streamrepair.engine.fit import most_at_once
from streamrepair.engine.plan import Plan
from streamrepair.errors import BudgetError, UsageError
from streamrepair.report import Settings
from streamrepair.views import groups
from tests.builders import bf16
from tests.pairs import DEMO, Pair, read_tensors, shard_bytes, smallest_budget, snapshot, write_pair

SHAPES = {"tall": (96, 64), "wide": (64, 96), "norm": (64,), "tiny": (8, 8), "head": (40, 64)}


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return write_pair(tmp_path, SHAPES, shards=(2, 3), extra={"only_ft": np.zeros((64, 64), np.float32)})


def _intents(plan: Plan) -> dict[str, tuple[str, str]]:
    found = [(t.name, "repair" if t.shape else "keep", t.pairing.reason) for t in plan.tasks]
    found += [(p.name, p.intent, p.reason) for p in plan.dropped]
    assert len({name for name, _, _ in found}) == len(found)
    return {name: (intent, reason) for name, intent, reason in found}


def test_every_tensor_of_both_sides_once_with_a_reason(pair: Pair) -> None:
    assert _intents(api.plan(pair.base, pair.ft)) == {
        "tall": ("repair", ""),
        "wide": ("repair", ""),
        "head": ("repair", ""),
        "norm": ("keep", "1-D, not a matrix"),
        "tiny": ("keep", "tiny: 64 elements, fewer than 1024"),
        "only_ft": ("keep", "not in the base checkpoint"),
    }
    backwards = _intents(api.plan(pair.ft, pair.base))
    assert backwards["only_ft"] == ("drop", "not in the fine-tuned checkpoint")
    assert backwards["tall"] == ("repair", "")


def test_each_task_writes_where_fts_tensor_lies(pair: Pair) -> None:
    plan = api.plan(pair.base, pair.ft)
    assert [layout.name for layout in plan.layouts] == sorted(p.name for p in pair.ft.glob("*.safetensors"))
    for task in plan.tasks:
        assert (plan.ft.shards[task.shard], task.out) == (task.ft.shard, task.ft.entry)
    assert plan.out_bytes == sum(p.stat().st_size for p in pair.ft.glob("*.safetensors"))


def test_shards_are_worked_off_in_order_and_dear_tensors_first(pair: Pair) -> None:
    """So that shards are sealed one after another; `test_schedule` has the exception at the end, with more workers."""
    tasks = api.plan(pair.base, pair.ft, workers=1).tasks
    assert [t.shard for t in tasks] == sorted(t.shard for t in tasks)
    for shard in range(3):
        flops = [t.flops for t in tasks if t.shard == shard]
        assert flops == sorted(flops, reverse=True)


def test_planning_reads_no_weights_and_writes_nothing(tmp_path: Path) -> None:
    """The weights are the holes of a sparse file, and more than the memory allowed."""
    shapes = {"w": (32, 64)}
    pair = write_pair(tmp_path, shapes)
    for folder in (pair.base, pair.ft):
        for path in folder.glob("*.safetensors"):
            path.unlink()
    side = 1_000_000
    header = b'{"w":{"dtype":"F32","shape":[%d,%d],"data_offsets":[0,%d]}}' % (side, 512, side * 512 * 4)
    for folder in (pair.base, pair.ft):
        for path in folder.glob("*.json"):
            path.unlink()
        with (folder / "model.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + side * 512 * 4)
    before = [(p, p.stat().st_mtime_ns) for p in sorted(tmp_path.rglob("*"))]
    plan = api.plan(pair.base, pair.ft, ram="250MB")
    assert plan.read_bytes == 4 * side * 512 * 4
    assert [(p, p.stat().st_mtime_ns) for p in sorted(tmp_path.rglob("*"))] == before
    assert sum(p.stat().st_blocks for p in tmp_path.rglob("*.safetensors")) * 512 < 100_000


def _refusal(pair: Pair, ram: int) -> tuple[str, int]:
    """The tensor and the smallest budget that a refusal names."""
    with pytest.raises(BudgetError) as caught:
        api.plan(pair.base, pair.ft, ram=ram)
    message = str(caught.value)
    found = re.search(r"tensor (\S+) \[.*\] needs (.+), --ram allows (.+): the smallest .* is --ram (\d+MB)$", message)
    assert found is not None, message
    assert found[3] == units.format_bytes(ram)
    return found[1], units.parse_bytes(found[4])


@pytest.mark.parametrize(
    ("whose", "remedy"), [("the machine", "free some"), ("the control group", "raise its limit on memory")]
)
def test_a_default_that_is_too_small_is_not_told_to_allow_more_than_is_free(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, whose: str, remedy: str
) -> None:
    """No --ram was given, and the one that the work needs would get the process killed."""
    monkeypatch.setattr(limits, "free_bytes", lambda *_, **__: 50_000_000)
    monkeypatch.setattr(limits, "whose_is_free", lambda: whose)
    with pytest.raises(BudgetError) as caught:
        api.plan(pair.base, pair.ft)
    found = re.search(
        rf"needs (\d+) MB; without --ram a run takes 80% of what {whose} has free, 40 MB: {remedy}, so that (\d+) MB "
        "are free$",
        str(caught.value),
    )
    assert found is not None, str(caught.value)
    free = int(found[2]) * 1_000_000
    monkeypatch.setattr(limits, "free_bytes", lambda *_, **__: free)
    api.plan(pair.base, pair.ft)
    monkeypatch.setattr(limits, "free_bytes", lambda *_, **__: free - 2_000_000)
    with pytest.raises(BudgetError, match=rf": let it take more, with --ram \d+MB, or {remedy}, so that") as caught:
        api.plan(pair.base, pair.ft)
    api.plan(pair.base, pair.ft, ram=str(caught.value).partition("--ram ")[2].partition("with --ram ")[2].split(",")[0])


def test_a_refusal_by_a_hair_does_not_say_the_same_size_twice(pair: Pair) -> None:
    """ "needs 117 MB, --ram allows 117 MB" sent people looking for a bug."""
    _, fits = _refusal(pair, 1_000_000)
    refused = fits - 1_000_000
    while fits - refused > 1:
        middle = (fits + refused) // 2
        try:
            api.plan(pair.base, pair.ft, ram=middle)
            fits = middle
        except BudgetError as error:
            refused, message = middle, str(error)
    found = re.search(r"needs (.+), --ram allows (.+): the", message)
    assert found is not None
    assert [units.parse_bytes(text) for text in found.groups()] == [fits, refused]


def test_a_refusal_names_the_neediest_tensor_and_a_budget_that_works(tmp_path: Path) -> None:
    """End to end: the named budget is enough for the whole pair, the result is the same, and it was kept to."""
    pair = write_pair(tmp_path, {"small": (64, 48), "large": (1800, 700), "middle": (300, 200), "last": (700, 1500)})
    assert _refusal(pair, 1_000_000) == _refusal(pair, 100_000_000)
    name, smallest = _refusal(pair, 100_000_000)
    assert name in ("large", "last")
    with pytest.raises(BudgetError):
        api.plan(pair.base, pair.ft, ram=smallest - 1_000_000)
    report = api.repair(pair.base, pair.ft, tmp_path / "least", ram=smallest, workers=3)
    api.repair(pair.base, pair.ft, tmp_path / "plenty", ram="4GB", workers=3)
    assert report.budget.ram_projected_bytes <= smallest
    assert shard_bytes(tmp_path / "least") == shard_bytes(tmp_path / "plenty")


def test_a_refused_budget_leaves_no_trace(pair: Pair, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(BudgetError):
        api.repair(pair.base, pair.ft, tmp_path / "out", ram="50MB")
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_workers_are_as_many_as_leave_room_for_the_largest_task(pair: Pair) -> None:
    def workers(ram: int) -> int:
        return api.plan(pair.base, pair.ft, ram=ram, workers=6).workers

    _, smallest = _refusal(pair, 1_000_000)
    found = [workers(ram) for ram in range(smallest, smallest + 400_000_000, 20_000_000)]
    assert found[0] == 1
    assert found[-1] == 6
    assert found == sorted(found)


def test_there_are_no_more_workers_than_tensors(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {"a": (64, 64), "b": (64, 64)})
    assert api.plan(pair.base, pair.ft, workers=16).workers == 2


def test_a_lone_large_matrix_gets_a_second_worker_that_does_half_of_it(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {"large": (2048, 2048)})
    alone, lone = (api.plan(pair.base, pair.ft, workers=workers) for workers in (1, 16))
    assert (alone.workers, lone.workers, lone.side_by_side) == (1, 2, 1)
    assert lone.estimated_s < alone.estimated_s
    reports = [
        api.repair(pair.base, pair.ft, tmp_path / f"out{workers}", workers=workers, ram="2GB") for workers in (1, 2)
    ]
    assert [use.name for use in reports[1].utilisation] == ["cpu 0", "cpu 1", "files"]
    assert reports[1].utilisation[1].busy_s > 0
    assert shard_bytes(tmp_path / "out1") == shard_bytes(tmp_path / "out2")


@given(
    needs=st.lists(st.lists(st.integers(1, 10**7), max_size=4), min_size=2, max_size=2),
    counts=st.lists(st.integers(1, 3), min_size=2, max_size=2),
    room=st.integers(1, 3 * 10**7),
)
def test_what_runs_together_is_projected_at_its_largest_sum(
    needs: list[list[int]], counts: list[int], room: int
) -> None:
    """Against every choice of units, some of which miss the room by less than the sums are known to."""
    sums = [
        {sum(chosen) for number in range(count + 1) for chosen in combinations(each, number)}
        for each, count in zip(needs, counts, strict=True)
    ]
    both, slack = {one + other for one in sums[0] for other in sums[1]}, sum(counts) * (1 + room / 4096)
    found = most_at_once(needs, counts, room)
    assert max(total for total in both if total <= room) <= found <= room
    assert found <= max(total for total in both if total <= room + slack) + slack


def test_large_wide_matrices_are_read_in_columns_where_memory_is_short(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {"wide": (512, 9000)})
    (plenty,) = api.plan(pair.base, pair.ft, ram="4GB").tasks
    (scarce,) = api.plan(pair.base, pair.ft, ram=smallest_budget(pair)).tasks
    assert (plenty.panel_rows, scarce.panel_rows) == (9000, 2048)
    assert scarce.ram_bytes < plenty.ram_bytes


def test_panels_shrink_where_that_lets_workers_run_side_by_side(tmp_path: Path) -> None:
    """Two wide matrices in their preferred panels do not fit together, in the smallest ones they do."""
    pair = write_pair(tmp_path, {"v": (512, 9000), "w": (512, 9000)})
    plenty = api.plan(pair.base, pair.ft, ram="4GB", workers=2)
    assert (plenty.side_by_side, {task.panel_rows for task in plenty.tasks}) == (2, {9000})
    scarce = api.plan(pair.base, pair.ft, ram=plenty.ram_unhindered_bytes - 1, workers=2)
    assert (scarce.side_by_side, {task.panel_rows for task in scarce.tasks}) == (2, {2048})
    alone = api.plan(pair.base, pair.ft, ram=plenty.ram_unhindered_bytes - 1, workers=1)
    assert {task.panel_rows for task in alone.tasks} == {9000}


def test_the_time_foretold_heeds_that_memory_lets_tasks_in_one_by_one(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {"a": (600, 600), "b": (600, 600), "c": (64, 64)})
    plenty = api.plan(pair.base, pair.ft, ram="4GB", workers=2)
    scarce = api.plan(pair.base, pair.ft, ram=plenty.ram_unhindered_bytes - 1, workers=2)
    assert (plenty.side_by_side, scarce.side_by_side, scarce.workers) == (2, 1, 2)
    one = api.plan(pair.base, pair.ft, ram="4GB", workers=1, include="a|b")
    assert scarce.estimated_s == pytest.approx(one.estimated_s, rel=1e-2)
    assert plenty.estimated_s < 0.6 * scarce.estimated_s


def test_the_time_foretold_heeds_that_many_small_tensors_take_long(tmp_path: Path) -> None:
    """Quantised experts have scales by the hundred thousand; two workers are no quicker, as the interpreter is one."""
    pair = write_pair(tmp_path, {f"{i}": (8,) for i in range(2000)}, shards=(1, 1))
    for workers in (1, 2):
        plan = api.plan(pair.base, pair.ft, workers=workers)
        assert 0.1 < plan.estimated_s < 1.0


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_positive_number_is_refused(scale: float) -> None:
    with pytest.raises(UsageError, match="--scale"):
        api.plan(DEMO / "base", DEMO / "ft", settings=Settings(scale=scale))


def test_low_thresholds_are_given_room_for_the_whole_rank(tmp_path: Path) -> None:
    """At scale 1 at most half of the values can exceed τ; --sigma tail and small scales promise no such thing."""
    pair = write_pair(tmp_path, {"w": (512, 512)})

    def needed(settings: Settings) -> int:
        return api.plan(pair.base, pair.ft, settings=settings).tasks[0].ram_bytes

    assert needed(Settings(scale=0.5)) == needed(Settings(sigma="tail")) > needed(Settings())


def test_float32_output_is_planned_at_its_size(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {"w": (64, 64)}, extra={"x": bf16(np.zeros(10))}, shards=(1, 1))
    plan = api.plan(pair.base, pair.ft, settings=Settings(out_dtype="float32"))
    assert {t.name: (t.out.dtype, t.out.nbytes) for t in plan.tasks} == {"w": ("F32", 16384), "x": ("F32", 40)}
    assert sum(len(raw[2]) for raw in read_tensors(pair.ft).values()) == 8192 + 20


def test_a_group_is_named_by_the_whole_reason_but_for_numbers_of_its_members(tmp_path: Path) -> None:
    """A pattern may hold a colon, too."""
    pair = write_pair(tmp_path, {"a": (8, 8), "b": (8, 9), "c": (64, 64)}, shards=(1, 1))
    found = groups(api.plan(pair.base, pair.ft, settings=Settings(include="(?:a|b)")))
    assert {group.treatment: group.count for group in found} == {"keep, tiny": 2, "keep, not included by '(?:a|b)'": 1}
