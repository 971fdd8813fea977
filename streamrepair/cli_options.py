"""The options that commands share: their types, groups and help."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from cyclopts import Group, Parameter, Token

NUMBERS = Group("What is computed", sort_key=1)
MEANS = Group("With what", sort_key=2)
OUTPUT = Group("Output", sort_key=3)


def whole_number(_kind: object, tokens: Sequence[Token]) -> int:
    """A number of things; cyclopts would round 1.5.

    Raises:
        ValueError: it is no whole number.
    """
    text = tokens[0].value
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise ValueError(f"expected a whole number, not {text!r}")
    return int(text)


Base = Annotated[
    str,
    Parameter(
        help="Base checkpoint: a folder, a .safetensors file, an index.json, or a Hub id, whose weights are all "
        "downloaded first."
    ),
]
Ft = Annotated[str, Parameter(help="Fine-tuned checkpoint, likewise.")]
Out = Annotated[str, Parameter(help="Folder of the result.")]
Ram = Annotated[
    str | None,
    Parameter(group=MEANS, help="Memory for the whole process, e.g. 16GB or 16GiB. Default: 80% of what is free."),
]
Vram = Annotated[str | None, Parameter(group=MEANS, help="Memory per GPU. Default: 90% of what is free.")]
Device = Annotated[
    str,
    Parameter(
        group=MEANS,
        help="auto (all cards, or the CPU if there are none), cpu, cuda (all cards), or a list: cuda:0,cuda:1; with "
        "cpu in it the CPU takes small matrices.",
    ),
]
Workers = Annotated[
    int | None,
    Parameter(
        group=MEANS,
        converter=whole_number,
        help="At most so many threads on the CPU, a matrix each; fewer where memory or work does not suffice. Every "
        "GPU has one more. Default: one per processor.",
    ),
]
Backend = Annotated[
    Literal["auto", "full", "gram", "randomized"],
    Parameter(
        group=MEANS,
        help="gram: all eigenvalues of ΔᵀΔ, certified; randomized: block Krylov first, gram where it loses; "
        "full: float64 QR and SVD, slow; auto: the quicker of the first two.",
    ),
]
NoiseEstimate = Annotated[
    Literal["exact", "fast"],
    Parameter(
        group=NUMBERS,
        help="exact, or fast: large matrices that keep few values get an interval for τ instead of the exact median.",
    ),
]
Sigma = Annotated[
    Literal["median", "tail"], Parameter(group=NUMBERS, help="Noise estimate: median (Gavish–Donoho) or tail.")
]
Scale = Annotated[float, Parameter(group=NUMBERS, help="Factor on the threshold τ.")]
Include = Annotated[str | None, Parameter(group=NUMBERS, help="Repair only tensors whose name holds this regex.")]
Exclude = Annotated[str | None, Parameter(group=NUMBERS, help="Pass through tensors whose name holds this regex.")]
OutDtype = Annotated[
    Literal["same", "float32"], Parameter(group=NUMBERS, help="same as FT, or float32: no rounding of the repair.")
]
OnNonfinite = Annotated[
    Literal["refuse", "copy-ft"],
    Parameter(group=NUMBERS, help="Where an input holds NaN or Inf: refuse the pair, or pass that tensor through."),
]
Json = Annotated[bool, Parameter(group=OUTPUT, negative=(), help="Machine-readable result on stdout.")]
Quiet = Annotated[
    bool, Parameter(group=OUTPUT, negative=(), help="No progress, warnings or summary; errors are still said.")
]
