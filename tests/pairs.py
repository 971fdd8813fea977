"""Small base and fine-tuned pairs, checkpoints read back without the package, and the repair as a textbook has it."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import integrate, optimize
from threadpoolctl import threadpool_limits

from streamrepair import api
from streamrepair.errors import BudgetError
from streamrepair.units import parse_bytes
from tests.builders import Raw, Tensors, bf16, raw, write_safetensors, write_sharded

DEMO = Path(__file__).parent.parent / "demo" / "pair"
Doubles = NDArray[np.float64]

_FLOATS = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
_BITS_AND_LEAST = {"BF16": (8, -126), "F16": (11, -14), "F32": (24, -126), "F64": (53, -1022)}


@dataclass(frozen=True)
class Pair:
    """Two checkpoints on disk."""

    base: Path
    ft: Path


def stored(values: Doubles | NDArray[np.float32], dtype: str) -> Raw | NDArray[np.generic]:
    """`values` as a tensor of one of the plain floating-point dtypes."""
    return bf16(values) if dtype == "BF16" else values.astype(_FLOATS[dtype])


def matrices(rng: np.random.Generator, shape: tuple[int, int], rank: int = 5) -> tuple[Doubles, Doubles]:
    """A base weight, and it with noise and `rank` directions from just above the noise upwards added."""
    base = 0.05 * rng.standard_normal(shape)
    noise = 1e-3 * rng.standard_normal(shape)
    edge = 1e-3 * (np.sqrt(shape[0]) + np.sqrt(shape[1]))
    left, right = (np.linalg.qr(rng.standard_normal((side, rank)))[0] for side in shape)
    return base, base + noise + (left * (edge * np.geomspace(1.3, 12.0, rank))) @ right.T


def write_pair(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtypes: tuple[str, str] = ("BF16", "BF16"),
    shards: tuple[int, int] = (1, 2),
    seed: int = 0,
    extra: Tensors | None = None,
) -> Pair:
    """A pair of checkpoints with the named matrices and vectors, each side in its dtype and number of shards.

    `extra` tensors are FT's alone. FT has a config.json and a tokenizer.json.
    """
    rng = np.random.default_rng(seed)
    base: dict[str, Raw | NDArray[np.generic]] = {}
    ft: dict[str, Raw | NDArray[np.generic]] = dict(extra or {})
    for name, shape in shapes.items():
        if len(shape) == 2:
            before, after = matrices(rng, (shape[0], shape[1]), rank=min(5, *shape))
        else:
            before = rng.standard_normal(shape)
            after = before + 0.1
        base[name], ft[name] = stored(before, dtypes[0]), stored(after, dtypes[1])
    pair = Pair(folder / "base", folder / "ft")
    for path, tensors, count in ((pair.base, base, shards[0]), (pair.ft, ft, shards[1])):
        write_split(path, tensors, count)
        (path / "config.json").write_text(json.dumps({"model_type": "none", "torch_dtype": "bfloat16"}))
        (path / "tokenizer.json").write_text('{"version": "1.0"}')
    return pair


def write_split(folder: Path, tensors: Tensors, count: int) -> Path:
    """A checkpoint of `count` shards, tensors dealt out in turn; one shard is a model.safetensors without an index."""
    if count == 1:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
        return folder
    names = list(tensors)
    dealt = [{name: tensors[name] for name in names[i::count]} for i in range(count)]
    return write_sharded(folder, dealt, metadata={"format": "pt"})


def read_tensors(folder: Path) -> dict[str, Raw]:
    """All tensors of a folder's shards: dtype, shape, bytes."""
    found: dict[str, Raw] = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            assert name not in found
            found[name] = (entry["dtype"], tuple(entry["shape"]), content[start + begin : start + end])
    return found


def tensor_bytes(folder: Path) -> int:
    """The size of all tensors of a folder: what runs that did each of them once have written together."""
    return sum(len(content) for _, _, content in read_tensors(folder).values())


def values(tensor: Raw) -> Doubles:
    """A tensor's numbers."""
    dtype, shape, content = tensor
    if dtype == "BF16":
        return (np.frombuffer(content, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(float).reshape(shape)
    return np.frombuffer(content, _FLOATS[dtype]).astype(float).reshape(shape)


def smallest_budget(pair: Pair) -> int:
    """Bytes of --ram that the refusal of a tiny budget says are enough."""
    try:
        api.plan(pair.base, pair.ft, ram=1_000_000)
    except BudgetError as error:
        return parse_bytes(str(error).rpartition(" ")[2])
    raise AssertionError("a megabyte was enough")


def shard_bytes(folder: Path) -> dict[str, bytes]:
    """The content of every shard and index of a folder."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if ".safetensors" in p.name}


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file below a folder with its inode, modification time and content."""
    return {
        str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns, p.read_bytes())
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@functools.cache
def _law_median(beta: float) -> float:
    """Median of the Marchenko–Pastur law by quadrature over an angle, in which its density has neither pole nor root.

    Singular values are 1 + √β·sin θ; their density is √((s² − a²)(b² − s²))/(πβs) on [a, b] = [1 − √β, 1 + √β].
    """
    root = np.sqrt(beta)

    def density(angle: float) -> float:
        s = 1 + root * np.sin(angle)
        if s <= 0:
            return 0.0
        return float(np.cos(angle) ** 2 * np.sqrt((s + 1 - root) * (s + 1 + root)) / (np.pi * s) * root**2 / beta)

    def below(angle: float) -> float:
        return float(integrate.quad(density, -np.pi / 2, angle, epsabs=1e-13, epsrel=1e-13, limit=200)[0])

    angle = optimize.brentq(lambda angle: below(angle) - 0.5, -1.5, 1.5, xtol=1e-14)
    return float(1 + root * np.sin(angle)) ** 2


@dataclass(frozen=True)
class Expected:
    """What the textbook makes of a pair of matrices."""

    rank: int
    tau: float
    sum: Doubles
    """W_base + Δ*, unrounded."""


def textbook(base: Doubles, ft: Doubles, *, scale: float = 1.0) -> Expected:
    """The repair by numpy's float64 SVD (Gavish & Donoho 2014)."""
    delta = ft - base
    with threadpool_limits(1):  # threads that wait for a busy processor take many times as long
        u, s, vh = np.linalg.svd(delta, full_matrices=False)
    beta = min(delta.shape) / max(delta.shape)
    omega = np.sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + np.sqrt(beta**2 + 14 * beta + 1)))
    tau = scale * omega * np.sort(s)[(len(s) - 1) // 2] / np.sqrt(_law_median(beta))
    kept = s > tau
    return Expected(int(kept.sum()), float(tau), base + (u[:, kept] * s[kept]) @ vh[kept])


def rounded_share(found: Doubles, exact: Doubles, dtype: str) -> float:
    """The share of values that are `exact` rounded to the nearest number of a dtype."""
    bits, least = _BITS_AND_LEAST[dtype]
    exponent = np.maximum(np.frexp(exact)[1] - 1, least)
    unit = np.ldexp(1.0, exponent - bits + 1)
    return float(np.mean(np.abs(found - exact) <= (0.5 + 1e-6) * unit))


def spoil(folder: Path, name: str, element: int, value: float) -> None:
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
