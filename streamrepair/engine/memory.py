"""The memory model: projected bytes of one task and of the process, from shapes and dtypes alone. Pure.

Words: *allowed* is what the user stated, *projected* what this module computes before anything runs, *measured* the
peak the kernel saw. A projection is an upper bound on what is live at once; docs/memory.md derives each term.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from streamrepair.decompose.blocks import block_rows
from streamrepair.decompose.scratch import LARGE_ARRAY_BYTES, RETAINED_BYTES
from streamrepair.decompose.twisted import at_once

PROCESS_BYTES = 80_000_000
"""The interpreter with NumPy, SciPy and their BLAS loaded, before any task."""
TENSOR_BYTES = 4_000
"""Headers, plan and records of one tensor."""
WORKER_BYTES = 24_000_000
"""A worker's stacks, allocator arena and BLAS buffers."""
CUDA_HOST_BYTES = 3_000_000_000
"""What CUDA's libraries and context add to the process's resident memory."""
CUDA_FURTHER_BYTES = 500_000_000
"""What each GPU after the first adds to it."""
CUDA_CONTEXT_BYTES = 700_000_000
"""Device memory of the context and of the solver handles."""
RING_SLOTS = 3
"""Panels in flight per task: one filling, one waiting, one in use."""
COPY_BYTES = 1 << 22
"""Largest buffer of a task that only copies, or compares before it repairs."""
PIECE_BYTES = 1 << 19
"""What such a task takes at once through the page cache: a piece of each side stays in a core's second-level cache."""


@dataclass(frozen=True, slots=True)
class MatrixShape:
    """What the memory of a repair depends on."""

    rows: int
    """Longer side."""
    cols: int
    """Shorter side, n."""
    base_item_bytes: int
    ft_item_bytes: int
    out_item_bytes: int
    kept_share: float = 0.5
    """Largest share of the rank that can be kept: half, since τ is above the median, unless --scale is small."""

    @property
    def block(self) -> int:
        """Rows of one block."""
        return min(self.rows, block_rows(self.cols))


def panel_bytes(shape: MatrixShape, panel_rows: int) -> int:
    """Host bytes of the panels in flight, and of a result gathered to a panel (of a wide matrix)."""
    in_flight = min(RING_SLOTS * panel_rows, shape.rows) * shape.cols
    gathered = panel_rows * shape.cols * shape.out_item_bytes if panel_rows > shape.block else 0
    return in_flight * (shape.base_item_bytes + shape.ft_item_bytes) + gathered


def gram_bytes(shape: MatrixShape) -> int:
    """Peak of the Gram route in working memory: accumulating, factoring, or merging, whichever is largest.

    n² terms: G in float64 (8), its float32 partial sum (4); then reflectors (8), kept vectors (8·share) and their
    products in the check (8·share²); then vectors (8·share), their cast (4·share). The batch of vectors being made is
    five arrays of n × 256 doubles and two masks (n × 128 for large n); windows are five of n × 64. Block terms: Δ in
    float64 if the first precision fails (8); in the merge W_base (4, or 8 for wide outputs), Δ·Vᵀ (as W_base, times
    share) and the result, which stay until the next task's factoring if a worker may keep so much.
    """
    n, block, share = shape.cols, shape.block * shape.cols, shape.kept_share
    item = 4 if shape.out_item_bytes == 2 else 8
    rounded = 0 if shape.out_item_bytes == 8 else shape.out_item_bytes  # float64 is not rounded: no second array
    small = 12 * n * n if 8 * n * n <= LARGE_ARRAY_BYTES else 0  # G stays too
    merge_blocks = int((8 + item + item * share + rounded) * block) + small
    kept_on = max(8 * block + small, min(merge_blocks, RETAINED_BYTES))
    batch = 42 * n * min(at_once(n), max(1, int(share * n))) + 2560 * n
    accumulate = 12 * n * n + kept_on
    factor = int((8 + 8 * share + 8 * share * share) * n * n) + batch + kept_on
    merge = int((8 + item) * share * n * n) + merge_blocks
    return max(accumulate, factor, merge)


def full_bytes(shape: MatrixShape) -> int:
    """Peak of the reference route: QR of a block under R, then R, its vectors and gesdd's workspace, all float64."""
    n, block = shape.cols, shape.block * shape.cols
    qr = 3 * 8 * (n * n + block) + 16 * block
    svd = 10 * 8 * n * n
    return max(qr, svd)


_WORK: dict[str, Callable[[MatrixShape], int]] = {"gram": gram_bytes, "full": full_bytes}
"""Host bytes of each backend beside the panels: another backend adds its function."""


def device_bytes(shape: MatrixShape, backend: str) -> int:
    """Peak on a GPU: G, its copy and vectors in `eigh` with cuSOLVER's workspace, and a block as stored and converted.

    The count after it holds less: G, all vectors, the deflated matrix, its Cholesky factor, and half a matrix.
    """
    n, block = shape.cols, shape.block * shape.cols
    if backend == "full":
        return 10 * 8 * n * n + 48 * block
    return 6 * 8 * n * n + 48 * block


def repair_bytes(shape: MatrixShape, backend: str, panel_rows: int, *, cuda: bool = False) -> int:
    """Host bytes of one repair; with `cuda` the matrices are on the device and only vectors and results pass here."""
    n = shape.cols
    if cuda:
        # Pinned buffers (four up, two down; torch rounds each up to a power of two); vectors on their way to the CPU.
        sides = 4 * max(shape.base_item_bytes, shape.ft_item_bytes) + 2 * shape.out_item_bytes
        work = 16 * n * n + 2 * sides * shape.block * n
    else:
        work = _WORK[backend](shape)
    return panel_bytes(shape, panel_rows) + work + copy_bytes()


def copy_bytes() -> int:
    """Host bytes of a task that only copies: a buffer of each side, and the one that lines writes up for the disk."""
    return 3 * COPY_BYTES


def run_bytes(workers: int, *, tensors: int, gpus: int) -> int:
    """Host bytes of a run without its tasks: the process with the records of so many tensors, and its workers."""
    cuda = CUDA_HOST_BYTES + (gpus - 1) * CUDA_FURTHER_BYTES if gpus else 0
    return PROCESS_BYTES + TENSOR_BYTES * tensors + cuda + workers * WORKER_BYTES
