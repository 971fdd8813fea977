"""How long the methods take, from shapes and a machine's speeds. Pure; the shipped speeds decide what is tried.

Counted are products, the reduction to tridiagonal form (half products, half memory traffic), factorisations, and what
grows with the kept rank; what is bound by memory scales with its speed. docs/performance.md holds it against
measurement.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Speeds of one worker with one BLAS thread, or of one GPU.

    No msgspec: a machine that a GPU is lent with has NumPy, SciPy and torch, and may lack all else.

    Raises:
        ValueError: a number is nobody's speed.
    """

    float32_flops_per_s: float
    """Matrix products, as in a Gram matrix."""
    float64_flops_per_s: float
    cache_bytes_per_s: float
    """Of a symmetric matrix that fits the cache, read by matrix-vector products."""
    memory_bytes_per_s: float
    """The same from memory."""
    float32_first: bool
    """Whether 16-bit outputs are tried in float32."""
    start_s: float
    """Of each repair, whatever its size."""

    def __post_init__(self) -> None:
        products = (self.float32_flops_per_s, self.float64_flops_per_s)
        speeds = (*products, self.cache_bytes_per_s, self.memory_bytes_per_s)
        if not (all(1e3 <= speed <= 1e18 for speed in speeds) and 1e-9 <= self.start_s <= 1e3):
            raise ValueError("speeds are 1e3 to 1e18 a second, a start takes 1e-9 to 1e3 seconds")


CPU = Rates(
    float32_flops_per_s=95e9,
    float64_flops_per_s=48e9,
    cache_bytes_per_s=28e9,
    memory_bytes_per_s=17e9,
    float32_first=True,
    start_s=0.004,
)
"""One core with AVX-512 and 16 MB of cache for itself."""
CUDA = Rates(
    float32_flops_per_s=40e12,
    float64_flops_per_s=25e12,
    cache_bytes_per_s=0.2e12,
    memory_bytes_per_s=0.2e12,
    float32_first=False,
    start_s=0.05,
)
"""One data-centre GPU with fast float64; not measured."""
CACHE_BYTES = 20_000_000
"""Half a symmetric matrix of this size still counts as cached."""

KEPT_SHARE = 0.1
"""Of the rank, where nothing better is known; real fine-tunes keep 3 to 30%."""
_CONVERT_S = 6.5e-9
"""Per element, both passes: widening, subtracting, rounding."""
_VALUES_S = 9e-9
"""Per n², of all eigenvalues of a tridiagonal matrix."""
_VECTORS_S = 2.5e-8
"""Per n and vector, of twisted factorisations."""
_WINDOWS = 60
"""Vectors that are made exact."""
_BLOCK = 16
"""Vectors of a Krylov step."""
_STEPS = 21
"""Krylov steps for a first look, for the density, and for what the report tells."""
_BASIS = 3.0
"""Krylov vectors for each one that is kept."""
_HELD_STEPS, _HELD_BASIS = 12, 2.0
"""The same where no Gram matrix is formed: for the density, and where there is a gap."""
_STEP_S = 1.2e-6
"""Per n: making a step's vectors orthogonal to those before."""
_COPY_S = 5e-9
"""Per n²: a float32 copy of G."""
_SOLVES = 15
_SKINNY, _INDEFINITE, _SOLVING, _CHOLESKY, _SVD = 0.45, 0.57, 0.46, 0.85, 0.35
"""Speeds relative to large products of the same precision."""


@dataclass(frozen=True, slots=True)
class Stages:
    """Seconds of computation in the three stages of a task; files are not in them."""

    gram_s: float
    """While both sides are streamed."""
    factor_s: float
    """No file is touched."""
    merge_s: float
    """While both sides are streamed and the result is written."""

    @property
    def total_s(self) -> float:
        """All three."""
        return self.gram_s + self.factor_s + self.merge_s


def predicted(
    rows: int, cols: int, method: str, rates: Rates, kept: float = KEPT_SHARE, *, narrow: bool = True
) -> Stages:
    """Seconds of a repair by one worker.

    Args:
        rows, cols: longer and shorter side. method: "gram", "randomized", "fast", "held" or "full".
        kept: share of the rank. narrow: whether the result is stored in 16 bits.
    """
    m, n = float(rows), float(cols)
    k, single = kept * n, rates.float32_first and narrow and method != "full"
    product = rates.float32_flops_per_s if single else rates.float64_flops_per_s
    slow = CPU.memory_bytes_per_s / rates.memory_bytes_per_s
    convert = 0.5 * _CONVERT_S * slow * m * n
    squared = {"full": 2, "held": 0}.get(method, 1)
    gram = squared * m * n * n / product + convert
    if method == "full":
        factor = 9 * n**3 / (_SVD * rates.float64_flops_per_s)
    elif method == "gram":
        factor = _tridiagonal_s(n, k, rates, single=single, slow=slow)
    elif method == "held":
        factor = _held_s(m, n, k, rates, slow=slow)
    else:
        factor = _krylov_s(n, k, rates, single=single, slow=slow, exact=method == "randomized")
    return Stages(gram, rates.start_s + factor, 4 * m * n * k / product + convert)


def _tridiagonal_s(n: float, k: float, rates: Rates, *, single: bool, slow: float) -> float:
    """Reduction, all values, k vectors turned back; in float32 the windows.

    The reduction: 2n³/3 operations in products, and half the matrix read at each of n steps.
    """
    item, product = (4, rates.float32_flops_per_s) if single else (8, rates.float64_flops_per_s)
    speed = rates.cache_bytes_per_s if n * n / 2 * item <= CACHE_BYTES else rates.memory_bytes_per_s
    reduction = 2 / 3 * n**3 / product + n**3 / 6 * item / speed
    windows = 4 * n * n * _WINDOWS / rates.float64_flops_per_s if single else 0.0
    return reduction + slow * (_VALUES_S * n * n + _VECTORS_S * n * k) + 3 * n * n * k / product + windows


def _held_s(m: float, n: float, k: float, rates: Rates, *, slow: float) -> float:
    """Steps and values of k vectors by two products with the delta each."""
    product = rates.float32_flops_per_s
    step = 4 * _BLOCK * m * n / (_SKINNY * product) + slow * _STEP_S * n
    return (_HELD_STEPS + _HELD_BASIS * k / _BLOCK) * step + 4 * m * n * k / product


def _krylov_s(n: float, k: float, rates: Rates, *, single: bool, slow: float, exact: bool) -> float:
    """Steps, values of k vectors, the proof; for the exact median a count and solutions by its factors."""
    double = rates.float64_flops_per_s
    product = rates.float32_flops_per_s if single else double
    step = 2 * _BLOCK * n * n / (_SKINNY * product) + slow * _STEP_S * n
    found = (_STEPS + _BASIS * k / _BLOCK) * step + 2 * n * n * k / double
    if single:
        found += slow * _COPY_S * n * n
    found += n**3 / 3 / (_CHOLESKY * product)
    if exact:
        found += n**3 / 3 / (_INDEFINITE * double) + 2 * _BLOCK * n * n * _SOLVES / (_SOLVING * double)
        found += 8 * n * n * _WINDOWS / double
    return found
