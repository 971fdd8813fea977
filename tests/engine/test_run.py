"""A repair end to end, against a textbook float64 SVD; and that nothing but the numbers decides the numbers."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from streamrepair import api
from streamrepair.checkpoint import osfile
from streamrepair.decompose.host import HostMerger
from streamrepair.engine import commit, limits, task
from streamrepair.engine.fit import full_fits
from streamrepair.engine.plan import Plan
from streamrepair.engine.stop import StopRequest
from streamrepair.errors import DiskSpaceError, InputError, InterruptedRunError, NumericalError, OutputError
from streamrepair.report import Report
from tests.builders import Raw, bf16, raw, write_index, write_safetensors
from tests.faults import Kernel, fails
from tests.pairs import (
    DEMO,
    Pair,
    matrices,
    read_tensors,
    rounded_share,
    shard_bytes,
    smallest_budget,
    snapshot,
    stored,
    textbook,
    values,
    write_pair,
    write_split,
)


@pytest.fixture(autouse=True)
def inputs_are_never_written(tmp_path: Path) -> Iterator[None]:
    """Whatever a run does, the demonstration pair is afterwards what it was."""
    before = snapshot(DEMO)
    yield
    assert snapshot(DEMO) == before


def _check(pair: Pair, out: Path, report: Report, *, scale: float = 1.0) -> None:
    """Every repaired tensor has the textbook's rank and values; every other one is FT's; all are accounted for."""
    base, ft, found = read_tensors(pair.base), read_tensors(pair.ft), read_tensors(out)
    assert list(found) == list(ft)
    assert set(report.tensors) == set(base) | set(ft)
    for name, record in report.tensors.items():
        if record.action == "dropped":
            assert name not in ft
        elif record.action != "repaired":
            assert found[name] == ft[name]
        else:
            expected = textbook(values(base[name]), values(ft[name]), scale=scale)
            assert record.rank_kept == expected.rank
            assert record.threshold == pytest.approx(expected.tau, rel=1e-5)
            assert found[name][:2] == ft[name][:2]
            if found[name][0] == "F64":  # to the last place the textbook is no better
                off = np.linalg.norm(values(found[name]) - expected.sum)
                assert off <= 1e-10 * np.linalg.norm(expected.sum - values(base[name]))
            else:
                assert rounded_share(values(found[name]), expected.sum, found[name][0]) >= 0.999


def test_the_demo_pair(tmp_path: Path) -> None:
    pair = Pair(DEMO / "base", DEMO / "ft")
    report = api.repair(pair.base, pair.ft, tmp_path / "out")
    _check(pair, tmp_path / "out", report)
    actions = [record.action for record in report.tensors.values()]
    assert (actions.count("repaired"), actions.count("kept_ft")) == (30, 9)
    ft_index, index = (
        json.loads((d / "model.safetensors.index.json").read_text()) for d in (pair.ft, tmp_path / "out")
    )
    assert index == ft_index
    assert list(index["weight_map"]) == list(ft_index["weight_map"])
    for path in pair.ft.iterdir():
        if path.name.endswith(("json", "jinja")):
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes() or "index" in path.name
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in pair.ft.iterdir()} | {
        ".streamrepair",
        "streamrepair.json",
    }


def _with_another_layer(config: Path) -> str:
    parsed = json.loads(config.read_text())
    return json.dumps(parsed | {"num_hidden_layers": parsed["num_hidden_layers"] + 1})


@pytest.mark.slow
@pytest.mark.parametrize("out_dtype", ["same", "float32"])
def test_the_result_loads_in_transformers(tmp_path: Path, out_dtype: str) -> None:
    transformers = pytest.importorskip("transformers")
    options: dict[str, object] = {"out_dtype": out_dtype}
    api.repair(DEMO / "base", DEMO / "ft", tmp_path / "out", **options)  # type: ignore[arg-type]
    said: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = transformers.utils.logging.get_logger("transformers")  # it does not propagate
    logger.addHandler(listener)
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", output_loading_info=True, dtype="auto"
        )
        model(torch.arange(16)[None])
        assert said == []
        (tmp_path / "out" / "config.json").write_text(_with_another_layer(tmp_path / "out" / "config.json"))
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        assert any("layers.4" in message for message in said), "the listener was meant to hear of missing weights"
    finally:
        logger.removeHandler(listener)
    assert {key: list(found) for key, found in loading.items() if found} == {}
    assert str(model.dtype) == ("torch.float32" if out_dtype == "float32" else "torch.bfloat16")
    tensors = read_tensors(tmp_path / "out")
    state = model.state_dict()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(state[name].float().numpy(), values(tensor).astype(np.float32))


SHAPES = {"tall": (300, 80), "wide": (70, 260), "square": (96, 96), "norm": (96,), "thin": (1500, 3)}


@pytest.mark.parametrize(
    "dtypes",
    [
        ("BF16", "BF16"),
        ("F16", "F16"),
        ("F32", "F32"),
        ("F64", "F64"),
        ("F32", "BF16"),
        ("BF16", "F32"),
        ("F64", "F16"),
    ],
)
def test_every_float_dtype_and_mixture(tmp_path: Path, dtypes: tuple[str, str]) -> None:
    """BASE in two shards, FT in three: a tensor's neighbours are other ones on each side."""
    pair = write_pair(tmp_path, SHAPES, dtypes=dtypes, shards=(2, 3))
    before = snapshot(pair.base), snapshot(pair.ft)
    report = api.repair(pair.base, pair.ft, tmp_path / "out")
    _check(pair, tmp_path / "out", report)
    assert [r.action for r in report.tensors.values()].count("repaired") == 4
    assert {r.dtype for r in report.tensors.values()} == {dtypes[1]}
    assert (snapshot(pair.base), snapshot(pair.ft)) == before


def test_matrices_of_many_blocks_and_panels(tmp_path: Path) -> None:
    """Two block heights and a bit; the wide one read in columns in a small budget and whole in a large one."""
    pair = write_pair(tmp_path, {"tall": (4500, 520), "wide": (520, 4500)}, shards=(1, 1))
    report = api.repair(pair.base, pair.ft, tmp_path / "out", workers=1)
    _check(pair, tmp_path / "out", report)
    least = smallest_budget(pair)
    panels = {t.name: t.panel_rows for t in api.plan(pair.base, pair.ft, ram=least).tasks}
    assert panels["wide"] < 4500, "the budget was meant to force columns"
    api.repair(pair.base, pair.ft, tmp_path / "small", ram=least, workers=1)
    assert shard_bytes(tmp_path / "small") == shard_bytes(tmp_path / "out")


def test_numbers_depend_on_neither_workers_nor_memory_nor_sharding(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {**SHAPES, "large": (900, 600)}, shards=(3, 2))
    reports = {}
    for name, options in {
        "one": {"workers": 1},
        "three": {"workers": 3},
        "scarce": {"workers": 2, "ram": smallest_budget(pair)},
        "again": {"workers": 1},
    }.items():
        reports[name] = api.repair(pair.base, pair.ft, tmp_path / name, **options)  # type: ignore[arg-type]
        assert shard_bytes(tmp_path / name) == shard_bytes(tmp_path / "one")
    whole = write_split(tmp_path / "whole", read_tensors(pair.ft), 1)
    api.repair(pair.base, whole, tmp_path / "whole_out")
    assert read_tensors(tmp_path / "whole_out") == {
        name: read_tensors(tmp_path / "one")[name] for name in read_tensors(pair.ft)
    }
    digests = [{n: (r.digest, r.rank_kept, r.threshold) for n, r in rep.tensors.items()} for rep in reports.values()]
    assert all(found == digests[0] for found in digests)


def test_scale_moves_the_threshold(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {"w": (128, 128)})
    low = api.repair(pair.base, pair.ft, tmp_path / "low", scale=0.6)
    high = api.repair(pair.base, pair.ft, tmp_path / "high", scale=3.0)
    _check(pair, tmp_path / "low", low, scale=0.6)
    _check(pair, tmp_path / "high", high, scale=3.0)
    assert (low.tensors["w"].rank_kept or 0) > (high.tensors["w"].rank_kept or 0) > 0


def test_a_delta_of_zero_is_copied_bit_for_bit(tmp_path: Path) -> None:
    """Down to the sign of zero, which adding would lose, and last pieces shorter than a machine word."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 64)).astype(np.float32)
    weight[::2, ::3] = -0.0
    odd = bf16(rng.standard_normal((1, 2 * 1024 * 1024 + 1)))
    tensors: dict[str, Raw | np.ndarray] = {"w": weight, "h": weight.astype(np.float16), "odd": odd, "b": bf16(weight)}
    base = write_split(tmp_path / "base", tensors, 1)
    ft = write_split(tmp_path / "ft", tensors, 2)
    report = api.repair(base, ft, tmp_path / "out")
    assert {(r.action, r.reason) for r in report.tensors.values()} == {("copied", "delta is zero")}
    assert {k: v for k, v in shard_bytes(tmp_path / "out").items() if "index" not in k} == {
        k: v for k, v in shard_bytes(ft).items() if "index" not in k
    }
    wide = api.repair(base, ft, tmp_path / "out32", out_dtype="float32")
    assert {r.action for r in wide.tensors.values()} == {"copied"}
    assert read_tensors(tmp_path / "out32")["w"][2] == weight.tobytes()
    assert np.signbit(values(read_tensors(tmp_path / "out32")["b"])[0, 0])


def test_values_that_differ_only_in_the_sign_of_zero_are_fts(tmp_path: Path) -> None:
    weight = np.zeros((32, 32), np.float32)
    base = write_split(tmp_path / "base", {"w": weight}, 1)
    ft = write_split(tmp_path / "ft", {"w": -weight}, 1)
    report = api.repair(base, ft, tmp_path / "out")
    assert report.tensors["w"].action == "copied"
    assert read_tensors(tmp_path / "out") == read_tensors(ft)


EXOTIC: Mapping[str, Raw] = {
    "no_rows": ("F32", (0, 64), b""),
    "no_columns": ("BF16", (64, 0), b""),
    "scalar": ("F32", (), np.float32(1.5).tobytes()),
    "int_scalar": ("I64", (), bytes(range(8))),
    "f4": ("F4", (64, 64), bytes(range(256)) * 8),
    "f6": ("F6_E2M3", (64, 64), bytes(range(256)) * 12),
    "fp8": ("F8_E4M3", (64, 64), bytes(range(256)) * 16),
    "e8m0": ("F8_E8M0", (64,), bytes(range(64))),
    "bool": ("BOOL", (3,), b"\x01\x00\x01"),
    "u16": ("U16", (32, 64), bytes(range(256)) * 16),
    "i64": ("I64", (32, 64), bytes(range(256)) * 64),
    "complex": ("C64", (32, 32), bytes(range(256)) * 32),
    "half": bf16([1.0, -0.0, 3.0]),
}


@pytest.mark.parametrize("out_dtype", ["same", "float32"])
def test_what_is_no_matrix_of_plain_floats_is_copied_through(tmp_path: Path, out_dtype: str) -> None:
    """Also shards of which nothing but zero-size tensors are left."""
    other = {name: (dtype, shape, content[::-1]) for name, (dtype, shape, content) in EXOTIC.items()}
    names = list(EXOTIC)
    for side, tensors in (("base", other), ("ft", EXOTIC)):
        folder = tmp_path / side
        folder.mkdir()
        write_safetensors(folder / "model-1.safetensors", {n: tensors[n] for n in names[:2]})
        write_safetensors(folder / "model-2.safetensors", {n: tensors[n] for n in names[2:]})
        write_index(folder, {n: f"model-{1 if n in names[:2] else 2}.safetensors" for n in names})
    report = api.repair(tmp_path / "base", tmp_path / "ft", tmp_path / "out", out_dtype=out_dtype)  # type: ignore[arg-type]
    assert {r.action for r in report.tensors.values()} == {"kept_ft"}
    found = read_tensors(tmp_path / "out")
    for name, tensor in EXOTIC.items():
        if out_dtype == "float32" and tensor[0] == "BF16":
            assert found[name][:2] == ("F32", tensor[1])
            assert found[name][2] == values(tensor).astype(np.float32).tobytes()
        else:
            assert found[name] == tensor
    assert api.verify(tmp_path / "out").damage == ()
    assert "nothing" in _second_run_notes(tmp_path, out_dtype)


def _second_run_notes(tmp_path: Path, out_dtype: str) -> str:
    watcher = Recorder()
    api.repair(tmp_path / "base", tmp_path / "ft", tmp_path / "out", out_dtype=out_dtype, watcher=watcher)  # type: ignore[arg-type]
    return " ".join(watcher.notes)


class Recorder:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.done_bytes = self.total_bytes = self.found_bytes = 0
        self.ended = 0
        self._lock = threading.Lock()

    def begin(self, plan: Plan, done_bytes: int) -> None:
        """Remember what there is to do."""
        self.total_bytes, self.found_bytes = sum(t.out.nbytes for t in plan.tasks), done_bytes

    def advance(self, done_bytes: int) -> None:
        """Add up."""
        with self._lock:
            self.done_bytes += done_bytes

    def warn(self, message: str) -> None:
        """Remember."""
        self.warnings.append(message)

    def note(self, message: str) -> None:
        """Remember."""
        self.notes.append(message)

    def end(self) -> None:
        """Count."""
        self.ended += 1


def test_kept_dropped_and_resized_tensors_are_told_of(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    before, after = matrices(rng, (64, 64))
    base = {"w": stored(before, "BF16"), "gone": bf16(before), "grown": bf16(before)}
    ft = {"w": stored(after, "BF16"), "new": bf16(after), "grown": bf16(np.vstack([after, after]))}
    pair = Pair(write_split(tmp_path / "base", base, 1), write_split(tmp_path / "ft", ft, 1))
    watcher = Recorder()
    report = api.repair(pair.base, pair.ft, tmp_path / "out", watcher=watcher)
    _check(pair, tmp_path / "out", report)
    assert {name: (r.action, r.reason) for name, r in report.tensors.items()} == {
        "w": ("repaired", ""),
        "new": ("kept_ft", "not in the base checkpoint"),
        "grown": ("kept_ft", "shapes differ: [64, 64] in base, [128, 64] fine-tuned"),
        "gone": ("dropped", "not in the fine-tuned checkpoint"),
    }
    assert len(report.warnings) == 3
    assert list(report.warnings) == watcher.warnings
    assert watcher.done_bytes == watcher.total_bytes == 2 * (4096 + 4096 + 8192)
    assert watcher.ended == 1


def test_include_and_exclude(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {"a.q": (64, 64), "a.k": (64, 64), "b.q": (64, 64)})
    report = api.repair(pair.base, pair.ft, tmp_path / "out", include="^a", exclude="k$")
    assert {name: r.action for name, r in report.tensors.items()} == {
        "a.q": "repaired",
        "a.k": "kept_ft",
        "b.q": "kept_ft",
    }
    _check(pair, tmp_path / "out", report)


def test_the_index_keeps_order_and_metadata_and_counts_the_bytes_anew(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {"z": (64, 64), "a": (64, 64), "m": (64,)}, shards=(1, 2))
    where = json.loads((pair.ft / "model.safetensors.index.json").read_text())["weight_map"]
    order = ["m", "z", "a"]
    write_index(pair.ft, {name: where[name] for name in order}, total_size=1, total_parameters=10**30, note="ä")
    for out_dtype, item in (("same", 2), ("float32", 4)):
        api.repair(pair.base, pair.ft, tmp_path / out_dtype, out_dtype=out_dtype)  # type: ignore[arg-type]
        index = json.loads((tmp_path / out_dtype / "model.safetensors.index.json").read_text())
        assert index["metadata"] == {"total_size": item * (2 * 4096 + 64), "total_parameters": 10**30, "note": "ä"}
        assert list(index["weight_map"].items()) == [(name, where[name]) for name in order]


def test_float32_output_is_the_unrounded_sum(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, SHAPES)
    report = api.repair(pair.base, pair.ft, tmp_path / "out", out_dtype="float32")
    base, ft, found = read_tensors(pair.base), read_tensors(pair.ft), read_tensors(tmp_path / "out")
    for name, record in report.tensors.items():
        if record.action == "repaired":
            exact = textbook(values(base[name]), values(ft[name])).sum
            delta = exact - values(base[name])
            assert np.linalg.norm(values(found[name]) - exact) <= 1e-4 * np.linalg.norm(delta)
            assert (record.rounding_loss or 0.0) < 1e-3
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"


def test_a_delta_of_exactly_low_rank_is_kept_with_a_warning(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    before = rng.integers(-8, 8, (64, 64)).astype(np.float32)
    after = before + np.outer(rng.integers(-4, 4, 64), rng.integers(-4, 4, 64)).astype(np.float32)
    base = write_split(tmp_path / "base", {"w": before}, 1)
    ft = write_split(tmp_path / "ft", {"w": after}, 1)
    report = api.repair(base, ft, tmp_path / "out")
    assert (report.tensors["w"].action, len(report.warnings)) == ("kept_ft", 1)
    assert report.warnings == report.tensors["w"].warnings
    assert "low rank" in report.tensors["w"].reason
    assert report.tensors["w"].frob_delta_in == pytest.approx(np.linalg.norm(after - before))
    assert report.tensors["w"].backend is not None
    assert report.tensors["w"].climbed
    assert read_tensors(tmp_path / "out") == read_tensors(ft)


def test_low_rank_is_settled_in_the_smallest_budget_a_plan_accepts(tmp_path: Path) -> None:
    """Of which the float64 SVD, which would have told it too, needs far more."""
    rng = np.random.default_rng(0)
    base = {name: rng.integers(-8, 8, (700, 700)).astype(np.float32) for name in ("a", "b")}
    low = rng.integers(-4, 4, (700, 4)) @ rng.integers(-4, 4, (4, 700))
    ft = {name: before + low.astype(np.float32) for name, before in base.items()}
    pair = Pair(write_split(tmp_path / "base", base, 1), write_split(tmp_path / "ft", ft, 1))
    least = smallest_budget(pair)
    planned = api.plan(pair.base, pair.ft, ram=least)
    assert not any(full_fits(planned).values()), "the budget was meant to be too small"
    report = api.repair(pair.base, pair.ft, tmp_path / "out", ram=least)
    assert {r.backend for r in report.tensors.values()} == {"row-space"}
    assert all("low rank" in r.reason for r in report.tensors.values())


def test_full_runs_in_every_budget_that_its_plan_accepts_for_two_workers(tmp_path: Path) -> None:
    """What the plan projects for a task is its own: other workers' tasks are not in its way."""
    pair = write_pair(tmp_path, {"a": (600, 600), "b": (600, 600)})
    roomy = api.plan(pair.base, pair.ft, ram="4GB", workers=2, backend="full", device="cpu")
    planned = api.plan(
        pair.base, pair.ft, ram=roomy.ram_projected_bytes - roomy.at_once[0].ram_bytes // 2, workers=2,
        backend="full", device="cpu",
    )  # fmt: skip
    assert (planned.workers, planned.side_by_side) == (2, 1), "the budget was meant to be too small for both at once"
    assert all(full_fits(planned).values())
    report = api.repair(
        pair.base, pair.ft, tmp_path / "out", ram=planned.ram_allowed_bytes, workers=2, backend="full", device="cpu"
    )
    assert {r.backend for r in report.tensors.values()} == {"full"}


def test_a_spectrum_too_wide_for_the_budget_names_one_that_works(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    delta = rng.standard_normal((300, 300)) + 1e9 * np.outer(rng.standard_normal(300), rng.standard_normal(300))
    base = write_split(tmp_path / "base", {"w": np.zeros((300, 300))}, 1)
    pair = Pair(base, write_split(tmp_path / "ft", {"w": delta}, 1))
    least = smallest_budget(pair)
    with pytest.raises(NumericalError, match=r"tensor w .*with --ram \d+MB --workers 1, or leave it out") as caught:
        api.repair(pair.base, pair.ft, tmp_path / "out", ram=least)
    enough = str(caught.value).partition("--ram ")[2].partition(" ")[0]
    report = api.repair(pair.base, pair.ft, tmp_path / "out", ram=enough, workers=1)
    assert report.tensors["w"].backend == "full"


def test_what_is_meant_to_be_left_is_not_warned_of(tmp_path: Path) -> None:
    """A spectrum too wide for Gram matrices: the search for zero rows is a step on the way, and no fault."""
    rng = np.random.default_rng(0)
    delta = rng.standard_normal((64, 64)) + 1e9 * np.outer(rng.standard_normal(64), rng.standard_normal(64))
    base = write_split(tmp_path / "base", {"w": np.zeros((64, 64))}, 1)
    ft = write_split(tmp_path / "ft", {"w": delta}, 1)
    report = api.repair(base, ft, tmp_path / "out")
    record = report.tensors["w"]
    assert (record.action, record.backend) == ("repaired", "full")
    assert any(reason.startswith("rows: ") for reason in record.climbed)
    assert len(report.warnings) == 1
    assert report.warnings[0].startswith("tensor w: gram-float64: ")


def test_more_memory_than_is_free_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget is the user's word, and may be for another machine."""
    pair = write_pair(tmp_path, {"w": (64, 48)})
    monkeypatch.setattr(limits, "free_bytes", lambda: 90_000_000)
    report = api.repair(pair.base, pair.ft, tmp_path / "out", ram="4GB", workers=1)
    assert [w for w in report.warnings if "90 MB are free: the kernel may end the run; allow less with --ram" in w]
    monkeypatch.setattr(limits, "free_bytes", lambda: 900_000_000)
    assert not any("free" in w for w in api.repair(pair.base, pair.ft, tmp_path / "two", ram="4GB").warnings)


def test_the_report_is_whole_and_finite(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, SHAPES)
    report = api.repair(pair.base, pair.ft, tmp_path / "out", report=tmp_path / "copy.json", ram="2GB")
    text = (tmp_path / "out" / "streamrepair.json").read_bytes()
    assert (tmp_path / "copy.json").read_bytes() == text
    parsed = json.loads(text, parse_constant=pytest.fail)
    assert parsed["format"] == "streamrepair.report/1"
    assert parsed["budget"]["ram_allowed_bytes"] == 2_000_000_000
    assert parsed["budget"]["ram_measured_bytes"] > 10_000_000
    assert parsed["timings"]["bytes_written"] >= sum(len(t[2]) for t in read_tensors(tmp_path / "out").values())
    record = report.tensors["tall"]
    delta = values(read_tensors(pair.ft)["tall"]) - values(read_tensors(pair.base)["tall"])
    s = np.sort(np.linalg.svd(delta, compute_uv=False))[::-1]
    assert record.frob_delta_in == pytest.approx(np.linalg.norm(delta), rel=1e-6)
    assert record.frob_delta_out == pytest.approx(np.linalg.norm(s[: record.rank_kept]), rel=1e-5)
    assert record.nearest_sigma_gap == pytest.approx(np.abs(s / (record.threshold or 1.0) - 1).min(), rel=1e-3)


BAD = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])


@BAD
@pytest.mark.parametrize("side", ["base", "ft"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_an_input_that_is_not_finite_leaves_no_out(tmp_path: Path, side: str, dtype: str, value: float) -> None:
    pair = write_pair(tmp_path, {"a": (64, 64), "w": (300, 40)}, dtypes=(dtype, dtype))
    _spoil(getattr(pair, side), "w", 7, value)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=rf"{side}/.*safetensors: tensor w holds NaN or infinity at element 7,"):
        api.repair(pair.base, pair.ft, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert snapshot(tmp_path) == before
    report = api.repair(pair.base, pair.ft, tmp_path / "out", on_nonfinite="copy-ft")
    assert {name: r.action for name, r in report.tensors.items()} == {"a": "repaired", "w": "kept_ft"}
    assert any("tensor w holds NaN" in warning for warning in report.warnings)
    assert read_tensors(tmp_path / "out")["w"] == read_tensors(pair.ft)["w"]


def _spoil(folder: Path, name: str, element: int, value: float) -> None:
    """Overwrite one element of a tensor in place."""
    for path in folder.glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        entry = json.loads(content[8:start]).get(name)
        if entry is not None:
            dtype = entry["dtype"]
            bits = (np.array(value, np.float32).view(np.uint32) >> 16).astype(np.uint16)
            number = bits.tobytes() if dtype == "BF16" else raw(stored(np.array(value), dtype))[2]
            at = start + entry["data_offsets"][0] + element * len(number)
            content[at : at + len(number)] = number
            path.write_bytes(content)


def test_a_vector_that_is_not_finite_is_refused_too(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {"w": (64, 64), "v": (64,)})
    _spoil(pair.ft, "v", 63, math.nan)
    with pytest.raises(InputError, match="tensor v holds NaN or infinity at element 63"):
        api.repair(pair.base, pair.ft, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["v", "grown", "left", "gone", "f8"])
def test_what_is_not_used_of_base_is_refused_if_it_is_not_finite(tmp_path: Path, name: str) -> None:
    """BASE's side of a vector, of a tensor of another shape, of an excluded one, and of one that FT lacks.

    FP8 is no plain number and is not looked into. Where such tensors are passed through, FT's side is all that counts.
    """
    rng = np.random.default_rng(0)
    ft = {"w": bf16(rng.standard_normal((64, 64))), "v": bf16(np.ones(70)), "grown": bf16(np.ones((80, 64)))}
    ft |= {"left": bf16(rng.standard_normal((64, 64))), "f8": ("F8_E4M3", (64, 64), b"\x38" * 4096)}
    base = ft | {"grown": bf16(np.ones((70, 64))), "gone": bf16(np.ones((70, 70)))}
    if name == "f8":
        base["f8"] = ("F8_E4M3", (64, 64), b"\x7f" * 4096)
    pair = Pair(write_split(tmp_path / "base", base, 1), write_split(tmp_path / "ft", ft, 1))
    planned = api.plan(pair.base, pair.ft, exclude="left")
    sound = api.repair(pair.base, pair.ft, tmp_path / "sound", exclude="left")
    assert sound.timings.bytes_read == pytest.approx(planned.read_bytes, abs=2 << 14)
    if name == "f8":
        return
    _spoil(pair.base, name, 69, math.inf)
    with pytest.raises(
        InputError, match=rf"base/model\.safetensors: tensor {name} holds NaN or infinity at element 69"
    ):
        api.repair(pair.base, pair.ft, tmp_path / "out", exclude="left")
    assert not (tmp_path / "out").exists()
    report = api.repair(pair.base, pair.ft, tmp_path / "out", exclude="left", on_nonfinite="copy-ft")
    assert read_tensors(tmp_path / "out") == read_tensors(tmp_path / "sound")
    assert report.timings.bytes_read < sound.timings.bytes_read


def test_a_refusal_leaves_what_was_in_out_before(tmp_path: Path) -> None:
    """An empty folder stays; with --overwrite other files stay, and only the earlier result is gone."""
    pair = write_pair(tmp_path, {"w": (64, 64)}, shards=(1, 1))
    out = tmp_path / "out"
    api.repair(pair.base, pair.ft, out)
    (out / "notes.txt").write_text("mine")
    (out / "sub").mkdir()
    (out / "sub" / "kept.bin").write_bytes(b"mine")
    (tmp_path / "empty").mkdir()
    _spoil(pair.ft, "w", 0, math.nan)
    with pytest.raises(InputError, match="NaN"):
        api.repair(pair.base, pair.ft, tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []
    with pytest.raises(InputError, match="NaN"):
        api.repair(pair.base, pair.ft, out, overwrite=True)
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*")) == ["notes.txt", "sub", "sub/kept.bin"]


def test_an_interrupted_run_that_ends_in_a_refusal_takes_out_away_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = write_pair(tmp_path, {"w": (64, 64), "a": (60, 60)}, shards=(1, 1))
    _spoil(pair.ft, "a", 0, math.nan)
    monkeypatch.setattr(osfile, "os", Kernel(("pwrite",), fails(4, 5)))
    with pytest.raises(OutputError):
        api.repair(pair.base, pair.ft, tmp_path / "out", workers=1)
    assert (tmp_path / "out").exists()
    monkeypatch.undo()
    with pytest.raises(InputError, match="NaN"):
        api.repair(pair.base, pair.ft, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_a_tail_of_zeros_is_no_noise(tmp_path: Path) -> None:
    """The lowest quarter of a delta of rank 40 of 64 is what rounding left of zero: no threshold follows from it."""
    rng = np.random.default_rng(0)
    after = (rng.integers(-2, 3, (96, 40)) @ rng.integers(-2, 3, (40, 64))).astype(float)
    base = write_split(tmp_path / "base", {"w": stored(np.zeros((96, 64)), "F32")}, 1)
    ft = write_split(tmp_path / "ft", {"w": stored(after, "F32")}, 1)
    record = api.repair(base, ft, tmp_path / "out", sigma="tail").tensors["w"]
    assert (record.action, record.rank_kept) == ("kept_ft", None)
    assert "its smallest singular values are zero" in record.reason
    assert api.repair(base, ft, tmp_path / "median").tensors["w"].action == "repaired"


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_overflow_on_the_way_down_fails_naming_the_tensor(tmp_path: Path, dtype: str) -> None:
    """The noise that kept one element finite is removed."""
    rng = np.random.default_rng(0)
    largest = 65504.0 if dtype == "F16" else float(np.uint32(0x7F7F0000).view(np.float32))
    before = np.full((64, 64), 0.8 * largest)
    after = before + largest * (0.05 + 0.01 * rng.standard_normal((64, 64)))
    before[0, 0] = after[0, 0] = largest
    base = write_split(tmp_path / "base", {"some.weight": stored(before, dtype)}, 1)
    ft = write_split(tmp_path / "ft", {"some.weight": stored(after, dtype)}, 1)
    expected = textbook(values(read_tensors(base)["some.weight"]), values(read_tensors(ft)["some.weight"]))
    assert expected.sum.max() > largest * 1.02, "the case was meant to overflow"
    with pytest.raises(NumericalError, match=rf"tensor some\.weight: a repaired value overflows {dtype}.*float32"):
        api.repair(base, ft, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    if dtype == "F16":
        api.repair(base, ft, tmp_path / "out32", out_dtype="float32")
        assert values(read_tensors(tmp_path / "out32")["some.weight"]).max() > largest


def test_a_delta_too_large_for_float32_products_is_said_to_overflow(tmp_path: Path) -> None:
    """And not to be a processor's fault: its rows are merged in float32, in which only some of them are numbers."""
    rng = np.random.default_rng(0)
    before, after = (3e38 * rng.uniform(-1.0, 1.0, (400, 300)) for _ in range(2))
    after[:, :40] = -before[:, :40]
    base = write_split(tmp_path / "base", {"some.weight": stored(before, "BF16")}, 1)
    ft = write_split(tmp_path / "ft", {"some.weight": stored(after, "BF16")}, 1)
    with pytest.raises(NumericalError, match=r"some\.weight: a repaired value overflows BF16: .*--out-dtype float32"):
        api.repair(base, ft, tmp_path / "out", scale=0.5)


@pytest.mark.parametrize("shape", [(4200, 64), (64, 4200)], ids=str)
def test_a_block_that_a_merge_leaves_out_fails_the_run(
    tmp_path: Path, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wide tensor is gathered in memory that held something else."""
    pair, original = write_pair(tmp_path, {"some.weight": shape}), HostMerger.merged
    monkeypatch.setattr(HostMerger, "merged", lambda self, panels: islice(original(self, panels), 2))
    with pytest.raises(NumericalError, match=r"some\.weight: there is no result for row"):
        api.repair(pair.base, pair.ft, tmp_path / "out")


@pytest.mark.parametrize(
    ("dtypes", "size", "remedy"), [(("BF16", "F16"), 1e5, "--out-dtype float32"), (("F64", "F32"), 1e200, "--exclude")]
)
def test_values_of_base_that_overflow_fts_dtype_fail_where_nothing_of_the_delta_is_kept(
    tmp_path: Path, dtypes: tuple[str, str], size: float, remedy: str
) -> None:
    rng = np.random.default_rng(0)
    before, after = size * rng.standard_normal((64, 64)), rng.standard_normal((64, 64))
    assert textbook(before, after).rank == 0
    base = write_split(tmp_path / "base", {"some.weight": stored(before, dtypes[0])}, 1)
    ft = write_split(tmp_path / "ft", {"some.weight": stored(after, dtypes[1])}, 1)
    with pytest.raises(NumericalError, match=rf"some\.weight: a repaired value overflows {dtypes[1]}: .*{remedy}"):
        api.repair(base, ft, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_weights_whose_squares_float32_cannot_hold_are_repaired(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shape = (64, 64)
    tensors: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, size in (("large", 1e21), ("small", 1e-38)):
        before, after = matrices(rng, shape)
        tensors[name] = (20 * size * before, 20 * size * after)
    base = write_split(tmp_path / "base", {n: stored(b, "BF16") for n, (b, _) in tensors.items()}, 1)
    ft = write_split(tmp_path / "ft", {n: stored(f, "BF16") for n, (_, f) in tensors.items()}, 1)
    report = api.repair(base, ft, tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    for name in tensors:
        expected = textbook(values(read_tensors(base)[name]), values(read_tensors(ft)[name]))
        assert report.tensors[name].rank_kept == expected.rank > 0
        assert rounded_share(values(found[name]), expected.sum, "BF16") > 0.999
        assert 0 < (report.tensors[name].rounding_loss or 0) < 1


@pytest.mark.parametrize("error", [NumericalError("made up"), KeyboardInterrupt(), ZeroDivisionError()])
def test_a_failure_in_the_middle_keeps_finished_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """And the next run of the same command redoes only the others."""
    pair = write_pair(tmp_path, {f"w{i}": (64, 64 + i) for i in range(6)}, shards=(1, 2))
    whole = tmp_path / "whole"
    api.repair(pair.base, pair.ft, whole, workers=1)
    started: list[str] = []
    repair = task._repair

    def failing(job: task.Job) -> object:
        started.append(job.task.name)
        if len(started) == 4:
            raise error
        return repair(job)

    monkeypatch.setattr(task, "_repair", failing)
    with pytest.raises(type(error)):
        api.repair(pair.base, pair.ft, tmp_path / "out", workers=1)
    monkeypatch.setattr(task, "_repair", lambda job: (started.append(job.task.name), repair(job))[1])
    first, started[:] = started[:3], []
    report = api.repair(pair.base, pair.ft, tmp_path / "out", workers=1)
    assert sorted(started) == sorted(set(report.tensors) - set(first))
    assert shard_bytes(tmp_path / "out") == shard_bytes(whole)


def test_a_keyboard_interrupt_of_the_caller_keeps_what_was_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a notebook: no handler, the exception is raised wherever the calling thread is."""
    pair = write_pair(tmp_path, {f"w{i}": (64, 64 + i) for i in range(6)})

    class Interrupting(Recorder):
        def warn(self, message: str) -> None:
            raise KeyboardInterrupt(message)

    # The caller's thread meets the low rank of the last tensor as a warning.
    flat = bf16(np.ones((64, 64)))
    for folder, content in ((pair.base, bf16(np.zeros((64, 64)))), (pair.ft, flat)):
        tensors = read_tensors(folder)
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        write_split(folder, {**tensors, "z": content}, 1)
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        api.repair(pair.base, pair.ft, tmp_path / "out", workers=1, watcher=Interrupting())
    assert threading.active_count() == threads
    watcher = Recorder()
    api.repair(pair.base, pair.ft, tmp_path / "out", workers=1, watcher=watcher)
    assert watcher.found_bytes > 0
    assert api.verify(tmp_path / "out").damage == ()


def test_a_stop_request_ends_the_run_and_the_next_call_goes_on(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {f"w{i}": (64, 64 + i) for i in range(8)})
    stop = StopRequest()

    class Stopping(Recorder):
        def advance(self, done_bytes: int) -> None:
            super().advance(done_bytes)
            if self.done_bytes > self.total_bytes / 3 and not stop.requested:
                stop.request("enough")
                time.sleep(0.5)  # the run looks a few times a second

    with pytest.raises(InterruptedRunError, match="enough"):
        api.repair(pair.base, pair.ft, tmp_path / "out", workers=1, stop=stop, watcher=Stopping())
    watcher = Recorder()
    api.repair(pair.base, pair.ft, tmp_path / "out", workers=1, watcher=watcher)
    assert 0 < watcher.found_bytes < watcher.total_bytes
    assert watcher.found_bytes + watcher.done_bytes == watcher.total_bytes


def test_a_finished_out_is_left_as_it_is(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, SHAPES)
    out = tmp_path / "out"
    first = api.repair(pair.base, pair.ft, out)
    before = snapshot(out)
    watcher = Recorder()
    second = api.repair(pair.base, pair.ft, out, watcher=watcher, report=tmp_path / "copy.json", ram="1GB", workers=1)
    changed = {name for name, found in snapshot(out).items() if found != before.get(name)}
    assert changed <= {".streamrepair/lock"}
    assert (second, watcher.notes) == (first, ["nothing to do: the result is whole"])
    assert (tmp_path / "copy.json").read_bytes() == (out / "streamrepair.json").read_bytes()


def test_a_missing_sidecar_or_report_is_written_again(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, SHAPES)
    out = tmp_path / "out"
    first = api.repair(pair.base, pair.ft, out)
    shards = shard_bytes(out)
    for name in ("tokenizer.json", "model.safetensors.index.json", "streamrepair.json"):
        (out / name).unlink()
        watcher = Recorder()
        report = api.repair(pair.base, pair.ft, out, watcher=watcher)
        assert watcher.found_bytes == watcher.total_bytes
        assert (report.timings.bytes_written, shard_bytes(out)) == (first.timings.bytes_written, shards)
        assert (out / name).exists()


def test_a_sidecar_that_is_not_fts_any_more_is_told_of(tmp_path: Path) -> None:
    """FT's tokenizer was mended, or OUT's emptied: the result was called whole and no more said."""
    pair = write_pair(tmp_path, {"w": (64, 64)}, shards=(1, 1))
    out = tmp_path / "out"

    def told() -> list[str]:
        watcher = Recorder()
        api.repair(pair.base, pair.ft, out, watcher=watcher, out_dtype="float32")
        return watcher.warnings

    assert told() == []
    assert told() == [], "config.json has another dtype than FT's, as it must"
    (pair.ft / "tokenizer.json").write_text("mended")
    (out / "config.json").write_text("")
    config, tokenizer = out / "config.json", out / "tokenizer.json"
    assert told() == [
        f"no copies of FT's: {config}, {tokenizer}: to have FT's, remove them and run the same command again"
    ]
    tokenizer.unlink()
    config.unlink()
    assert told() == []
    assert tokenizer.read_text() == "mended"


def test_overwrite_begins_anew_and_takes_the_earlier_runs_files_only(tmp_path: Path) -> None:
    pair = write_pair(tmp_path / "one", {"w": (64, 64), "v": (50, 64)}, shards=(1, 2))
    other = write_pair(tmp_path / "two", {"w": (64, 64)}, shards=(1, 1), seed=1)
    (pair.ft / "added_tokens.json").write_text("{}")
    out = tmp_path / "out"
    api.repair(pair.base, pair.ft, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds a run that differs.*BASE file.*--overwrite"):
        api.repair(other.base, other.ft, out)
    report = api.repair(other.base, other.ft, out, overwrite=True)
    assert {p.name for p in out.iterdir()} == {
        "model.safetensors", "config.json", "tokenizer.json", "notes.txt", "streamrepair.json", ".streamrepair",
    }  # fmt: skip
    _check(other, out, report)
    assert api.verify(out).damage == ()


def test_overwrite_does_not_touch_weights_of_others(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {"w": (64, 64)})
    out = tmp_path / "out"
    out.mkdir()
    (out / "adapter_model.safetensors").write_bytes(b"precious")
    before = snapshot(out)
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"not empty|adapter_model"):
            api.repair(pair.base, pair.ft, out, overwrite=overwrite)
        assert snapshot(out) == before


def test_overwrite_goes_on_with_an_unfinished_run_of_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch system repeats the whole command line; it would otherwise begin anew for ever."""
    pair = write_pair(tmp_path, {f"w{i}": (64, 64) for i in range(5)})
    out = tmp_path / "out"
    api.repair(pair.base, pair.ft, out, overwrite=True)
    expected = shard_bytes(out)
    monkeypatch.setattr(commit, "_EVERY_S", 0.0)
    monkeypatch.setattr(osfile, "os", Kernel(("replace",), fails(2, 5)))
    with pytest.raises(OutputError):
        api.repair(pair.base, pair.ft, out, overwrite=True, workers=1)
    monkeypatch.undo()
    watcher = Recorder()
    api.repair(pair.base, pair.ft, out, overwrite=True, watcher=watcher)
    assert watcher.found_bytes > 0
    assert shard_bytes(out) == expected


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_damaged_tensor_of_a_sealed_shard_is_redone_alone(tmp_path: Path, overwrite: bool) -> None:
    """Without --overwrite only that tensor; with it everything, as it says."""
    pair = write_pair(tmp_path, {f"w{i}": (64, 64) for i in range(4)}, shards=(1, 2))
    out = tmp_path / "out"
    api.repair(pair.base, pair.ft, out)
    expected = shard_bytes(out)
    victim = out / "model-00002-of-00002.safetensors"
    victim.write_bytes(expected[victim.name][:-1] + bytes([expected[victim.name][-1] ^ 4]))
    assert [d.where for d in api.verify(out).damage] == ["w3"]
    watcher = Recorder()
    report = api.repair(pair.base, pair.ft, out, overwrite=overwrite, watcher=watcher)
    assert shard_bytes(out) == expected
    assert watcher.done_bytes == (watcher.total_bytes if overwrite else 64 * 64 * 2)
    assert len(report.warnings) == (0 if overwrite else 1)
    assert overwrite or "tensor w3 is damaged and is done again" in report.warnings[0]
    assert api.verify(out).damage == ()


@pytest.mark.parametrize("damage", ["cut", "header", "gone"])
def test_a_shard_that_was_cut_or_lost_is_written_again(tmp_path: Path, damage: str) -> None:
    pair = write_pair(tmp_path, {f"w{i}": (64, 64) for i in range(4)}, shards=(1, 2))
    out = tmp_path / "out"
    api.repair(pair.base, pair.ft, out)
    expected = shard_bytes(out)
    victim = out / "model-00001-of-00002.safetensors"
    content = expected[victim.name]
    if damage == "gone":
        victim.unlink()
    else:
        victim.write_bytes(content[:-100] if damage == "cut" else content[:20] + b"!" + content[21:])
    api.repair(pair.base, pair.ft, out)
    assert shard_bytes(out) == expected


@pytest.mark.parametrize("where", ["equal", "inside", "around", "shard linked"])
@pytest.mark.parametrize("side", ["base", "ft"])
def test_an_out_that_overlaps_an_input_is_refused(tmp_path: Path, side: str, where: str) -> None:
    pair = write_pair(tmp_path / "in", {"w": (64, 64)}, shards=(1, 1))
    folder: Path = getattr(pair, side)
    out = {"equal": folder, "inside": folder / "sub" / "out", "around": tmp_path / "in"}.get(where, tmp_path / "out")
    if where == "shard linked":
        out.mkdir()
        (out / "model.safetensors").hardlink_to(folder / "model.safetensors")
    before = snapshot(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(InputError, match="name another"):
            api.repair(pair.base, pair.ft, out, overwrite=overwrite)
    assert snapshot(tmp_path) == before


def test_out_may_lie_beside_inputs_that_are_named_as_files(tmp_path: Path) -> None:
    """`streamrepair base.safetensors ft.safetensors out` in one folder; but not in that folder itself."""
    pair = write_pair(tmp_path / "in", {"w": (64, 64)}, shards=(1, 1))
    base, ft = ((getattr(pair, s) / "model.safetensors").rename(tmp_path / f"{s}.safetensors") for s in ("base", "ft"))
    report = api.repair(base, ft, tmp_path / "out")
    assert report.tensors["w"].action == "repaired"
    assert (tmp_path / "out" / "ft.safetensors").exists()
    with pytest.raises(InputError, match="name another folder"):
        api.repair(base, ft, tmp_path, overwrite=True)
    with pytest.raises(InputError, match="name another place"):
        api.repair(base, ft, tmp_path / "out2", report=ft)


def test_an_out_that_is_a_file_or_a_link_is_refused(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {"w": (64, 64)})
    (tmp_path / "file").write_text("mine")
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    said = {"file": "file is not a folder", "link": "link is a link: .* leads to, .*target$", "nowhere": "not a folder"}
    for name, what in said.items():
        for overwrite in (False, True):
            with pytest.raises(InputError, match=what):
                api.repair(pair.base, pair.ft, tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_is_too_small_is_met_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = write_pair(tmp_path, {"w": (64, 64)})
    monkeypatch.setattr(osfile, "free_bytes", lambda _: 1000)
    with pytest.raises(DiskSpaceError, match=r"needs .* 1 kB are free"):
        api.repair(pair.base, pair.ft, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_by_little_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not "needs 7.02 MB, 7.02 MB are free"."""
    pair = write_pair(tmp_path, {"w": (64, 64)})
    (pair.ft / "vocab.json").write_bytes(bytes(3_004_000))
    monkeypatch.setattr(osfile, "free_bytes", lambda _: 7_016_000)
    with pytest.raises(DiskSpaceError, match=r"needs 7\.0(19|2)\d* MB, 7\.016 MB are free"):
        api.repair(pair.base, pair.ft, tmp_path / "out")


def test_a_disk_need_hold_only_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small result fits a small disk; sidecars count at their size."""
    pair = write_pair(tmp_path, {"w": (64, 64)})
    (pair.ft / "vocab.json").write_bytes(bytes(3_000_000))
    monkeypatch.setattr(osfile, "free_bytes", lambda _: 6_000_000)
    with pytest.raises(DiskSpaceError, match=r"needs 7\.0. MB, 6 MB are free"):
        api.repair(pair.base, pair.ft, tmp_path / "out")
    monkeypatch.setattr(osfile, "free_bytes", lambda _: 7_200_000)
    api.repair(pair.base, pair.ft, tmp_path / "out")
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert 3_000_000 < written < 7_200_000
