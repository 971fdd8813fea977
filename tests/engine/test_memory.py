"""The memory model against real processes: prime sizes, so that a wrong term shows; data that need the most.

Nearly half of every spectrum lies above τ, which is what the model has to allow for.
"""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamrepair import api
from streamrepair.decompose import deflated, full, gram, krylov_search, order_statistic, single
from streamrepair.decompose.arithmetic import Products
from streamrepair.decompose.choose import MOST_KEPT
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.operator import PanelSource
from streamrepair.decompose.scratch import Scratch
from streamrepair.decompose.truncation import UnresolvedError
from streamrepair.decompose.windows import Slack, Windows
from streamrepair.engine import memory
from streamrepair.engine.memory import MatrixShape, Panels
from streamrepair.errors import BudgetError
from streamrepair.report import Settings
from streamrepair.spectral.threshold import HardThreshold
from tests import command
from tests.builders import Raw, write_safetensors
from tests.decompose.sources import Doubles, fine_tuned, merged_adapter
from tests.pairs import stored, write_split

CASES = {
    "squarish": ((1499, 1201), ("BF16", "BF16"), {}),
    "tall": ((7001, 601), ("BF16", "BF16"), {}),
    "wide": ((601, 7001), ("F16", "F16"), {}),
    "mixed": ((1009, 997), ("BF16", "F32"), {}),
    "doubles": ((997, 1999), ("F64", "F64"), {}),
    "widened": ((1201, 1201), ("BF16", "BF16"), {"out_dtype": "float32"}),
    "full": ((1201, 701), ("F32", "F32"), {"backend": "full"}),
    "all kept": ((1009, 1009), ("F32", "F32"), {"scale": 0.01}),
}


def _delta(shape: tuple[int, int], rank: int, seed: int = 1) -> Doubles:
    """Noise, and so many directions far above it."""
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((shape[0], rank), np.float32), rng.standard_normal((rank, shape[1]), np.float32)
    noise = 1e-4 * rng.standard_normal(shape, np.float32)
    return np.asarray(noise + 0.02 / rank**0.5 * left @ right, np.float64)


def half_kept(folder: Path, shape: tuple[int, int], dtypes: tuple[str, str], copies: int = 1) -> None:
    """A pair whose delta has just under half of its singular values far above the rest."""
    _pair(folder, shape, dtypes, rank=min(shape) // 2 - 2, copies=copies)


def _pair(folder: Path, shape: tuple[int, int], dtypes: tuple[str, str], *, rank: int, copies: int = 1) -> None:
    rng = np.random.default_rng(2)
    sides: tuple[dict[str, Raw | np.ndarray], ...] = ({}, {})  # type: ignore[type-arg]
    for copy in range(copies):
        base = 0.05 * rng.standard_normal(shape)
        for side, values, dtype in zip(sides, (base, base + _delta(shape, rank, copy)), dtypes, strict=True):
            side[f"w{copy}"] = stored(values, dtype)
    for name, side in zip(("base", "ft"), sides, strict=True):
        write_split(folder / name, side, 1)


def _repair(folder: Path, ram: str, workers: int, options: dict[str, Any]) -> tuple[int, int, dict[str, object]]:
    """(projected, measured) bytes of a process of its own, and the records."""
    out = folder / f"out-{ram}-{workers}"
    words = ("repair", folder / "base", folder / "ft", out, "--ram", ram, "--workers", workers, "--json", "--quiet")
    flags = [word for key, value in options.items() for word in ("--" + key.replace("_", "-"), value)]
    result = command.run(*words, *flags)
    assert result.status == 0, result.err
    report = json.loads(result.out)
    budget = report["budget"]
    return budget["ram_projected_bytes"], budget["ram_measured_bytes"], report["tensors"]


def _least(folder: Path, options: dict[str, Any]) -> str:
    with pytest.raises(BudgetError) as refused:
        api.plan(folder / "base", folder / "ft", ram=1_000_000, settings=Settings(**options))
    return str(refused.value).rpartition(" ")[2]


@pytest.mark.parametrize("name", CASES)
def test_no_process_takes_more_than_projected(tmp_path: Path, name: str) -> None:
    """In whole matrices where memory allows, and in the smallest panels."""
    shape, dtypes, options = CASES[name]
    half_kept(tmp_path, shape, dtypes)
    for ram in ("4GB", _least(tmp_path, options)):
        projected, measured, tensors = _repair(tmp_path, ram, 1, options)
        assert measured <= projected
        assert [record["action"] for record in tensors.values()] == ["repaired"]  # type: ignore[index]


def test_nor_do_several_workers_one_task_after_another(tmp_path: Path) -> None:
    """What a worker keeps from its last task is within what the next one reserves."""
    half_kept(tmp_path, (1201, 701), ("BF16", "BF16"), copies=4)
    for workers in (1, 2):
        projected, measured, _ = _repair(tmp_path, "4GB", workers, {})
        assert measured <= projected


@pytest.mark.parametrize("letter", ["n", "漢"])
def test_long_metadata_are_projected(tmp_path: Path, letter: str) -> None:
    """A header may have 100 MB."""
    notes, weights = {"format": "pt", "notes": letter * 12_000_000}, np.random.default_rng(0).normal(size=(67, 61))
    for side, values in (("base", weights), ("ft", weights + 1e-3)):
        (tmp_path / side).mkdir()
        write_safetensors(tmp_path / side / "model.safetensors", {"w": stored(values, "F32")}, notes)
    projected, measured, _ = _repair(tmp_path, "2GB", 1, {})
    assert measured <= projected
    with pytest.raises(BudgetError):
        api.plan(tmp_path / "base", tmp_path / "ft", ram=110_000_000)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "dtype"), [((4001, 4001), "F32"), ((3001, 3001), "F64"), ((2503, 12007), "F32")])
def test_large_shapes_are_projected_within_1_3(tmp_path: Path, shape: tuple[int, int], dtype: str) -> None:
    half_kept(tmp_path, shape, (dtype, dtype))
    for ram in ("8GB", _least(tmp_path, {})):
        projected, measured, _ = _repair(tmp_path, ram, 1, {})
        assert measured <= projected <= 1.3 * measured


@pytest.mark.parametrize("estimate", ["exact", "fast"])
@pytest.mark.parametrize(
    "shape",
    [
        (601, 1201),
        pytest.param((3109, 3109), marks=pytest.mark.slow),
        pytest.param((7001, 3109), marks=pytest.mark.slow),
    ],
)
def test_nor_where_few_values_are_kept(tmp_path: Path, shape: tuple[int, int], estimate: str) -> None:
    """So that block Krylov answers, and not the Gram route that its memory is projected with."""
    _pair(tmp_path, shape, ("BF16", "BF16"), rank=round(0.03 * min(shape)))
    options = {"backend": "randomized", "noise_estimate": estimate}
    for ram in ("4GB", _least(tmp_path, options)):
        projected, measured, tensors = _repair(tmp_path, ram, 1, options)
        assert measured <= projected
        (record,) = tensors.values()
        assert record["backend"].startswith("randomized")  # type: ignore[index]


@pytest.mark.parametrize("shape", [(1201, 1201), (307, 4001), (9001, 157)])
def test_nor_where_as_many_values_as_may_be_are_taken_out(tmp_path: Path, shape: tuple[int, int]) -> None:
    """An adapter merged in float32, in whole matrices and in the smallest panels: it takes no float64 SVD."""
    rank = deflated.most(min(shape))
    pair = merged_adapter(*shape, rank)
    for name, weight in (("base", pair.base), ("ft", pair.ft)):
        write_split(tmp_path / name, {f"w{copy}": weight for copy in range(5)}, 1)
    for ram in ("4GB", _least(tmp_path, {})):
        projected, measured, tensors = _repair(tmp_path, ram, 1, {})
        assert measured <= projected
        for record in tensors.values():
            assert (record["backend"], record["rank_kept"]) == ("deflated-float64", rank)  # type: ignore[index]


@pytest.mark.parametrize(("n", "rows"), [(601, 601), (1201, 1201), (257, 4001)])
def test_every_array_of_deflation_is_in_the_model(n: int, rows: int) -> None:
    rank = deflated.most(n)
    source = merged_adapter(rows, n, rank)
    directions = np.ascontiguousarray(np.linalg.svd(source.delta(), full_matrices=False)[2][:rank])
    host = HostArithmetic(Scratch())
    tracemalloc.start()
    try:
        drowning = [directions.copy()]  # so that it is counted
        found = gram.without(drowning, source, HardThreshold(), host)
        live = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.backend == "deflated-float64"
    assert live <= memory._deflated_bytes(MatrixShape(rows, n, 4, 4, 4), Panels()) <= 1.6 * live


def _live_bytes(
    delta: Doubles, dtype: str, *, krylov: float, scale: float, fast: bool = False, then: Doubles | None = None
) -> int:
    """Peak of NumPy's own arrays over two matrices, one after the other, in one worker; panels are not among them."""
    first, scratch, rule = fine_tuned(delta, dtype), Scratch(), HardThreshold(scale=scale)
    sources = (first, first if then is None else fine_tuned(then, dtype))
    host = HostArithmetic(scratch)
    tracemalloc.start()
    try:
        for source in sources:
            scratch.begin("alike")
            found, left = None, list[str]()
            if dtype == "BF16":  # the float64 attempt is made outside: the failed one's arrays live in its traceback
                with contextlib.suppress(UnresolvedError):
                    found = gram.truncate(
                        source,
                        rule,
                        arithmetic=host,
                        precision="float32",
                        krylov=krylov,
                        estimate="fast" if fast else "exact",
                        held=krylov if fast else 0.0,
                        left=left,
                    )
            if found is None:
                left.clear()
                found = gram.truncate(source, rule, arithmetic=host, precision="float64", krylov=krylov, left=left)
            assert found.backend.startswith("randomized") == (bool(krylov) and not left)
            # A loop's variable would keep the last block.
            deque(host.merger(found.vh, dtype).merged(source.panels()), maxlen=0)
            del found
            scratch.settle()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many vectors the windows had that were made."""
    found: list[int] = []
    ritz = single.ritz

    def noted(products: Products, slack: Slack, rows: Any, outside: Doubles, blunt: float) -> Windows:
        found.append(len(rows))
        return ritz(products, slack, rows, outside, blunt)

    monkeypatch.setattr(single, "ritz", noted)
    return found


@pytest.mark.parametrize(
    ("n", "rows"),
    [(257, 257), (601, 1811), (1201, 1201), (1511, 1511), pytest.param(2011, 2011, marks=pytest.mark.slow)],
)
def test_every_array_of_the_gram_route_is_in_the_model(
    n: int, rows: int, widths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a few percent, in each size in which a worker keeps other sums: process figures hide a term in their slack."""
    live, shape = (
        _live_bytes(_delta((rows, n), n // 2 - 2), "BF16", krylov=0.0, scale=1.0),
        MatrixShape(rows, n, 2, 2, 2),
    )
    assert live <= memory.gram_bytes(shape)
    monkeypatch.setattr(memory, "WINDOWED", max(widths))  # the widest are rare, and most of a small matrix's memory
    tall = rows >= 2 * n  # a pass over Δ for the windows' sake is projected, and not needed here
    assert live <= memory.gram_bytes(shape) <= (1.25 if tall else 1.1) * live


@pytest.mark.parametrize(("n", "rows"), [(601, 1811), (1201, 1201)])
@pytest.mark.parametrize("tried", ["_MOST_SLACK", "_MOST_MEASURED"])
def test_and_where_windows_take_a_pass(
    n: int, rows: int, tried: str, widths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the delta, in float32 or, where no more than G's own precision is wanted of that, in float64."""
    monkeypatch.setattr(single, "_MOST_SLACK", 0.0)
    monkeypatch.setattr(single, tried, 0.0)
    live, shape = (
        _live_bytes(_delta((rows, n), n // 2 - 2), "BF16", krylov=0.0, scale=1.0),
        MatrixShape(rows, n, 2, 2, 2),
    )
    monkeypatch.setattr(memory, "WINDOWED", max(widths))
    assert live <= memory.gram_bytes(shape) <= 1.25 * live


@pytest.mark.parametrize(("n", "rows", "dtype"), [(257, 1021, "F32"), (1009, 1009, "F32"), (601, 601, "BF16")])
def test_and_where_all_may_be_kept(
    n: int, rows: int, dtype: str, widths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    item = 4 if dtype == "F32" else 2
    live, shape = (
        _live_bytes(_delta((rows, n), n - 2), dtype, krylov=0.0, scale=0.01),
        MatrixShape(rows, n, *[item] * 3),
    )
    shape = replace(shape, kept_share=1.0)
    assert live <= memory.gram_bytes(shape)
    monkeypatch.setattr(memory, "WINDOWED", max(widths, default=0))
    assert live <= memory.gram_bytes(shape) <= 1.4 * live


@pytest.mark.parametrize(("n", "rows", "dtype"), [(257, 257, "BF16"), (257, 1021, "F32"), (1201, 1201, "BF16")])
def test_every_array_of_block_krylov_is_in_the_model(n: int, rows: int, dtype: str) -> None:
    item = 4 if dtype == "F32" else 2
    live = _live_bytes(_delta((rows, n), round(0.03 * n)), dtype, krylov=MOST_KEPT, scale=1.0)
    assert live <= memory.randomized_bytes(MatrixShape(rows, n, item, item, item)) <= 2.0 * live


@pytest.mark.parametrize(("n", "rows"), [(601, 2399), (1201, 1201), (1201, 4801)])
def test_every_array_without_a_gram_matrix_is_in_the_model(n: int, rows: int) -> None:
    live = _live_bytes(_delta((rows, n), round(0.03 * n)), "BF16", krylov=MOST_KEPT, scale=1.0, fast=True)
    others = memory._sums_kept_bytes(n)  # of a matrix that went the Gram route before
    assert live <= memory.held_bytes(MatrixShape(rows, n, 2, 2, 2, held=True)) <= 2.0 * live + others


@pytest.mark.parametrize("shape", [(2401, 1201), (1201, 2401)])
def test_nor_is_what_another_matrix_left(shape: tuple[int, int]) -> None:
    """The one before went the Gram route, and its sums are kept."""
    n, m = min(shape), max(shape)
    first, then = _delta(shape, n // 3), _delta(shape, round(0.03 * n))
    live = _live_bytes(first, "BF16", krylov=MOST_KEPT, scale=1.0, fast=True, then=then)
    assert live <= memory.randomized_bytes(MatrixShape(m, n, 2, 2, 2, held=True))


def test_what_was_held_is_let_go_before_a_gram_matrix_is_formed() -> None:
    """Where many values are kept; the failed attempt's arrays must not live on in its traceback."""
    n = 1201
    live = _live_bytes(_delta((4 * n, n), n // 3), "BF16", krylov=0.08, scale=1.0, fast=True)
    assert live <= memory.randomized_bytes(MatrixShape(4 * n, n, 2, 2, 2, held=True))


@pytest.mark.parametrize(("n", "rows"), [(307, 5003), (601, 1811), (601, 601)])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_every_array_of_the_reference_route_is_in_the_model(n: int, rows: int, dtype: str) -> None:
    item = 4 if dtype == "F32" else 2
    source, scratch = fine_tuned(_delta((rows, n), n // 2 - 2), dtype), Scratch()
    host = HostArithmetic(scratch)
    tracemalloc.start()
    try:
        for _ in range(2):
            scratch.begin("alike")
            found = full.truncate(source, HardThreshold(), arithmetic=host)
            for _ in host.merger(found.vh, dtype).merged(source.panels()):
                pass
            del found
            scratch.settle()
        live = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert live <= memory.full_bytes(MatrixShape(rows, n, item, item, item)) <= 1.6 * live


def test_block_krylovs_limits_are_those_of_the_backend() -> None:
    assert memory.KRYLOV_SHARE == krylov_search.CAPACITY_SHARE
    assert memory.KRYLOV_LEAST == (krylov_search.LOOK_AT + 2) * krylov_search.BLOCK
    assert 1 / memory.KRYLOV_KEPT >= MOST_KEPT
    assert memory.KRYLOV_MEDIAN == (order_statistic._MOST_STEPS + 1) * order_statistic._BLOCK


def test_the_most_that_is_taken_out_is_the_backends() -> None:
    assert (memory.DEFLATED, memory.DEFLATED_SHARE) == (deflated.MOST, deflated.SHARE)


def test_the_widest_windows_are_those_of_the_backend() -> None:
    assert memory.WINDOWED == 2 * single._WIDEST + single._LARGEST
    assert 2 * single._FURTHEST <= single._WIDEST


PLAIN = MatrixShape(rows=7919, cols=1009, base_item_bytes=2, ft_item_bytes=2, out_item_bytes=2)


@pytest.mark.parametrize("backend", ["gram", "randomized", "full"])
@pytest.mark.parametrize("field", ["rows", "cols", "base_item_bytes", "ft_item_bytes", "out_item_bytes"])
def test_more_of_anything_never_needs_less(backend: str, field: str) -> None:
    more = replace(PLAIN, **{field: getattr(PLAIN, field) * 2})
    if field != "out_item_bytes":  # of wider results there is no float32 copy, and of doubles none that is rounded
        assert memory.repair_bytes(more, backend, 512) >= memory.repair_bytes(PLAIN, backend, 512)
    assert memory.device_bytes(more, backend) >= memory.device_bytes(PLAIN, backend)
    assert memory.repair_bytes(more, backend, 512, cuda=True) >= memory.repair_bytes(PLAIN, backend, 512, cuda=True)


def test_the_reference_route_on_a_gpu_checks_its_answer_in_host_memory() -> None:
    """R, U and Vᵀ come from there; the residual is formed here."""
    n = 601
    there = np.random.default_rng(0).standard_normal((n, n))
    u, s, vh = np.linalg.svd(there)  # not below: its workspace, which NumPy 2.5 counts, would be the card's

    class Elsewhere(HostArithmetic):
        def triangular_factor(self, _: PanelSource) -> Doubles:
            return there.copy()

        def svd(self, _matrix: Doubles, _driver: str) -> tuple[Doubles, Doubles, Doubles]:
            return u.copy(), s.copy(), vh.copy()

    source = fine_tuned(_delta((n, n), 9), "BF16")
    tracemalloc.start()
    try:
        full.truncate(source, HardThreshold(), arithmetic=Elsewhere())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    shape = replace(PLAIN, rows=n, cols=n)
    projected = memory.repair_bytes(shape, "full", n, cuda=True) - memory.repair_bytes(shape, "gram", n, cuda=True)
    assert projected == 32 * n * n
    assert 40 * n * n < peak <= 49 * n * n


def test_the_ring_holds_three_panels_and_no_more_rows_than_there_are() -> None:
    item = 4
    assert Panels.of(PLAIN, 512).in_flight == 3 * 512 * 1009 * item
    assert Panels.of(PLAIN, 4096).in_flight == 7919 * 1009 * item
    assert Panels.of(replace(PLAIN, rows=521), 512).in_flight == 521 * 1009 * item


def test_between_passes_are_held_whole_pairs_and_small_buffers() -> None:
    assert Panels.of(PLAIN, 7919).kept == 7919 * 1009 * 4
    assert Panels.of(PLAIN, 7168).kept == 7919 * 1009 * 4
    large = replace(PLAIN, cols=8009, ft_item_bytes=4)  # one side's buffers are above what is let go
    assert Panels.of(large, 512).kept == 3 * 512 * 8009 * 2
    assert Panels.of(large, 1024).kept == 0


def test_only_headers_longer_than_tensors_need_count_beside_them() -> None:
    assert memory.records_bytes(7, headers_bytes=3_500) == 7 * memory.TENSOR_BYTES
    assert memory.records_bytes(7, headers_bytes=3_501) == 7 * memory.TENSOR_BYTES + 8


def test_every_part_of_a_run_is_in_its_sum() -> None:
    alone = memory.run_bytes(0, records_bytes=0, gpus=0)
    assert memory.run_bytes(3, records_bytes=7, gpus=0) == alone + 3 * memory.WORKER_BYTES + 7
    assert memory.run_bytes(0, records_bytes=0, gpus=1) == alone + memory.CUDA_HOST_BYTES
    assert (
        memory.run_bytes(0, records_bytes=0, gpus=3) == alone + memory.CUDA_HOST_BYTES + 2 * memory.CUDA_FURTHER_BYTES
    )
