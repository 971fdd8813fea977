"""The memory model: projected bytes of one task and of the process, from shapes and dtypes alone. Pure.

Words: *allowed* is what the user stated, *projected* what this module computes before anything runs, *measured* the
peak the kernel saw. A projection is an upper bound on what is live at once; docs/memory.md derives each term.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from streamrepair.decompose.operator import block_rows
from streamrepair.decompose.scratch import LARGE_ARRAY_BYTES, RETAINED_BYTES
from streamrepair.decompose.twisted import AT_ONCE

PROCESS_BYTES = 80_000_000
"""The interpreter with NumPy, SciPy and their BLAS loaded, before any task."""
TENSOR_BYTES = 4_000
"""Headers, plan and records of one tensor."""
_HEADER_BYTES_OF_A_TENSOR = 500
"""What of a header that has room in."""
_HEADER_COPIES = 8
"""Of what headers have beyond that, metadata as a rule: as bytes, as text and in pieces; 6.9 were met."""
WORKER_BYTES = 24_000_000
"""A worker's stacks, allocator arena and BLAS buffers."""
CUDA_HOST_BYTES = 3_000_000_000
"""What CUDA's libraries and context add to the process's resident memory."""
CUDA_FURTHER_BYTES = 500_000_000
"""What each GPU after the first adds to it."""
CUDA_CONTEXT_BYTES = 900_000_000
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
SINGLE_COLUMNS = 256
"""Where there are fewer nothing is tried in float32: it saves next to nothing in small matrices."""
WINDOWED = 400
"""Vectors of the windows in which float32 is made exact, at most; a test holds it to the backend's own limit."""
DEFLATED = 128
"""Values that are taken out of a delta at most; a test holds it to the backend's own limit."""
DEFLATED_SHARE = 4
"""Of n, one in so many at most; likewise."""
_FACTORED = 2048
"""Rows of their parts that are factored at once, copies of these, and pieces that are converted."""
_MADE = 8 * 256
"""Bytes a column of vectors that are checked, or turned back, at once."""
_BESIDE = 2048
"""Bytes a column of probes, their images, and all else that is a few vectors."""


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


@dataclass(frozen=True, slots=True)
class Panels:
    """Host bytes of a task's panels."""

    in_flight: int = 0
    """While a pass over the matrix runs: the ring."""
    kept: int = 0
    """Between passes: a pair that one panel holds; of a ring the buffers that are too small to be let go."""
    gathered: int = 0
    """In the merge, of a wide matrix: the result of a panel, put together before it is written."""

    @staticmethod
    def of(shape: MatrixShape, panel_rows: int) -> Panels:
        """Of panels of so many rows, a multiple of the block or all."""
        rows = min(panel_rows, shape.rows)
        sides = (shape.base_item_bytes, shape.ft_item_bytes)
        in_flight = min(RING_SLOTS * rows, shape.rows) * shape.cols
        stay = sides if rows == shape.rows else [side for side in sides if _stays(rows * shape.cols * side)]
        return Panels(in_flight * sum(sides), in_flight * sum(stay), rows * shape.cols * shape.out_item_bytes)


_NONE = Panels()


def gram_bytes(shape: MatrixShape, panels: Panels = _NONE) -> int:
    """Peak of the Gram route: of all that it does one after another the largest, with the panels that are held then.

    Accumulating: G in float64 (8n²) beside its float32 partial sum (4n²), or alone; Δ of a block. Factoring: see
    `_single_bytes`, or in float64 reflectors in G's place with kept vectors (8·share), which are checked, or turned
    back, a few hundred at a time. Merging: V in float64 (8·share), for 16-bit outputs its cast (4·share), and blocks.
    """
    n, share = shape.cols, shape.kept_share
    sums, narrow = _sums_bytes(n), shape.out_item_bytes == 2
    tried = narrow and n >= SINGLE_COLUMNS
    passing = panels.in_flight + _others_bytes(shape, panels)
    accumulate = sums + _delta_bytes(shape, 8)
    if tried:
        accumulate = max(accumulate, 12 * n * n + _delta_bytes(shape, 4))
    factor = sums + int(8 * share * n * n) + (_BESIDE + _MADE) * n + _between_bytes(shape, panels)
    merge = int((8 + (4 if narrow else 0)) * share * n * n) + panels.in_flight + panels.gathered
    merge += _sums_kept_bytes(n) + _merge_blocks_bytes(shape)
    # `ladder`'s look at the rows, with the directions that may be taken out after it.
    empty = _sums_kept_bytes(n) + _delta_stays_bytes(shape) + _delta_bytes(shape, 8) + 8 * _most_deflated(n) * n
    single = _single_bytes(shape, panels) if tried else 0
    return max(accumulate + passing, factor, single, merge, empty + passing, _deflated_bytes(shape, panels))


def _deflated_bytes(shape: MatrixShape, panels: Panels) -> int:
    """Peak of the pass over Δ less its parts along up to 128 vectors; of the last merge nothing is kept then.

    While it runs those vectors are there twice, a block's parts three times, and a small QR; after it seven times.
    """
    n, each, delta = shape.cols, 8 * _most_deflated(shape.cols), _delta_bytes(shape, 8)
    passing = delta + each * (2 * n + 3 * shape.block + _FACTORED)
    after = (delta if _stays(delta) else 0) + 7 * each * n
    return 8 * n * n + max(passing, after) + _BESIDE * n + panels.in_flight


def _most_deflated(n: int) -> int:
    return min(DEFLATED, n // DEFLATED_SHARE)


def _single_bytes(shape: MatrixShape, panels: Panels) -> int:
    """Peak of what follows a float32 Gram matrix: vectors, windows, or what is kept, put together; G lies beside all.

    Vectors: reflectors (4n²) and vectors (4·share) in float32, with those of the windows; a batch is made in four
    arrays of doubles. Windows: five arrays of theirs in the QR; three in a pass, beside panels, Δ and products with Δ.
    """
    n, share, block = shape.cols, shape.kept_share, shape.block
    width = min(n, WINDOWED)
    found = 4 * n * min(n, int(share * n) + width)
    vectors = 4 * n * n + found + (_BESIDE + 4 * 8 * max(1, min(AT_ONCE, n))) * n
    windows = found + (4 + 5 * 8) * width * n + _BESIDE * n
    kept = found + int(4 * share * n * n) + (8 * width + _BESIDE + _MADE) * n
    between = _between_bytes(shape, panels)
    passing = panels.in_flight + _others_bytes(shape, panels) + _delta_bytes(shape, 8) + 12 * block * width
    passes = found + (4 + 3 * 8) * width * n + _BESIDE * n
    return _sums_bytes(n) + max(max(vectors, windows, kept) + between, passes + passing)


def _stays(nbytes: int) -> bool:
    """Whether a worker keeps an array of its scratch that a step is done with."""
    return nbytes <= LARGE_ARRAY_BYTES


def _sums_bytes(n: int) -> int:
    """While a matrix is factored: G in float64, and its partial sum if that is small enough to be kept."""
    partial = 4 * n * n
    return 8 * n * n + (partial if _stays(partial) else 0)


def _sums_kept_bytes(n: int) -> int:
    """What a worker keeps of G (float64) and of its float32 partial sum once it is done with them."""
    return sum(item * n * n for item in (8, 4) if _stays(item * n * n))


def _item_bytes(shape: MatrixShape) -> int:
    """Of the merge's numbers."""
    return 4 if shape.out_item_bytes == 2 else 8


def _delta_bytes(shape: MatrixShape, item: int) -> int:
    """Δ of a block."""
    return item * shape.block * shape.cols


def _delta_stays_bytes(shape: MatrixShape) -> int:
    """What is kept of it after a pass: float64, should float32 fail, or both too large."""
    return max(_delta_bytes(shape, item) for item in (0, _item_bytes(shape), 8) if _stays(_delta_bytes(shape, item)))


def _results_bytes(shape: MatrixShape) -> tuple[int, int, int]:
    """Δ·Vᵀ, W_base and the result of a block."""
    item, elements = _item_bytes(shape), shape.block * shape.cols
    rounded = 0 if shape.out_item_bytes == 8 else shape.out_item_bytes  # float64 is not rounded: no second array
    return int(item * shape.kept_share * elements), item * elements, rounded * elements


def _merge_blocks_bytes(shape: MatrixShape) -> int:
    """Δ and the above; two bytes an element for the rows that are computed again."""
    delta = max(_delta_stays_bytes(shape), _delta_bytes(shape, _item_bytes(shape)))
    return delta + sum(_results_bytes(shape)) + 2 * shape.block * shape.cols


def _others_bytes(shape: MatrixShape, panels: Panels) -> int:
    """What a worker kept of the last matrix's merge, Δ's place, the sums' and the panels' excepted.

    Nothing where W_base alone is large: it is all or nothing.
    """
    if not _stays(_delta_bytes(shape, _item_bytes(shape))):
        return 0
    most = max(0, RETAINED_BYTES - panels.kept - _sums_kept_bytes(shape.cols))
    return min(sum(_results_bytes(shape)) + panels.gathered, most)


def _between_bytes(shape: MatrixShape, panels: Panels) -> int:
    """What is held beside a matrix that is factored, between passes: panels, Δ, and of the last merge."""
    return panels.kept + _delta_stays_bytes(shape) + _others_bytes(shape, panels)


def randomized_bytes(shape: MatrixShape, panels: Panels = _NONE) -> int:
    """Peak of block Krylov or, as it hands over where much is kept, of the Gram route, whichever is larger.

    Beside G, in whose other triangle the factors lie: its float32 copy for 16-bit outputs; a basis of c vectors, of
    which it may keep all, its projection and Ritz vectors (c²); and the largest of what is done one after another: four
    more c × c arrays in the solver; vectors that are held apart and the density's basis (208 vectors); the median's
    basis of at most 400 vectors with its Ritz pairs, and its surroundings (56 vectors seven times); those held against
    Δ itself, in a pass; kept vectors three times, rotated and with their images, or for the proof as they are and
    scaled. A step has 16 vectors eight times.
    """
    n = shape.cols
    c, beside, k = max(n // KRYLOV_SHARE, KRYLOV_LEAST), min(n, KRYLOV_MEDIAN), max(1, n // KRYLOV_KEPT) + 1
    copy = 4 * n * n if shape.out_item_bytes == 2 else 0
    step, around = 8 * 8 * 16 * n, 8 * 7 * 56 * n
    density = 8 * c * n + 8 * 208 * n + step
    median = 8 * beside * n + 40 * beside * beside + around + step
    kept = 3 * 8 * n * k + 16 * k * k
    search = max(32 * c * c, density, median, kept) + _between_bytes(shape, panels)
    against = 5 * 8 * 56 * n + _delta_bytes(shape, 8) + panels.in_flight + _others_bytes(shape, panels)
    beyond = copy + 8 * c * n + 16 * c * c + _BESIDE * n + max(search, against)
    held = held_bytes(shape, panels) if shape.held else 0
    return max(gram_bytes(shape, panels), _sums_bytes(n) + beyond, held)


def held_bytes(shape: MatrixShape, panels: Panels = _NONE) -> int:
    """Peak of block Krylov without a Gram matrix: the delta in float32, and what is done one after another.

    Beside what is kept of another matrix's sums: a pass that reads it, 256 rows in float64; the basis with its
    projection and Ritz vectors, and four more c × c arrays in the solver; or vectors that are held apart and a basis of
    400 that bounds the rest, with its Ritz pairs; or kept vectors as they are, in float32 and rotated, their images
    likewise, and products of a block of 2048 rows. A step has images of 16 vectors.
    """
    m, n = shape.rows, shape.cols
    c, k, beside = max(n // KRYLOV_SHARE, KRYLOV_LEAST), max(1, n // KRYLOV_KEPT) + 1, min(n, KRYLOV_MEDIAN)
    step = 8 * 8 * 16 * n + 2 * 4 * 16 * m
    proof = 8 * c * n + 8 * beside * n + 40 * beside * beside + step
    kept = 44 * k * n + 12 * min(2048, m) * k + 40 * k * k
    search = 8 * c * n + 16 * c * c + max(32 * c * c, proof, kept) + _between_bytes(shape, panels)
    passing = 8 * 256 * n + panels.in_flight + _others_bytes(shape, panels) + _delta_stays_bytes(shape)
    return 4 * m * n + _sums_kept_bytes(n) + _BESIDE * n + max(search, passing)


def full_bytes(shape: MatrixShape, panels: Panels = _NONE) -> int:
    """Peak of the reference route: QR of a block under R, then R, its vectors and gesdd's workspace, all float64.

    The block is there five times: Δ, below R, in LAPACK's order, factored, and its triangle; beside it lies what a
    worker keeps of the last merge, Δ's place excepted. The merge may need more where a matrix is long.
    """
    n, block = shape.cols, shape.block * shape.cols
    qr = 5 * 8 * (n * n + block) + _others_bytes(shape, panels) + panels.in_flight
    svd = 10 * 8 * n * n + _between_bytes(shape, panels)
    return max(qr, svd, gram_bytes(shape, panels))


_WORK: dict[str, Callable[[MatrixShape, Panels], int]] = {
    "gram": gram_bytes,
    "randomized": randomized_bytes,
    "full": full_bytes,
}
"""Host bytes of each backend with its panels: another backend adds its function."""


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


@lru_cache(maxsize=1 << 12)  # a checkpoint has few shapes, and each is asked for several times a tensor
def repair_bytes(shape: MatrixShape, backend: str, panel_rows: int, *, cuda: bool = False) -> int:
    """Host bytes of one repair; with `cuda` the matrices are on the device and only vectors and results pass here."""
    n, panels = shape.cols, Panels.of(shape, panel_rows)
    if cuda:
        # Pinned buffers (four up, two down; torch rounds each up to a power of two); vectors on their way to the CPU,
        # or R, U and V as they came from there, held against each other in three more arrays.
        sides = 4 * max(shape.base_item_bytes, shape.ft_item_bytes) + 2 * shape.out_item_bytes
        returned = (48 if backend == "full" else 16) * n * n
        work = returned + 2 * sides * shape.block * n + panels.in_flight + panels.gathered
    else:
        work = _WORK[backend](shape, panels)
    return work + copy_bytes()


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


def records_bytes(tensors: int, *, headers_bytes: int = 0) -> int:
    """Host bytes of the headers, plan and records of so many tensors."""
    return TENSOR_BYTES * tensors + _HEADER_COPIES * max(0, headers_bytes - _HEADER_BYTES_OF_A_TENSOR * tensors)


def run_bytes(workers: int, *, records_bytes: int, gpus: int) -> int:
    """Host bytes of a run without its tasks: the process, the headers and records that it holds, and its workers."""
    cuda = CUDA_HOST_BYTES + (gpus - 1) * CUDA_FURTHER_BYTES if gpus else 0
    return PROCESS_BYTES + records_bytes + cuda + workers * WORKER_BYTES
