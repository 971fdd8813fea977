"""Why two checkpoints that belong together share few names or none: another prefix, or an adapter that is not merged.

Pure: names in, words out. `pairing` pairs equal names only and guesses nothing; this is for what it says of the others.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from itertools import islice

_ADAPTER = re.compile(r"\.(lora_\w+|hada_w\d_[ab]|lokr_w\d\w*|oft_r|vera_lambda_[bd])(\.|\Z)")
_MOST_BEFORE = 2
"""Parts that a prefix has: `model.language_model`, `base_model.model`."""
_LEAST_SHARED = 4
"""Parts that must be left, such as layers.0.q.weight: `0.q.weight` is in every part of a model that has layers."""
_TRIED = 10
"""Names that are looked for; the first ones are often of embeddings, with few parts."""


def is_adapter(names: Collection[str]) -> bool:
    """Whether most of these are the factors of an adapter, as peft saves them."""
    return 2 * sum(_ADAPTER.search(name) is not None for name in names) > len(names)


def same_by_another_name(names: Iterable[str], others: Collection[str]) -> tuple[str, str] | None:
    """One of `names`, and the one of `others` that differs from it in a prefix only; None if none is found soon."""
    for name in islice(names, _TRIED):
        if (other := _counterpart(name, others)) is not None:
            return name, other
    return None


def _counterpart(name: str, others: Collection[str]) -> str | None:
    parts = name.split(".")
    for before in range(_MOST_BEFORE + 1):
        if len(parts) - before < _LEAST_SHARED:
            break
        shared = ".".join(parts[before:])
        behind = f".{shared}"
        found = [other for other in others if other.endswith(behind) or other == shared]
        if found:  # in a text and in a vision model, perhaps: then nothing is known
            return found[0] if len(found) == 1 else None
    return None
