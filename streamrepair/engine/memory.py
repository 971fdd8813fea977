"""The memory model: projected bytes of one task and of the process, from shapes and dtypes alone. Pure.

Words: *allowed* is what the user stated, *projected* what this module computes before anything runs, *measured* the
peak the kernel saw. A projection is an upper bound on what is live at once; docs/memory.md derives each term.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from streamrepair.decompose.blocks import block_rows
from streamrepair.decompose.scratch import LARGE_ARRAY_BYTES, RETAINED_BYTES
from streamrepair.decompose.twisted import AT_ONCE

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
"""Device memory of the context and of the solver handles, which is not torch's."""
CUDA_LIBRARY_BYTES = 150_000_000
"""What torch allocates there whatever the matrix: cuBLAS's workspace, 32 MiB from Hopper on, and to measure rates."""
RING_SLOTS = 3
"""Panels in flight per task: one filling, one waiting, one in use."""
COPY_BYTES = 1 << 22
"""Largest buffer of a task that only copies, or compares before it repairs."""
PIECE_BYTES = 1 << 19
"""What such a task takes at once through the page cache: a piece of each side stays in a core's second-level cache."""
KRYLOV_SHARE = 6
"""Block Krylov's basis has at most n / this many vectors; a test holds it to the backend's own limit."""
KRYLOV_LEAST = 128
"""Vectors that it has room for in any case; likewise."""
KRYLOV_KEPT = 12
"""Where more than n / this many values are kept it hands over; likewise."""
KRYLOV_MEDIAN = 400
"""Vectors of the basis that finds the median; likewise."""


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
    held: bool = False
    """Whether block Krylov goes without a Gram matrix first, by a delta that is held whole."""

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

    n² terms: G in float64 (8), its float32 partial sum (4); then reflectors in G's place, kept vectors (8·share) and
    their products in the check (8·share²), or, for 16-bit outputs, reflectors and vectors in float32 beside G; then
    vectors (8·share), their cast (4·share). In float32's case a batch of vectors is made in four arrays of doubles;
    windows are five of n × 64. Block terms: Δ in float64 if the first precision
    fails (8); in the merge W_base (4, or 8 for wide outputs), Δ·Vᵀ (as W_base, times share) and the result, which stay
    until the next task's factoring if a worker may keep so much.
    """
    n, share = shape.cols, shape.kept_share
    vectors = int((8 * share + 8 * share * share) * n * n)
    if shape.out_item_bytes == 2:
        vectors = max(vectors, int((4 + 4 * share) * n * n) + 4 * 8 * n * min(AT_ONCE, max(1, int(share * n))))
    factor = _sums_bytes(n) + vectors + 5 * 8 * 64 * n + _kept_on_bytes(shape)
    merge = _sums_kept_bytes(n) + int((8 + _item_bytes(shape)) * share * n * n) + _merge_blocks_bytes(shape)
    return max(12 * n * n + _kept_on_bytes(shape), factor, merge)


def _sums_bytes(n: int) -> int:
    """While a matrix is factored: G in float64, and its partial sum if that is small enough to be kept."""
    partial = 4 * n * n
    return 8 * n * n + (partial if partial <= LARGE_ARRAY_BYTES else 0)


def _sums_kept_bytes(n: int) -> int:
    """What a worker keeps of G (float64) and of its float32 partial sum once it is done with them."""
    return sum(item * n * n for item in (8, 4) if item * n * n <= LARGE_ARRAY_BYTES)


def _item_bytes(shape: MatrixShape) -> int:
    """Of the merge's numbers."""
    return 4 if shape.out_item_bytes == 2 else 8


def _merge_blocks_bytes(shape: MatrixShape) -> int:
    """Δ, W_base, Δ·Vᵀ and the result of a block."""
    item = _item_bytes(shape)
    rounded = 0 if shape.out_item_bytes == 8 else shape.out_item_bytes  # float64 is not rounded: no second array
    return int((8 + item + item * shape.kept_share + rounded) * shape.block * shape.cols)


def _kept_on_bytes(shape: MatrixShape) -> int:
    """Blocks that are held while a matrix is factored: Δ of this task, or what is kept of the last one's merge."""
    most = max(0, RETAINED_BYTES - _sums_kept_bytes(shape.cols))
    return max(8 * shape.block * shape.cols, min(_merge_blocks_bytes(shape), most))


def randomized_bytes(shape: MatrixShape) -> int:
    """Peak of block Krylov or, as it hands over where much is kept, of the Gram route, whichever is larger.

    Beside G, in whose other triangle the factors lie: its float32 copy for 16-bit outputs; a basis of c vectors, of
    which it may keep all, with the Ritz pairs in it (five c × c arrays in the solver); and the largest of three:
    vectors that are held apart and the density's basis (208 vectors); the median's basis of at most 400 vectors with
    its Ritz pairs, and its surroundings (56 vectors seven times); kept vectors three times, rotated and with their
    images, or for the proof as they are and scaled. A step has 16 vectors eight times.
    """
    n = shape.cols
    c, beside = max(n // KRYLOV_SHARE, KRYLOV_LEAST), min(n, KRYLOV_MEDIAN)
    copy = 4 * n * n if shape.out_item_bytes == 2 else 0
    basis = 8 * c * n + 40 * c * c
    density = 8 * c * n + 8 * 208 * n
    median = 8 * beside * n + 40 * beside * beside + 8 * 7 * 56 * n
    kept = 3 * 8 * n * (max(1, n // KRYLOV_KEPT) + 1)
    search = copy + basis + 8 * 8 * 16 * n + max(density, median, kept)
    held = held_bytes(shape) if shape.held else 0
    return max(gram_bytes(shape), _sums_bytes(n) + search + _kept_on_bytes(shape), held)


def held_bytes(shape: MatrixShape) -> int:
    """Peak of block Krylov without a Gram matrix: the delta in float32, the basis, and the larger of two.

    These are vectors that are held apart and the basis of 400 that bounds the rest, with its Ritz pairs; and kept
    vectors, as they are, in float32 and rotated, their images likewise, and products of a block of 2048 rows.
    """
    m, n = shape.rows, shape.cols
    c, k, beside = max(n // KRYLOV_SHARE, KRYLOV_LEAST), max(1, n // KRYLOV_KEPT) + 1, min(n, KRYLOV_MEDIAN)
    proof = 8 * c * n + 8 * beside * n + 40 * beside * beside
    kept = 44 * k * n + 12 * min(2048, m) * k + 40 * k * k
    step = 8 * 8 * 16 * n + 2 * 4 * 16 * m
    return 4 * m * n + 8 * c * n + 40 * c * c + step + max(proof, kept) + _kept_on_bytes(shape)


def full_bytes(shape: MatrixShape) -> int:
    """Peak of the reference route: QR of a block under R, then R, its vectors and gesdd's workspace, all float64.

    The block is there five times: Δ, below R, in LAPACK's order, factored, and its triangle; beside it lies what a
    worker keeps of the last merge, Δ's place excepted.
    """
    n, block = shape.cols, shape.block * shape.cols
    qr = 5 * 8 * (n * n + block) + _merge_blocks_bytes(shape) - 8 * block
    svd = 7 * 8 * n * n + _kept_on_bytes(shape)
    return max(qr, svd, 10 * 8 * n * n)


_WORK: dict[str, Callable[[MatrixShape], int]] = {
    "gram": gram_bytes,
    "randomized": randomized_bytes,
    "full": full_bytes,
}
"""Host bytes of each backend beside the panels: another backend adds its function."""


def device_bytes(shape: MatrixShape, backend: str) -> int:
    """Peak on a GPU: G, its copy and vectors in `eigh` with cuSOLVER's workspace, and a block as stored and converted.

    The count after it holds less: G, all vectors, the deflated matrix, its Cholesky factor, and half a matrix.
    """
    n, block = shape.cols, shape.block * shape.cols
    if backend == "full":
        return 10 * 8 * n * n + 48 * block
    return 6 * 8 * n * n + 48 * block


def card_bytes(vram_bytes: int) -> int:
    """Of a card, while a unit runs that needs so much of it."""
    return CUDA_CONTEXT_BYTES + CUDA_LIBRARY_BYTES + vram_bytes


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


def pair_bytes(shape: MatrixShape) -> int:
    """Both sides of a matrix as stored."""
    return shape.rows * shape.cols * (shape.base_item_bytes + shape.ft_item_bytes)


def batch_bytes(shape: MatrixShape, count: int) -> int:
    """Host bytes of a batch of so many matrices beside those of one: every pair is read whole and kept to its merge."""
    return (count - 1) * pair_bytes(shape)


def batch_device_bytes(shape: MatrixShape, count: int) -> int:
    """Device bytes of a batch of so many matrices beside those of one: Gram matrices, `eigh`, a block of every Δ.

    G is there twice where some members left the batch, then its vectors, and those that are kept as a copy; the rest is
    for cuSOLVER's workspace.
    """
    n = shape.cols
    return (count - 1) * (5 * 8 * n * n + 8 * shape.block * n)


def copy_bytes() -> int:
    """Host bytes of a task that only copies: a buffer of each side, and the one that lines writes up for the disk."""
    return 3 * COPY_BYTES


def run_bytes(workers: int, *, tensors: int, gpus: int) -> int:
    """Host bytes of a run without its tasks: the process with the records of so many tensors, and its workers."""
    cuda = CUDA_HOST_BYTES + (gpus - 1) * CUDA_FURTHER_BYTES if gpus else 0
    return PROCESS_BYTES + TENSOR_BYTES * tensors + cuda + workers * WORKER_BYTES
