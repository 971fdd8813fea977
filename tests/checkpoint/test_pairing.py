"""What is intended for each tensor of a pair, and the words it is explained with."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from streamrepair.checkpoint.layout import open_checkpoint
from streamrepair.checkpoint.pairing import LEAST_ELEMENTS, Pairing, Selection, pair
from streamrepair.errors import InputError, UsageError
from tests.builders import Raw, Tensors, bf16, write_index, write_safetensors, write_sharded

MATRIX = np.zeros((32, 64), np.float32)


def _paired(tmp_path: Path, base: Tensors, ft: Tensors, **selection: str) -> dict[str, Pairing]:
    sides = {}
    for side, tensors in (("base", base), ("ft", ft)):
        (tmp_path / side).mkdir()
        write_safetensors(tmp_path / side / "model.safetensors", tensors)
        sides[side] = open_checkpoint(tmp_path / side, side=side)
    found = pair(sides["base"], sides["ft"], Selection(**selection))
    assert len({p.name for p in found}) == len(found)
    return {p.name: p for p in found}


def test_every_name_of_both_sides_once_ft_in_file_order_then_what_only_base_has(tmp_path: Path) -> None:
    found = _paired(tmp_path, {"gone": MATRIX, "b": MATRIX, "a": MATRIX}, {"b": MATRIX, "new": MATRIX, "a": MATRIX})
    assert [(p.name, p.intent) for p in found.values()] == [
        ("b", "repair"), ("new", "keep"), ("a", "repair"), ("gone", "drop"),
    ]  # fmt: skip
    assert (found["new"].base, found["new"].reason) == (None, "not in the base checkpoint")
    assert (found["gone"].ft, found["gone"].reason) == (None, "not in the fine-tuned checkpoint")
    assert found["a"].base is not None
    assert found["a"].base.entry.name == "a"


@pytest.mark.parametrize(
    ("base", "ft", "reason"),
    [
        (MATRIX, MATRIX.T.copy(), "shapes differ: [32, 64] in base, [64, 32] fine-tuned"),
        (np.zeros(4096, np.float32), np.zeros(4096, np.float32), "1-D, not a matrix"),
        (np.float32(0), np.float32(0), "0-D, not a matrix"),
        (np.zeros((2, 32, 32), np.float32), np.zeros((2, 32, 32), np.float32), "3-D, not a matrix"),
        (np.zeros((31, 33), np.float32), np.zeros((31, 33), np.float32), "tiny: 1023 elements, fewer than 1024"),
        (np.zeros((0, 64), np.float32), np.zeros((0, 64), np.float32), "tiny: 0 elements, fewer than 1024"),
        (MATRIX, MATRIX.astype(np.int64), "dtype I64 (fine-tuned) is not a plain floating-point weight"),
        (("F8_E4M3", (32, 64), bytes(2048)), MATRIX, "dtype F8_E4M3 (base) is not a plain floating-point weight"),
        (("F4", (32, 64), bytes(1024)), ("F4", (32, 64), bytes(1024)), "dtype F4 (base) is not a plain"),
    ],
)
def test_what_is_passed_through_and_why(tmp_path: Path, base: Raw, ft: Raw, reason: str) -> None:
    found = _paired(tmp_path, {"w": base, "x": MATRIX}, {"w": ft, "x": MATRIX})
    assert found["w"].intent == "keep"
    assert found["w"].reason.startswith(reason)
    assert found["x"].intent == "repair"


@pytest.mark.parametrize("side", ["base", "ft"])
def test_names_that_differ_by_a_prefix_are_told_of(tmp_path: Path, side: str) -> None:
    long = {f"model.layers.{i}.q.weight": MATRIX for i in range(3)}
    short = {name.removeprefix("model."): tensor for name, tensor in long.items()}
    base, ft = (long, short) if side == "base" else (short, long)
    found = f"{next(iter(base))} in BASE seems to be {next(iter(ft))} in FT"
    with pytest.raises(InputError, match=f"no tensor name in common.*{re.escape(found)}: save one of them"):
        _paired(tmp_path, base, ft)


@pytest.mark.parametrize("side", ["BASE", "FT"])
def test_an_adapter_is_to_be_merged_first(tmp_path: Path, side: str) -> None:
    whole = {"model.layers.0.q.weight": MATRIX}
    adapter = {f"base_model.model.model.layers.0.q.lora_{ab}.weight": MATRIX for ab in "AB"}
    with pytest.raises(InputError, match=f"no tensor name in common.*: {side} is an adapter: merge it into its base"):
        _paired(tmp_path, *((adapter, whole) if side == "BASE" else (whole, adapter)))


SCALES = np.zeros((32, 32), np.float32)


@pytest.mark.parametrize(
    ("codes", "scales", "dtype"),
    [
        ("weight", "weight_scale_inv", "F8_E4M3"),
        ("qweight", "scales", "I32"),
        ("weight_packed", "weight_scale", "I32"),
        ("W_q", "zero", "U8"),
        ("weight", "biases", "U32"),
        ("weight", "SCB", "I8"),
    ],
)
def test_scales_stay_with_the_codes_that_they_scale(tmp_path: Path, codes: str, scales: str, dtype: str) -> None:
    size = {"F8_E4M3": 1, "I8": 1, "U8": 1, "I32": 4, "U32": 4}[dtype]
    tensors: Tensors = {
        f"layers.0.q.{scales}": SCALES,
        f"layers.0.q.{codes}": (dtype, (64, 64), bytes(4096 * size)),
        "layers.0.q.norm.weight": MATRIX,
        "layers.0.k.weight": MATRIX,
    }
    found = _paired(tmp_path, tensors, tensors)
    assert found[f"layers.0.q.{scales}"].reason == f"belongs to the quantised {codes} beside it"
    assert [p.name for p in found.values() if p.intent == "repair"] == ["layers.0.q.norm.weight", "layers.0.k.weight"]


def test_a_reason_holds_no_name_as_a_checkpoint_has_it(tmp_path: Path) -> None:
    """`plan` prints it."""
    codes = ("I8", (64, 64), bytes(4096))
    tensors: Tensors = {"q.\x1b[31mred": codes, "q.scale": SCALES, "a": MATRIX}
    found = _paired(tmp_path, tensors, tensors)
    assert found["q.scale"].reason == "belongs to the quantised \\x1b[31mred beside it"


@pytest.mark.parametrize(
    "beside",
    [np.zeros((64, 64), np.int64), np.zeros((64, 64), np.bool_), np.zeros(64, np.int32), np.int8(0)],
    ids=["positions", "mask", "list", "number"],
)
def test_a_matrix_beside_integers_that_are_no_weight_is_repaired(tmp_path: Path, beside: Raw) -> None:
    tensors: Tensors = {"attn.index": beside, "attn.bias_table": MATRIX}
    assert _paired(tmp_path, tensors, tensors)["attn.bias_table"].intent == "repair"


def test_a_codebook_stays_with_its_indices_and_a_mask_holds_no_weight(tmp_path: Path) -> None:
    """VPTQ's lies in a module below that of the indices, as weights of attention lie below a mask of bytes."""
    tensors = {
        "q.indices": np.zeros((8, 64), np.int32), "q.centroids.weight": MATRIX,
        "attention.bias": np.zeros((1, 1, 8, 8), np.uint8), "attention.query.weight": MATRIX,
        "window.relative_position_index": np.zeros((49, 49), np.int32), "window.proj_weight": MATRIX,
    }  # fmt: skip
    found = _paired(tmp_path, tensors, tensors)
    assert found["q.centroids.weight"].reason == "belongs to the quantised indices beside it"
    assert {found["attention.query.weight"].intent, found["window.proj_weight"].intent} == {"repair"}


@pytest.mark.parametrize(("weight", "bias"), [("gate", "gate_bias"), ("up.weight", "up.bias")])
def test_biases_of_experts_stay_with_the_experts(tmp_path: Path, weight: str, bias: str) -> None:
    tensors = {weight: np.zeros((32, 8, 64), np.float32), bias: MATRIX, "flat": MATRIX, "flat_bias": MATRIX}
    found = _paired(tmp_path, tensors, tensors)
    assert found[bias].reason == "biases of the 3-D weight beside it"
    assert found["flat_bias"].intent == "repair"


def test_a_quantised_weight_is_told_by_its_dtype_though_its_shape_is_another(tmp_path: Path) -> None:
    found = _paired(tmp_path, {"w": bf16(MATRIX), "v": MATRIX}, {"w": np.zeros((1024, 1), np.uint8), "v": MATRIX})
    assert found["w"].reason == "dtype U8 (fine-tuned) is not a plain floating-point weight"


def test_exactly_the_least_number_of_elements_is_repaired(tmp_path: Path) -> None:
    whole = np.zeros((32, LEAST_ELEMENTS // 32), np.float32)
    assert _paired(tmp_path, {"w": whole}, {"w": whole})["w"].intent == "repair"


@pytest.mark.parametrize("dtypes", [("BF16", "F32"), ("F64", "F16")])
def test_sides_of_different_floating_dtypes_are_a_pair(tmp_path: Path, dtypes: tuple[str, str]) -> None:
    size = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
    base, ft = ((dtype, (32, 64), bytes(2048 * size[dtype])) for dtype in dtypes)
    assert _paired(tmp_path, {"w": base}, {"w": ft})["w"].intent == "repair"


def test_include_and_exclude_are_searched_anywhere_in_the_name(tmp_path: Path) -> None:
    tensors = {"layers.0.q.weight": MATRIX, "layers.0.k.weight": MATRIX, "head": MATRIX}
    found = _paired(tmp_path, tensors, tensors, include="layers", exclude=r"\.k\.")
    assert {name: (p.intent, p.reason) for name, p in found.items()} == {
        "layers.0.q.weight": ("repair", ""),
        "layers.0.k.weight": ("keep", r"excluded by '\\.k\\.'"),
        "head": ("keep", "not included by 'layers'"),
    }


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_does_not_compile_is_refused_even_if_nothing_would_be_matched(
    tmp_path: Path, option: str
) -> None:
    vector = np.zeros(3, np.float32)
    with pytest.raises(UsageError, match=rf"--{option} '\(' is not a regular expression"):
        _paired(tmp_path, {"w": vector}, {"w": vector}, **{option: "("})


def test_strangers_are_refused_with_names_of_both(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tensor name in common.*BASE has left, .*FT has right"):
        _paired(tmp_path, {"left": MATRIX}, {"right": MATRIX})


def test_a_tensor_that_fts_index_does_not_list_is_kept_as_it_is(tmp_path: Path) -> None:
    """Its shard is written whole, so it must be in the pairing, though BASE has its name too."""
    base = write_sharded(tmp_path / "base", [{"a": MATRIX, "b": MATRIX}])
    ft = write_sharded(tmp_path / "ft", [{"a": MATRIX, "b": bf16(MATRIX)}])
    write_index(ft, {"a": "model-00001-of-00001.safetensors"})
    found = pair(open_checkpoint(base, side="BASE"), open_checkpoint(ft, side="FT"), Selection())
    assert [(p.name, p.intent, p.reason) for p in found] == [
        ("a", "repair", ""),
        ("b", "keep", "not listed in the index"),
    ]
