"""Small matrices decided in batches, planned for cards and done by torch on the CPU behind the same seam.

Where bytes are compared, the device is one whose numbers depend on who lies beside whom, as a batched kernel's may: a
batch that is computed in another composition than planned does not pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from streamrepair.api import Silent
from streamrepair.checkpoint.layout import open_checkpoint
from streamrepair.checkpoint.read import InputFiles
from streamrepair.checkpoint.write import ShardFile
from streamrepair.decompose.arithmetic import Arithmetic, Precision
from streamrepair.decompose.convert import Doubles
from streamrepair.decompose.device import DeviceArithmetic
from streamrepair.decompose.device.batch import DeviceGrams
from streamrepair.decompose.device.batch import _member as member_of
from streamrepair.decompose.device.rates import Rates
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.operator import PanelSource
from streamrepair.decompose.scratch import Scratch
from streamrepair.engine import stop as stopping
from streamrepair.engine.batches import Batch
from streamrepair.engine.plan import Plan, make_plan
from streamrepair.engine.run import execute
from streamrepair.engine.stop import StopRequest
from streamrepair.errors import InterruptedRunError, NumericalError, OutputError
from streamrepair.report import JournalEntry, Report, Settings
from tests.engine.results import check_result
from tests.pairs import Pair, matrices, read_tensors, shard_bytes, stored, write_pair, write_split

EVEN = Rates(1.0, 1.0)
SMALL = {f"layer {i} {name}": shape for name, shape in (("q", (96, 64)), ("up", (64, 300))) for i in range(7)}
SHAPES: dict[str, tuple[int, ...]] = {**SMALL, "norm": (64,), "head": (700, 80)}


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Seven of each of two shapes, dealt out to two shards, so that they make four batches."""
    return write_pair(tmp_path_factory.mktemp("batches"), SHAPES, shards=(1, 2))


class Touchy(DeviceArithmetic):
    """A device whose sums depend, in their last places, on how many members a batch has and on who is where.

    Args:
        seen: gets the number of members of every batch. by: how much they depend, as a share of G.
    """

    def __init__(self, seen: list[int] | None = None, by: float = 1e-9) -> None:
        super().__init__("cpu", measured=EVEN)
        self.seen, self._by = seen if seen is not None else [], by

    def grams(self, sources: Sequence[PanelSource], probes: Doubles, precision: Precision) -> DeviceGrams:
        grams = super().grams(sources, probes, precision)
        self.seen.append(len(sources))
        total, members = grams._total, grams.members
        x = torch.from_numpy(probes)
        for i, member in enumerate(members):
            noise = torch.randn(total.shape[1:], generator=torch.Generator().manual_seed(100 * len(sources) + i))
            total[i] += self._by * float(torch.linalg.matrix_norm(total[i])) * (noise + noise.T).double()
            images = (x @ total[i]).numpy()
            members[i] = member_of(total[i], images, member.exact_images, member.trace, member.weight)
        return grams


def steady() -> DeviceArithmetic:
    """A device whose sums are the same in any company."""
    return DeviceArithmetic("cpu", measured=EVEN)


def planned(pair: Pair, devices: Sequence[str] = ("cuda:0",), *, ram: int = 8_000_000_000, **settings: Any) -> Plan:
    return make_plan(
        open_checkpoint(str(pair.base), side="BASE"),
        open_checkpoint(str(pair.ft), side="FT"),
        Settings(**settings),
        devices=tuple(devices),
        workers=1,
        ram_bytes=ram,
        vram_bytes=4_000_000_000,
    )


def run(
    plan: Plan,
    out: Path,
    make: Callable[[], Arithmetic] = Touchy,
    *,
    stop: StopRequest | None = None,
    watcher: Silent | None = None,
    trace: Path | None = None,
) -> Report:
    def arithmetic(device: str, scratch: Scratch) -> Arithmetic:
        return HostArithmetic(scratch) if device == "cpu" else make()

    return execute(
        plan, out, stop=stop or StopRequest(), watcher=watcher or Silent(), arithmetic=arithmetic, trace=trace
    )


def sizes(plan: Plan) -> list[int]:
    return sorted(len(batch.tasks) for batch in plan.batches)


def strange(folder: Path, special: Mapping[str, tuple[Doubles, Doubles]], dtype: str = "F32") -> Pair:
    """A pair of six ordinary matrices and the given ones, all of one shape, in one shard."""
    rng = np.random.default_rng(3)
    sides = {f"plain {i}": matrices(rng, (96, 64)) for i in range(6)} | dict(special)
    pair = Pair(folder / "base", folder / "ft")
    for path, side in ((pair.base, 0), (pair.ft, 1)):
        write_split(path, {name: stored(both[side], dtype) for name, both in sorted(sides.items())}, 1)
    return pair


def without_seconds(report: Report) -> dict[str, Any]:
    return {name: msgspec.structs.replace(record, seconds=None) for name, record in report.tensors.items()}


def test_a_batched_repair_is_the_textbooks(pair: Pair, tmp_path: Path) -> None:
    plan, seen = planned(pair), list[int]()
    assert sizes(plan) == [3, 3, 4, 4]
    report = run(plan, tmp_path / "out", lambda: Touchy(seen))
    assert sorted(seen) == [3, 3, 4, 4]  # bfloat16 does not show what it is touchy about
    check_result(pair, tmp_path / "out", report)
    for name in SMALL:
        record = report.tensors[name]
        assert (record.action, record.backend, record.climbed) == ("repaired", "gram-float64", ())
        assert record.seconds is not None
        assert record.seconds > 0
    assert report.tensors["norm"].action == "kept_ft"
    read_bytes = sum(task.read_bytes for task in plan.tasks)
    assert read_bytes <= report.timings.bytes_read <= 1.5 * read_bytes  # and the beginnings that were compared
    assert report.timings.bytes_written == sum(task.out.nbytes for task in plan.tasks)


@pytest.mark.parametrize("dtypes", [("F16", "F16"), ("F32", "BF16"), ("F64", "F64")])
def test_other_dtypes(tmp_path: Path, dtypes: tuple[str, str]) -> None:
    pair = write_pair(tmp_path, SHAPES, dtypes=dtypes)
    plan = planned(pair)
    assert sizes(plan) == [3, 3, 4, 4]
    check_result(pair, tmp_path / "out", run(plan, tmp_path / "out", steady))


def test_a_batch_decides_as_each_member_alone_would(pair: Pair, tmp_path: Path) -> None:
    """On a device that is not touchy: records are alike but for the last places."""

    batched = run(planned(pair), tmp_path / "batched", steady)
    alone = run(planned(pair), tmp_path / "alone", HostArithmetic)  # which has no batches
    for name in SMALL:
        one, other = batched.tensors[name], alone.tensors[name]
        assert (one.rank_kept, one.undecidable) == (other.rank_kept, other.undecidable)
        assert one.threshold == pytest.approx(other.threshold, rel=1e-4)
        assert one.frob_delta_out == pytest.approx(other.frob_delta_out, rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{"sigma": "tail"}, {"scale": 0.2}, {"backend": "gram"}, {"backend": "randomized", "noise_estimate": "fast"}],
    ids=str,
)
def test_settings_mean_the_same_in_a_batch(tmp_path: Path, settings: dict[str, Any]) -> None:
    pair = write_pair(tmp_path, {f"w{i}": (300, 256) for i in range(3)}, shards=(1, 1))
    plan, seen = planned(pair, **settings), list[int]()
    batched = run(plan, tmp_path / "batched", lambda: Touchy(seen, 0.0))
    alone = run(replace(plan, units=plan.tasks), tmp_path / "alone", steady)
    assert seen == [3]
    for name, record in batched.tensors.items():
        other = alone.tensors[name]
        assert (record.action, record.rank_kept) == ("repaired", other.rank_kept)
        assert (record.backend, record.climbed, record.threshold_interval) == (other.backend, (), None)
        assert record.threshold == pytest.approx(other.threshold, rel=1e-6)


def test_full_has_no_batches(pair: Pair) -> None:
    assert planned(pair, backend="full").batches == []


def test_composition_shows_on_a_touchy_device(pair: Pair, tmp_path: Path) -> None:
    """What the tests below rest on: other companions, other bytes."""
    whole = run(planned(pair, out_dtype="float32"), tmp_path / "whole")
    part = run(planned(pair, out_dtype="float32", exclude="layer [01] "), tmp_path / "part")
    found, other = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "part")
    assert whole.tensors["layer 4 q"].rank_kept == part.tensors["layer 4 q"].rank_kept
    assert found["layer 4 q"] != other["layer 4 q"]
    assert found["head"] == other["head"]


def test_numbers_depend_neither_on_how_many_gpus_there_are_nor_on_memory(pair: Pair, tmp_path: Path) -> None:
    run(planned(pair, out_dtype="float32"), tmp_path / "one")
    several = planned(pair, ("cuda:0", "cuda:1", "cuda:2"), ram=30_000_000_000, out_dtype="float32")
    report = run(several, tmp_path / "three")
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "three")
    assert report.workers == 4


class _Fails(Touchy):
    """Ends the run when so many merges have begun, as a full disk would: what is finished stays finished."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._left = after

    def merger(self, *arguments: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise OutputError("made up: no space left")
        return super().merger(*arguments)


def _journalled(out: Path) -> list[str]:
    lines = (out / ".streamrepair" / "journal").read_bytes().splitlines()
    return [
        msgspec.json.decode(line[line.index(b"{") :], type=JournalEntry).name for line in lines if b'"name"' in line
    ]


@pytest.mark.parametrize("merges", [1, 2, 5])
def test_an_interruption_in_a_batch_and_its_continuation_give_the_same_bytes(
    pair: Pair, tmp_path: Path, merges: int
) -> None:
    """The batch is computed again as it was planned; what was finished of it is not written again."""
    plan = planned(pair, out_dtype="float32")
    whole = run(plan, tmp_path / "whole")
    gpu = _Fails(merges)
    with pytest.raises(OutputError, match="made up"):
        run(plan, tmp_path / "out", lambda: gpu)
    done = set(_journalled(tmp_path / "out"))
    in_pieces = [batch for batch in plan.batches if 0 < len(done & {t.name for t in batch.tasks}) < len(batch.tasks)]
    assert len(in_pieces) == 1, "the interruption was meant to be in the middle of a batch"
    seen: list[int] = []
    report = run(plan, tmp_path / "out", lambda: Touchy(seen))
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")
    assert without_seconds(report) == without_seconds(whole)
    untouched = [batch for batch in plan.batches if not {t.name for t in batch.tasks} <= done]
    assert sorted(seen) == sorted(len(batch.tasks) for batch in untouched)
    assert report.timings.bytes_written == sum(t.out.nbytes for t in plan.tasks)
    assert sum(len(batch.tasks) for batch in untouched) > len(SMALL.keys() - done)


def test_a_damaged_member_is_done_again_as_it_was(pair: Pair, tmp_path: Path) -> None:
    plan = planned(pair, out_dtype="float32")
    run(plan, tmp_path / "out")
    before = shard_bytes(tmp_path / "out")
    task = plan.batches[0].tasks[1]
    path = tmp_path / "out" / plan.layouts[task.shard].name
    with path.open("r+b") as file:
        file.seek(task.out.start + 100)
        file.write(b"damaged")
    assert shard_bytes(tmp_path / "out") != before
    seen: list[int] = []
    run(plan, tmp_path / "out", lambda: Touchy(seen))
    assert shard_bytes(tmp_path / "out") == before
    assert seen == [len(plan.batches[0].tasks)]


def test_what_is_read_for_the_sake_of_others_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of members that are finished: two that differ from BASE, which are decided again, and one that does not."""
    matrix = matrices(np.random.default_rng(0), (96, 64))[0]
    pair = strange(tmp_path, {"z equal": (matrix, matrix)})
    plan, read = planned(pair), list[int]()
    before = run(plan, tmp_path / "out").timings.bytes_read
    task = next(task for task in plan.batches[0].tasks if task.name != "z equal")
    with (tmp_path / "out" / plan.layouts[0].name).open("r+b") as file:
        file.seek(task.out.start)
        file.write(b"damaged")
    original = InputFiles.read_into

    def watched(self: InputFiles, name: Any, offset: int, buffer: memoryview) -> None:
        read.append(len(buffer))
        original(self, name, offset, buffer)

    monkeypatch.setattr(InputFiles, "read_into", watched)
    assert run(plan, tmp_path / "out").timings.bytes_read - before == sum(read)


def test_members_that_fine_tuning_did_not_touch_leave_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before an interruption and after it."""
    rng = np.random.default_rng(0)
    same = {f"{where} equal": (matrix, matrix) for where in "az" for matrix in [matrices(rng, (96, 64))[0]]}
    pair = strange(tmp_path, same)
    plan, seen = planned(pair), list[int]()
    assert sizes(plan) == [8]
    report = run(plan, tmp_path / "whole", lambda: Touchy(seen))
    assert seen == [6]
    for name in same:
        assert (report.tensors[name].action, report.tensors[name].reason) == ("copied", "delta is zero")
    check_result(pair, tmp_path / "steady", run(plan, tmp_path / "steady", steady))
    with pytest.raises(OutputError, match="made up"):
        run(plan, tmp_path / "out", lambda: _Fails(3))
    done, watcher = set(_journalled(tmp_path / "out")), _Progress()
    assert set(same) < done
    written: list[int] = []
    original = ShardFile.write

    def write(self: ShardFile, offset: int, *arguments: Any, **knobs: Any) -> None:
        written.append(offset)
        original(self, offset, *arguments, **knobs)

    monkeypatch.setattr(ShardFile, "write", write)
    report = run(plan, tmp_path / "out", lambda: Touchy(seen), watcher=watcher)
    assert seen == [6, 6]
    assert set(written) == {task.out.start for task in plan.tasks if task.name not in done}
    assert watcher.bytes == sum(task.out.nbytes for task in plan.tasks if task.name not in done)
    assert report.timings.bytes_written == sum(task.out.nbytes for task in plan.tasks)
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")


def test_a_batch_of_which_only_copies_are_missing_is_not_computed(tmp_path: Path) -> None:
    matrix = matrices(np.random.default_rng(0), (96, 64))[0]
    pair = strange(tmp_path, {"z equal": (matrix, matrix)})
    plan, seen = planned(pair), list[int]()
    run(plan, tmp_path / "out", lambda: Touchy(seen))
    before = shard_bytes(tmp_path / "out")
    task = next(task for task in plan.tasks if task.name == "z equal")
    path = tmp_path / "out" / plan.layouts[0].name
    with path.open("r+b") as file:
        file.seek(task.out.start)
        file.write(b"damaged")
    run(plan, tmp_path / "out", lambda: Touchy(seen))
    assert shard_bytes(tmp_path / "out") == before
    assert seen == [7 - 1]


def _spoiled(matrix: Doubles) -> Doubles:
    spoiled = matrix.copy()
    spoiled[5, 7] = np.nan
    return spoiled


def _odd_ones() -> dict[str, tuple[Doubles, Doubles]]:
    """NaN on either side, equal bytes with NaN in them, exactly low rank, zero but for the sign of zero."""
    rng = np.random.default_rng(1)
    base, ft = matrices(rng, (96, 64))
    signs = np.zeros((96, 64))
    exact = np.zeros((96, 64))
    exact[:, 3] = np.round(64 * rng.standard_normal(96)) / 64
    return {
        "a nan": (base, _spoiled(ft)),
        "b nan": (_spoiled(base), ft),
        "c nan": (_spoiled(ft), _spoiled(ft)),
        "low rank": (np.zeros((96, 64)), exact),
        "signs": (signs, -signs),
    }


def test_members_that_are_no_ordinary_matrices_do_no_harm_to_the_others(tmp_path: Path) -> None:
    """And end as they would alone; an interruption in the middle changes nothing."""
    pair = strange(tmp_path, _odd_ones())
    plan = planned(pair, on_nonfinite="copy-ft")
    assert sizes(plan) == [11]
    check_result(pair, tmp_path / "steady", run(plan, tmp_path / "steady", steady))
    records = run(plan, tmp_path / "out").tensors
    for name in ("a nan", "b nan", "c nan"):
        assert records[name].action == "kept_ft"
        assert "holds NaN or infinity at element 327" in records[name].reason
    assert records["low rank"].action == "kept_ft"
    assert "exactly low rank" in records["low rank"].reason
    assert records["low rank"].climbed[0].startswith("gram-float64 in a batch: ")
    assert records["signs"].action == "copied"
    for i in range(6):
        assert (records[f"plain {i}"].action, records[f"plain {i}"].climbed) == ("repaired", ())
    alone = run(plan, tmp_path / "alone", HostArithmetic)
    for name in _odd_ones():
        assert (records[name].action, records[name].reason) == (alone.tensors[name].action, alone.tensors[name].reason)
        assert records[name].frob_delta_in == alone.tensors[name].frob_delta_in
    with pytest.raises(OutputError, match="made up"):
        run(plan, tmp_path / "again", lambda: _Fails(2))
    assert len(_journalled(tmp_path / "again")) in range(1, 11)
    run(plan, tmp_path / "again")
    assert shard_bytes(tmp_path / "again") == shard_bytes(tmp_path / "out")


def test_nan_refuses_the_pair_and_leaves_nothing(tmp_path: Path) -> None:
    pair = strange(tmp_path, {"spoiled": _odd_ones()["a nan"]})
    with pytest.raises(Exception, match=r"tensor spoiled holds NaN or infinity at element 327"):
        run(planned(pair), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class _Warned(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def test_a_member_whose_solver_fails_goes_up_the_ladder_alone(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of every batch, wherever it is tried on the device."""
    original, spoilt = torch.linalg.eigh, list[torch.Tensor]()

    def faulty(matrix: torch.Tensor) -> Any:
        values, vectors = original(matrix)
        if matrix.ndim == 3:
            spoilt.append(matrix[1].clone())
            vectors[1] = vectors[1].flip(1)
        elif any(one.shape == matrix.shape and torch.allclose(one, matrix, rtol=1e-6) for one in spoilt):
            raise torch.linalg.LinAlgError("failed to converge")  # type: ignore[attr-defined]
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", faulty)
    plan, watcher = planned(pair), _Warned()
    report = run(plan, tmp_path / "out", watcher=watcher)
    check_result(pair, tmp_path / "out", report)
    assert sizes(plan) == [3, 3, 4, 4]
    for batch in plan.batches:
        for i, task in enumerate(batch.tasks):
            record = report.tensors[task.name]
            if i != 1:
                assert record.climbed == ()
                continue
            assert record.climbed[0].startswith("gram-float64 in a batch: the eigenvalue factorisation misses")
            assert record.climbed[1].startswith("gram-float64: failed to converge")
            assert record.backend == "gram-float64"  # the CPU's
    assert sum("in a batch" in message for message in watcher.warnings) == 4


def test_float32_is_tried_for_a_whole_batch_where_it_would_be_alone(tmp_path: Path) -> None:
    """256 columns and a 16-bit output; what it leaves open goes on in float64, alone, and without a warning."""
    pair = write_pair(tmp_path, {f"w{i}": (300, 256) for i in range(3)}, shards=(1, 1))
    precisions: list[tuple[int, str]] = []

    class Slow(DeviceArithmetic):
        def grams(self, sources: Sequence[PanelSource], probes: Doubles, precision: Precision) -> DeviceGrams:
            precisions.append((len(sources), precision))
            grams = super().grams(sources, probes, precision)
            if precision == "float32":
                grams._total[1] += 1e-3 * torch.eye(256)  # far off, and told by the probes
                images = (torch.from_numpy(probes) @ grams._total[1]).numpy()
                member = grams.members[1]
                grams.members[1] = member_of(grams._total[1], images, member.exact_images, member.trace, member.weight)
            return grams

    def slow() -> Slow:
        return Slow("cpu", measured=Rates(100.0, 1.0))

    watcher = _Warned()
    report = run(planned(pair), tmp_path / "out", slow, watcher=watcher)
    check_result(pair, tmp_path / "out", report)
    assert precisions == [(3, "float32")]
    assert [report.tensors[f"w{i}"].backend for i in range(3)] == ["gram-float32", "gram-float64", "gram-float32"]
    assert [reason.partition(":")[0] for reason in report.tensors["w1"].climbed] == ["gram-float32 in a batch"]
    assert watcher.warnings == []
    run(planned(pair, out_dtype="float32"), tmp_path / "wide", slow)
    assert precisions[1:] == [(3, "float64")]


def test_a_card_without_room_for_the_batch_halves_it(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run(planned(pair), tmp_path / "easy", steady)
    tried: list[int] = []

    class Tight(DeviceArithmetic):
        def grams(self, sources: Sequence[PanelSource], probes: Doubles, precision: Precision) -> DeviceGrams:
            tried.append(len(sources))
            if len(sources) > 2:
                raise NumericalError("CUDA out of memory. Tried to allocate 1.00 GiB.")
            return super().grams(sources, probes, precision)

    report = run(planned(pair), tmp_path / "out", lambda: Tight("cpu", measured=EVEN))
    check_result(pair, tmp_path / "out", report)
    assert {4, 3, 2} <= set(tried)
    assert [record.climbed for record in report.tensors.values()] == [()] * len(report.tensors)
    for name in SMALL:
        assert report.tensors[name].rank_kept == before.tensors[name].rank_kept


def test_a_card_without_any_memory_hands_every_member_to_the_cpu_within_ram(pair: Pair, tmp_path: Path) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    class Full(DeviceArithmetic):
        gram = triangular_factor = full

        def grams(self, *_: Any) -> Any:
            raise NumericalError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    report = run(planned(pair, scale=0.3), tmp_path / "out", lambda: Full("cpu", measured=EVEN))
    check_result(pair, tmp_path / "out", report, scale=0.3)
    for name in SMALL:
        assert "out of memory" in report.tensors[name].climbed[0]
        assert report.tensors[name].climbed[0].startswith("gram-float64 in a batch")
        assert report.tensors[name].climbed[1].startswith("gram-float64: CUDA out of memory")


def test_a_device_that_breaks_in_a_batch_leaves_its_work_to_the_cpu(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever torch raises, and wherever: it is no traceback."""

    def broken(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(DeviceGrams, "factorise", broken)
    monkeypatch.setattr(torch.linalg, "eigh", broken)
    report = run(planned(pair), tmp_path / "out")
    check_result(pair, tmp_path / "out", report)
    reason = "CUDA error: an illegal memory access was encountered"
    for name in SMALL:
        assert report.tensors[name].climbed[:2] == (f"gram-float64 in a batch: {reason}", f"gram-float64: {reason}")


class _StopsIn(Touchy):
    """A stop is requested when the first member of the first batch is merged."""

    def __init__(self, stop: StopRequest) -> None:
        super().__init__()
        self._stop = stop

    def merger(self, *arguments: Any) -> Any:
        self._stop.request("SIGTERM")
        return super().merger(*arguments)


def test_a_stop_in_a_batch_finishes_it_and_no_other(pair: Pair, tmp_path: Path) -> None:
    plan, stop = planned(pair, out_dtype="float32"), StopRequest()
    run(plan, tmp_path / "whole")
    first = next(unit for unit in plan.units if isinstance(unit, Batch))
    with pytest.raises(InterruptedRunError, match="SIGTERM"):
        run(plan, tmp_path / "out", lambda: _StopsIn(stop), stop=stop)
    on_gpu = {name for name in _journalled(tmp_path / "out") if name in SMALL}
    assert on_gpu == {task.name for task in first.tasks}
    run(plan, tmp_path / "out")
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")


def test_a_stop_past_its_grace_abandons_a_batch_between_members(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, stop = planned(pair, out_dtype="float32"), StopRequest()
    run(plan, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(stopping, "GRACE_S", 0.0)
        with pytest.raises(InterruptedRunError, match="SIGTERM"):
            run(plan, tmp_path / "out", lambda: _StopsIn(stop), stop=stop)
    assert not SMALL.keys() & set(_journalled(tmp_path / "out"))
    run(plan, tmp_path / "out")
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "whole")


class _Progress(Silent):
    def __init__(self) -> None:
        self.bytes, self.lock = 0, threading.Lock()

    def advance(self, done_bytes: int) -> None:
        with self.lock:
            self.bytes += done_bytes


def test_progress_and_trace_tell_of_every_member(pair: Pair, tmp_path: Path) -> None:
    plan, watcher, trace = planned(pair), _Progress(), tmp_path / "trace.json"
    run(plan, tmp_path / "out", watcher=watcher, trace=trace)
    assert watcher.bytes == sum(task.out.nbytes for task in plan.tasks)
    events = [event for event in msgspec.json.decode(trace.read_bytes())["traceEvents"] if event["ph"] == "X"]
    assert {event["name"] for event in events if event["cat"] == "member"} == SMALL.keys()
    assert {event["name"] for event in events if event["cat"] == "task"} == {unit.name for unit in plan.units}


def test_a_continuation_tells_of_what_it_does_and_no_more(pair: Pair, tmp_path: Path) -> None:
    plan, watcher = planned(pair), _Progress()
    with pytest.raises(OutputError, match="made up"):
        run(plan, tmp_path / "out", lambda: _Fails(2))
    done = set(_journalled(tmp_path / "out"))
    run(plan, tmp_path / "out", watcher=watcher)
    assert watcher.bytes == sum(task.out.nbytes for task in plan.tasks if task.name not in done)


def test_the_cpu_has_no_batches(pair: Pair) -> None:
    for devices in (("cpu",), ("cuda:0", "cpu")):  # beside a GPU the CPU takes small matrices, if it was named
        assert planned(pair, devices).batches == []


def test_outcomes_are_handed_on_one_by_one(pair: Pair, tmp_path: Path) -> None:
    """What is finished counts even if the next member fails."""
    gpu = _Fails(1)
    with pytest.raises(OutputError, match="made up"):
        run(planned(pair), tmp_path / "out", lambda: gpu)
    assert len(SMALL.keys() & set(_journalled(tmp_path / "out"))) == 1
