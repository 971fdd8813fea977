"""A repair end to end, against a textbook float64 SVD; and that nothing but the numbers decides the numbers."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from streamrepair import api
from streamrepair.decompose.host import HostMerger
from streamrepair.engine import limits
from streamrepair.engine.fit import full_fits
from streamrepair.errors import NumericalError
from tests.builders import Raw, bf16, write_index, write_safetensors
from tests.decompose.sources import with_spectrum
from tests.engine.results import Recorder, check_result
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

pytestmark = pytest.mark.usefixtures("inputs_are_never_written")


def test_the_demo_pair(tmp_path: Path) -> None:
    pair = Pair(DEMO / "base", DEMO / "ft")
    report = api.repair(pair.base, pair.ft, tmp_path / "out")
    check_result(pair, tmp_path / "out", report)
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
    check_result(pair, tmp_path / "out", report)
    assert [r.action for r in report.tensors.values()].count("repaired") == 4
    assert {r.dtype for r in report.tensors.values()} == {dtypes[1]}
    assert (snapshot(pair.base), snapshot(pair.ft)) == before


def test_matrices_of_many_blocks_and_panels(tmp_path: Path) -> None:
    """Two block heights and a bit; the wide one read in columns in a small budget and whole in a large one."""
    pair = write_pair(tmp_path, {"tall": (4500, 520), "wide": (520, 4500)}, shards=(1, 1))
    report = api.repair(pair.base, pair.ft, tmp_path / "out", workers=1)
    check_result(pair, tmp_path / "out", report)
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
    check_result(pair, tmp_path / "low", low, scale=0.6)
    check_result(pair, tmp_path / "high", high, scale=3.0)
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


def test_kept_dropped_and_resized_tensors_are_told_of(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    before, after = matrices(rng, (64, 64))
    base = {"w": stored(before, "BF16"), "gone": bf16(before), "grown": bf16(before)}
    ft = {"w": stored(after, "BF16"), "new": bf16(after + before), "grown": bf16(np.vstack([after, after]))}
    pair = Pair(write_split(tmp_path / "base", base, 1), write_split(tmp_path / "ft", ft, 1))
    watcher = Recorder()
    report = api.repair(pair.base, pair.ft, tmp_path / "out", watcher=watcher)
    check_result(pair, tmp_path / "out", report)
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
    check_result(pair, tmp_path / "out", report)


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
    delta = with_spectrum(np.geomspace(1.0, 1e13, 300), 300)  # no few values that could be taken out
    base = write_split(tmp_path / "base", {"w": np.zeros((300, 300))}, 1)
    pair = Pair(base, write_split(tmp_path / "ft", {"w": delta}, 1))
    least = smallest_budget(pair)
    with pytest.raises(NumericalError, match=r"tensor w .*with --ram \d+MB --workers 1, or leave it out") as caught:
        api.repair(pair.base, pair.ft, tmp_path / "out", ram=least)
    enough = str(caught.value).partition("--ram ")[2].partition(" ")[0]
    report = api.repair(pair.base, pair.ft, tmp_path / "out", ram=enough, workers=1)
    assert report.tensors["w"].backend == "full"
    assert any(warning.startswith("tensor w: gram-float64: ") for warning in report.warnings)


def test_what_is_meant_to_be_left_is_not_warned_of(tmp_path: Path) -> None:
    """A spectrum too wide for a Gram matrix of all: what is tried on the way to one of the rest is no fault."""
    rng = np.random.default_rng(0)
    delta = rng.standard_normal((64, 64)) + 1e9 * np.outer(rng.standard_normal(64), rng.standard_normal(64))
    base = write_split(tmp_path / "base", {"w": np.zeros((64, 64))}, 1)
    ft = write_split(tmp_path / "ft", {"w": delta}, 1)
    report = api.repair(base, ft, tmp_path / "out")
    record = report.tensors["w"]
    assert (record.action, record.backend) == ("repaired", "deflated-float64")
    assert [reason.partition(":")[0] for reason in record.climbed] == ["gram-float64", "rows"]
    (whole,) = report.warnings
    assert whole.startswith("1 delta is of low rank but for less than 1e-05 of the norm, as a merged LoRA's are, ")


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
