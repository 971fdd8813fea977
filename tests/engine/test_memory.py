"""The memory model against real processes: prime sizes, so that a wrong term shows; data that need the most.

Nearly half of every spectrum lies above τ, which is what the model has to allow for.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamrepair import api
from streamrepair.engine import memory
from streamrepair.engine.memory import MatrixShape
from streamrepair.errors import BudgetError
from streamrepair.report import Settings
from tests import command
from tests.builders import Raw
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


def half_kept(folder: Path, shape: tuple[int, int], dtypes: tuple[str, str], copies: int = 1) -> None:
    """A pair whose delta has just under half of its singular values far above the rest."""
    rng = np.random.default_rng(1)
    m, n = shape
    rank = min(m, n) // 2 - 2
    sides: tuple[dict[str, Raw | np.ndarray], ...] = ({}, {})  # type: ignore[type-arg]
    for copy in range(copies):
        base = 0.05 * rng.standard_normal((m, n), np.float32)
        left, right = rng.standard_normal((m, rank), np.float32), rng.standard_normal((rank, n), np.float32)
        strong = 0.02 / rank**0.5 * left @ right
        delta = 1e-4 * rng.standard_normal((m, n), np.float32) + strong
        for side, values, dtype in zip(sides, (base, base + delta), dtypes, strict=True):
            side[f"w{copy}"] = stored(values.astype(np.float64), dtype)
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


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "dtype"), [((5003, 5003), "F32"), ((3001, 3001), "F64"), ((2503, 12007), "F32")])
def test_large_shapes_are_projected_within_1_3(tmp_path: Path, shape: tuple[int, int], dtype: str) -> None:
    half_kept(tmp_path, shape, (dtype, dtype))
    for ram in ("8GB", _least(tmp_path, {})):
        projected, measured, _ = _repair(tmp_path, ram, 1, {})
        assert measured <= projected <= 1.3 * measured


PLAIN = MatrixShape(rows=7919, cols=1009, base_item_bytes=2, ft_item_bytes=2, out_item_bytes=2)


@pytest.mark.parametrize("backend", ["gram", "full"])
@pytest.mark.parametrize("field", ["rows", "cols", "base_item_bytes", "ft_item_bytes", "out_item_bytes"])
def test_more_of_anything_never_needs_less(backend: str, field: str) -> None:
    more = replace(PLAIN, **{field: getattr(PLAIN, field) * 2})
    assert memory.repair_bytes(more, backend, 512) >= memory.repair_bytes(PLAIN, backend, 512)
    assert memory.device_bytes(more, backend) >= memory.device_bytes(PLAIN, backend)
    assert memory.repair_bytes(more, backend, 512, cuda=True) >= memory.repair_bytes(PLAIN, backend, 512, cuda=True)


def test_the_ring_holds_three_panels_and_no_more_rows_than_there_are() -> None:
    item = 4
    assert memory.panel_bytes(PLAIN, 512) == 3 * 512 * 1009 * item
    assert memory.panel_bytes(PLAIN, 4096) == 7919 * 1009 * item + 4096 * 1009 * 2  # and the result put together
    assert memory.panel_bytes(replace(PLAIN, rows=521), 512) == 521 * 1009 * item


def test_every_part_of_a_run_is_in_its_sum() -> None:
    alone = memory.run_bytes(0, tensors=0, gpus=0)
    assert memory.run_bytes(3, tensors=7, gpus=0) == alone + 3 * memory.WORKER_BYTES + 7 * memory.TENSOR_BYTES
    assert memory.run_bytes(0, tensors=0, gpus=1) == alone + memory.CUDA_HOST_BYTES
    assert memory.run_bytes(0, tensors=0, gpus=3) == alone + memory.CUDA_HOST_BYTES + 2 * memory.CUDA_FURTHER_BYTES
