"""Names that differ in a prefix only, and those of adapters."""

from __future__ import annotations

import pytest

from streamrepair.checkpoint.naming import is_adapter, same_by_another_name


@pytest.mark.parametrize(
    ("name", "others", "expected"),
    [
        ("model.layers.0.q.weight", ["layers.0.q.weight", "layers.1.q.weight"], "layers.0.q.weight"),
        ("layers.0.q.weight", ["model.layers.1.q.weight", "model.layers.0.q.weight"], "model.layers.0.q.weight"),
        ("a.b.layers.0.q.weight", ["c.layers.0.q.weight"], "c.layers.0.q.weight"),
        ("a.b.c.layers.0.q.weight", ["layers.0.q.weight"], None),  # three parts are no prefix that a class has
        ("layers.0.q.weight", ["text.layers.0.q.weight", "vision.layers.0.q.weight"], None),
        ("a.proj.weight", ["b.proj.weight"], None),
        ("layers.0.q.weight", ["xlayers.0.q.weight"], None),
        ("w", ["model.w"], None),
        ("", [""], None),
    ],
)
def test_the_counterpart_under_another_prefix(name: str, others: list[str], expected: str | None) -> None:
    assert same_by_another_name([name], others) == (None if expected is None else (name, expected))


def test_names_of_many_parts_are_sought_behind_those_of_few() -> None:
    names = ["embed_tokens.weight", "layers.0.q.weight"]
    others = [f"model.{name}" for name in names]
    assert same_by_another_name(names, others) == ("layers.0.q.weight", "model.layers.0.q.weight")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"], True),
        (["base_model.model.q.lora_A.default.weight", "base_model.model.q.lora_magnitude_vector"], True),
        (["q.lora_A.weight", "q.lora_B.weight", "q.base_layer.weight", "k.weight"], False),  # a model with one inside
        (["floral_A.weight"], False),
        ([], False),
    ],
)
def test_an_adapter_by_its_names(names: list[str], expected: bool) -> None:
    assert is_adapter(names) is expected
