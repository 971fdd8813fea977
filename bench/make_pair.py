"""Makes a pair of checkpoints, BASE and a fine-tuned FT, in the shapes of a real model and with a chosen spectrum.

    python bench/make_pair.py llama-135m PAIR --spectrum heavy

W_base is N(0, 0.02²). The delta is one of
- gapped: low rank (3% of the short side, singular values 3 to 30 times the noise's edge) plus Gaussian noise;
- heavy: singular values that run continuously through the threshold, 10 to 30% of them above it, as in real fine-tunes;
- zero: FT equals BASE.
Both files grow tensor by tensor: memory is at most one tensor of each, in the checkpoint's dtype, plus a few chunks.
The numbers of a tensor depend on its name, its shape and the seed, not on sharding, other tensors or threads.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import time
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import scipy.fft
import torch
from architectures import ARCHITECTURES, Decoder, TensorSpec, architecture, tensors
from checkpoint_folder import Folder, write_sidecars

from streamrepair.units import format_bytes, format_seconds, parse_bytes

SPECTRA = ("gapped", "heavy", "zero")
DTYPES = {
    "bf16": (torch.bfloat16, "BF16", "bfloat16"),
    "f16": (torch.float16, "F16", "float16"),
    "f32": (torch.float32, "F32", "float32"),
}
W_STD = 0.02
DELTA_STD = 1e-3
"""Large against the rounding of W_ft to bf16 (about 3.5e-5), small against W."""
CHUNK_VALUES = 1 << 20


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the numbers are made."""

    spectrum: str
    dtype: torch.dtype
    seed: int


def _generator(recipe: Recipe, name: str, *path: int) -> torch.Generator:
    """The stream of one chunk of one tensor, independent of every other."""
    words = np.random.SeedSequence([recipe.seed, zlib.crc32(name.encode()), *path]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))


class Delta:
    """A tall m × n delta (m ≥ n) with a chosen spectrum, given out in row chunks."""

    def __init__(self, recipe: Recipe, name: str, m: int, n: int) -> None:
        self.spectrum, self.m, self.n = recipe.spectrum, m, n
        generator = _generator(recipe, name, 0)
        if self.spectrum == "gapped":
            self._gapped(generator)
        elif self.spectrum == "heavy":
            self._heavy(generator)

    def _gapped(self, generator: torch.Generator) -> None:
        rank = max(1, round(0.03 * self.n))
        edge = math.sqrt(self.m) + math.sqrt(self.n)  # of noise with unit entries
        s = torch.logspace(math.log10(30.0), math.log10(3.0), rank) * edge
        self.noise_std = DELTA_STD / math.sqrt(1.0 + float(s.square().sum()) / (self.m * self.n))
        v, _ = torch.linalg.qr(torch.randn(self.n, rank, generator=generator))
        # rows of U are drawn chunk by chunk as N(0, 1/m): orthonormal up to √(rank/m)
        self.right = (v * (s * self.noise_std / math.sqrt(self.m))).T.contiguous()

    def _heavy(self, generator: torch.Generator) -> None:
        # Columns decay as (1 + j/c)^-α. α grows with β because ω(β)/μ(β), the threshold over the median, does:
        # with this rule about the same share of the rank is kept at every aspect ratio.
        alpha = 0.5 + 0.5 * math.sqrt(self.n / self.m)
        scale = (1.0 + torch.arange(self.n) / (0.01 * self.n)) ** -alpha
        scale *= DELTA_STD / scale.square().mean().sqrt()
        self.column_scale = scale[torch.randperm(self.n, generator=generator)]

    def rows(self, generator: torch.Generator, count: int) -> torch.Tensor:
        """The next `count` rows, float32, drawn from `generator`."""
        noise = torch.randn(count, self.n, generator=generator)
        if self.spectrum == "gapped":
            left = torch.randn(count, len(self.right), generator=generator)
            return torch.addmm(noise, left, self.right, beta=self.noise_std)
        noise *= self.column_scale
        # an orthogonal mixing of the columns: the spectrum stays, the scales spread over all entries
        return torch.from_numpy(scipy.fft.dct(noise.numpy(), axis=1, norm="ortho", overwrite_x=True))


def _vector_pair(spec: TensorSpec, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    generator = _generator(recipe, spec.name, 0)
    is_bias = spec.name.endswith(".bias")
    base = W_STD * torch.randn(spec.shape, generator=generator) + (0.0 if is_bias else 1.0)
    step = DELTA_STD if is_bias else 0.01  # bf16 near 1 is spaced by 0.008
    ft = base if recipe.spectrum == "zero" else base + step * torch.randn(spec.shape, generator=generator)
    return base.to(recipe.dtype), ft.to(recipe.dtype)


def _matrix_chunks(
    spec: TensorSpec, recipe: Recipe, pool: ThreadPoolExecutor, threads: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(first row, base rows, ft rows) of the matrix stood upright: m × n with m ≥ n; wide ones come transposed."""
    m, n = max(spec.shape), min(spec.shape)
    delta = Delta(recipe, spec.name, m, n)
    height = max(1, CHUNK_VALUES // n)

    def chunk(start: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        generator = _generator(recipe, spec.name, 1, start)
        count = min(height, m - start)
        base = torch.randn(count, n, generator=generator).mul_(W_STD).to(recipe.dtype)
        if recipe.spectrum == "zero":
            return start, base, base
        # the delta is added to the rounded base, so that the only other noise is the rounding of W_ft
        return start, base, delta.rows(generator, count).add_(base).to(recipe.dtype)

    waiting: deque[Future[tuple[int, torch.Tensor, torch.Tensor]]] = deque()
    for start in range(0, m, height):
        waiting.append(pool.submit(chunk, start))
        if len(waiting) > threads:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _pieces(
    spec: TensorSpec, recipe: Recipe, pool: ThreadPoolExecutor, threads: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The values of BASE and FT in the order of the file; a wide matrix, made by columns, comes in one piece."""
    if len(spec.shape) == 1:
        yield _vector_pair(spec, recipe)
    elif spec.shape[0] >= spec.shape[1]:
        for _, base, ft in _matrix_chunks(spec, recipe, pool, threads):
            yield base, ft
    else:
        whole = (torch.empty(spec.shape, dtype=recipe.dtype), torch.empty(spec.shape, dtype=recipe.dtype))
        for start, *parts in _matrix_chunks(spec, recipe, pool, threads):
            for target, part in zip(whole, parts, strict=True):
                target[:, start : start + len(part)] = part.T
        yield whole


def _write(stream: BinaryIO, values: torch.Tensor) -> None:
    stream.write(memoryview(values.contiguous().view(-1).view(torch.uint8).numpy()))


def make_pair(
    decoder: Decoder,
    out: Path,
    *,
    spectrum: str = "gapped",
    dtype: str = "bf16",
    max_shard_bytes: int = 5_000_000_000,
    ft_max_shard_bytes: int | None = None,
    seed: int = 0,
    sparse: bool = False,
    threads: int | None = None,
) -> int:
    """Writes out/base and out/ft (neither may exist) and returns the bytes of tensor data in both.

    Raises:
        FileExistsError: there is a pair at `out` already.
    """
    specs = tensors(decoder)
    torch_dtype, header_name, config_name = DTYPES[dtype]
    folders = tuple(
        Folder(out / side, specs, dtype_name=header_name, itemsize=torch_dtype.itemsize, max_shard_bytes=limit_bytes)
        for side, limit_bytes in (("base", max_shard_bytes), ("ft", ft_max_shard_bytes or max_shard_bytes))
    )
    for folder in folders:
        write_sidecars(folder.path, decoder, config_name)
        if sparse:
            folder.write_sparse()
    if not sparse:
        _fill(folders, specs, Recipe(spectrum, torch_dtype, seed), threads or len(os.sched_getaffinity(0)))
    return 2 * sum(spec.size for spec in specs) * torch_dtype.itemsize


def _fill(folders: tuple[Folder, ...], specs: list[TensorSpec], recipe: Recipe, threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        for spec in specs:
            streams = [folder.begin(spec) for folder in folders]
            for piece in _pieces(spec, recipe, pool, threads):
                for stream, values in zip(streams, piece, strict=True):
                    _write(stream, values)
    for folder in folders:
        folder.close()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("arch", choices=ARCHITECTURES)
    parser.add_argument("out", type=Path, help="gets the folders base and ft")
    parser.add_argument("--spectrum", choices=SPECTRA, default="gapped")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--layers", type=int, help="only the first N layers")
    parser.add_argument("--max-shard", type=parse_bytes, default="5GB", metavar="SIZE")
    parser.add_argument("--ft-max-shard", type=parse_bytes, metavar="SIZE", help="FT's shards, if not as BASE's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sparse", action="store_true", help="true headers, no data, no disk: for timing plans")
    parser.add_argument("--overwrite", action="store_true", help="remove out/base and out/ft first")
    return parser.parse_args()


def main() -> int:
    """Makes the pair and says how fast."""
    arguments = _arguments()
    if arguments.overwrite:
        for side in ("base", "ft"):
            shutil.rmtree(arguments.out / side, ignore_errors=True)
    torch.set_num_threads(1)  # the threads are ours, one chunk each
    start = time.perf_counter()
    size_bytes = make_pair(
        architecture(arguments.arch, layers=arguments.layers),
        arguments.out,
        spectrum=arguments.spectrum,
        dtype=arguments.dtype,
        max_shard_bytes=arguments.max_shard,
        ft_max_shard_bytes=arguments.ft_max_shard,
        seed=arguments.seed,
        sparse=arguments.sparse,
    )
    wall_s = time.perf_counter() - start
    print(f"{format_bytes(size_bytes)} in {format_seconds(wall_s)}, {format_bytes(size_bytes / wall_s)}/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
