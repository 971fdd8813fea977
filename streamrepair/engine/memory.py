"""The memory model: projected bytes of one task and of the process, from shapes and dtypes alone. Pure.

Words: *allowed* is what the user stated, *projected* what this module computes before anything runs, *measured* the
peak the kernel saw. A projection is an upper bound on what is live at once; docs/memory.md derives each term.
"""

from __future__ import annotations

from dataclasses import dataclass

from streamrepair.decompose.blocks import block_rows
from streamrepair.decompose.scratch import LARGE_ARRAY_BYTES

PROCESS_BYTES = 120_000_000
"""The interpreter with NumPy, SciPy and their BLAS loaded, before any task."""
TENSOR_BYTES = 4_000
"""Headers, plan and records of one tensor."""
WORKER_BYTES = 24_000_000
"""A worker's stacks, allocator arena and BLAS buffers."""
CUDA_HOST_BYTES = 3_000_000_000
"""What CUDA's libraries and context add to the process's resident memory."""
CUDA_CONTEXT_BYTES = 700_000_000
"""Device memory of the context and of the solver handles."""
RING_SLOTS = 3
"""Panels in flight per task: one filling, one waiting, one in use."""
COPY_BYTES = 1 << 22
"""Buffer of a task that only copies, or compares before it repairs."""


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
    slots = min(RING_SLOTS, -(-shape.rows // panel_rows))
    elements = panel_rows * shape.cols
    gathered = elements * shape.out_item_bytes if panel_rows > shape.block else 0
    return slots * elements * (shape.base_item_bytes + shape.ft_item_bytes) + gathered


def gram_bytes(shape: MatrixShape) -> int:
    """Peak of the Gram route in working memory: accumulating, factoring, or merging, whichever is largest.

    n² terms: G in float64 (8), its float32 partial sum (4); then reflectors (8), kept vectors (8·share) and their
    products in the check (8·share²); then vectors (8·share), their cast (4·share). The batch of vectors being made is
    three arrays of n × 256 doubles and two masks. Block terms stay held: Δ in float64 if the first precision fails (8),
    W_base (4, or 8 for wide outputs), Δ·Vᵀ (as W_base, times share), the result.
    """
    n, block, share = shape.cols, shape.block * shape.cols, shape.kept_share
    item = 4 if shape.out_item_bytes == 2 else 8
    batch = 26 * n * min(256, max(1, int(share * n)))
    accumulate = 12 * n * n
    factor = int((8 + 8 * share + 8 * share * share) * n * n) + batch + 80 * 8 * n
    merge = int((8 + item) * share * n * n)
    held = int((8 + item + item * share + shape.out_item_bytes) * block)
    if 8 * n * n <= LARGE_ARRAY_BYTES:  # small enough to stay held too
        held += 12 * n * n
    return max(accumulate, factor, merge) + held


def full_bytes(shape: MatrixShape) -> int:
    """Peak of the reference route: QR of a block under R, then R, its vectors and gesdd's workspace, all float64."""
    n, block = shape.cols, shape.block * shape.cols
    qr = 3 * 8 * (n * n + block) + 16 * block
    svd = 10 * 8 * n * n
    return max(qr, svd)


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
        work = full_bytes(shape) if backend == "full" else gram_bytes(shape)
    return panel_bytes(shape, panel_rows) + work + 2 * COPY_BYTES


def process_bytes(tensors: int, *, cuda: bool) -> int:
    """Host bytes of the process before any task, with the records of so many tensors."""
    return PROCESS_BYTES + TENSOR_BYTES * tensors + (CUDA_HOST_BYTES if cuda else 0)


def run_bytes(task_bytes: list[int], workers: int, *, tensors: int, cuda: bool) -> int:
    """Host bytes of a run at its fullest: the process, and the `workers` largest tasks at once."""
    largest = sorted(task_bytes, reverse=True)[:workers]
    return process_bytes(tensors, cuda=cuda) + workers * WORKER_BYTES + sum(largest)
