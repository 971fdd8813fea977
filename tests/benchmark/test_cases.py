"""Which shapes are measured, and what is refused before anything is."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from streamrepair.benchmark.cases import DEFAULT_SHAPES, Case, make_cases, parse_shape
from streamrepair.benchmark.conditions import BACKENDS, Conditions, make_conditions, refuse_too_large
from streamrepair.errors import BudgetError, InputError, UsageError
from tests.builders import write_safetensors


def _conditions(**changed: object) -> Conditions:
    asked: dict[str, object] = {
        "backends": (), "dtype": "bf16", "device": "cpu", "threads": 1, "repeats": 1, "check": True,
    }  # fmt: skip
    return make_conditions(**(asked | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["4096x1024", " 4096X1024 ", "4096×1024"])
def test_a_shape_as_people_write_it(text: str) -> None:
    assert parse_shape(text) == (4096, 1024)


@pytest.mark.parametrize("text", ["", "4096", "4096x", "x", "63x64", "64x0", "-64x64", "64x64x64", "64.0x64", "٦٤x64"])
def test_what_is_no_shape_is_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError, match="--shape"):
        parse_shape(text)


def test_every_shape_with_every_spectrum_smallest_first() -> None:
    cases = make_cases(shapes=["128x64", "64x64", "64x64"], spectra=[])
    assert [(case.shape, case.spectrum) for case in cases] == [
        ((64, 64), "gapped"), ((64, 64), "heavy"), ((128, 64), "gapped"), ((128, 64), "heavy"),
    ]  # fmt: skip
    assert {case.shape for case in make_cases(shapes=[], spectra=["heavy"])} == set(DEFAULT_SHAPES)


def test_words_split_at_commas_and_unknown_ones_are_named() -> None:
    assert _conditions(backends=["gram,full", "gram"]).backends == ("gram", "full")
    assert set(_conditions().backends) == set(BACKENDS) - {"auto"}
    for wrong, word in [({"backends": ["gramm"]}, "gramm"), ({"dtype": "f64"}, "f64"), ({"repeats": 0}, "--repeats"),
                        ({"threads": 0}, "--threads"), ({"device": "gpu"}, "gpu")]:  # fmt: skip
        with pytest.raises(UsageError, match=word):
            _conditions(**wrong)
    with pytest.raises(UsageError, match="--spectrum"):
        make_cases(shapes=[], spectra=["flat"])


def test_shapes_of_a_checkpoint_are_counted_and_what_is_no_matrix_left_out(tmp_path: Path) -> None:
    weights = {name: np.zeros((96, 64), np.float32) for name in ("a", "b")}
    others = {
        "norm": np.zeros(64, np.float32),
        "ids": np.zeros((64, 64), np.int64),
        "tiny": np.zeros((8, 64), np.float32),
    }
    path = write_safetensors(tmp_path / "model.safetensors", {**weights, **others})
    assert make_cases(shapes=[], spectra=["heavy"], base=str(path)) == (Case((96, 64), "heavy", 2),)


def test_shapes_of_a_pair_are_those_that_a_repair_computes(tmp_path: Path) -> None:
    both = {"a": np.zeros((96, 64), np.float32)}
    base = write_safetensors(tmp_path / "base.safetensors", {**both, "b": np.zeros((64, 64), np.float32)})
    ft = write_safetensors(tmp_path / "ft.safetensors", {**both, "b": np.zeros((128, 64), np.float32)})
    cases = make_cases(shapes=["70x64"], spectra=["heavy"], base=str(base), ft=str(ft))
    assert cases == (Case((70, 64), "heavy"), Case((96, 64), "heavy"))


def test_a_pair_of_which_nothing_is_repaired_is_not_said_to_have_no_matrix(tmp_path: Path) -> None:
    base = write_safetensors(tmp_path / "base.safetensors", {"a": np.zeros((64, 64), np.float32)})
    ft = write_safetensors(tmp_path / "ft.safetensors", {"a": np.zeros((128, 64), np.float32)})
    with pytest.raises(InputError, match=r"a repair of .*ft.safetensors against .*base.safetensors computes no matrix"):
        make_cases(shapes=[], spectra=[], base=str(base), ft=str(ft))


def test_there_are_never_more_threads_than_processors() -> None:
    """OpenMP ends the process where it cannot start as many."""
    assert _conditions(threads=1).threads == 1
    assert _conditions(threads=999_999).threads == os.cpu_count()


def test_a_checkpoint_without_matrices_is_refused(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", {"norm": np.zeros(64, np.float32)})
    with pytest.raises(InputError, match="no matrix"):
        make_cases(shapes=[], spectra=[], base=str(path))


def test_what_does_not_fit_memory_is_refused_before_any_work() -> None:
    refuse_too_large([Case((64, 64), "heavy")], _conditions())
    with pytest.raises(BudgetError, match=r"--shape 9000000x9000000 needs about .* leave it out$"):
        refuse_too_large([Case((64, 64), "heavy"), Case((9_000_000, 9_000_000), "heavy")], _conditions())
