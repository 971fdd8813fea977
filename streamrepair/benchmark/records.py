"""The records of a benchmark as they cross a file, format `streamrepair.bench/1`. No arithmetic but ratios of them."""

from __future__ import annotations

import msgspec

BENCH_FORMAT = "streamrepair.bench/1"

RANK_TOLERANCE = 1e-5
"""The kept rank may differ from float64's by the values that lie this close to τ, relative to τ."""
DELTA_TOLERANCE = 1e-4
"""Most that ‖Δ* − Δ*₆₄‖_F / ‖Δ*₆₄‖_F may be."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where it was measured, and with what."""

    cpu: str
    cores: int
    """Processors this process may use."""
    ram_bytes: int
    gpu: str | None
    """Name of the GPU measured on; null on the CPU."""
    python: str
    versions: dict[str, str | None]
    """Of streamrepair and the packages that compute; null where one is not installed."""
    blas: tuple[str, ...]
    """BLAS libraries loaded, with their versions."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """A result held against a float64 SVD of the same delta."""

    rank_exact: int
    rank_agrees: bool
    """Equal but for values within RANK_TOLERANCE of τ."""
    delta_error: float
    """‖Δ* − Δ*₆₄‖_F / ‖Δ*₆₄‖_F."""

    @property
    def passed(self) -> bool:
        """Whether rank and Δ* are what float64 says."""
        return self.rank_agrees and self.delta_error <= DELTA_TOLERANCE


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One contender on one matrix: stored bits of W_base and W_ft in, stored bits of W_base + Δ* out."""

    name: str
    """Backend, or "torch.linalg.svd" for the reference."""
    decided_by: str
    """Backend and precision that gave the answer, which is another where the one asked for could not."""
    climbed: tuple[str, ...] = ()
    """Why cheaper ones were left."""
    threads: int
    samples: tuple[float, ...]
    """Seconds of a repair in each repeat, the warm-up left out."""
    seconds: float
    """Their median."""
    gflops: float
    """Effective 10⁹ flops a second: those of `measure.thin_svd_flops` over `seconds`, whatever was really done."""
    speedup: float | None = None
    """Seconds of the reference over these; null without one."""
    pair_seconds: float | None = None
    """Median seconds for two such matrices at once, on two workers of one thread each; null where not measured."""
    pair_speedup: float | None = None
    """Matrices per second of two workers over those of the reference."""
    rank_kept: int
    peak_array_bytes: int | None = None
    """Peak of NumPy arrays beyond inputs and output, in the warm-up; null for the reference: its arrays are torch's."""
    peak_device_bytes: int | None = None
    """Peak of torch's allocations on the GPU; null on the CPU."""
    check: Check | None = None
    """Null with --no-check."""


class CaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One shape and spectrum."""

    shape: tuple[int, int]
    spectrum: str
    count: int
    """Matrices of this shape in the checkpoint that shapes were taken from; 1 where they were named."""
    flops: int
    """Nominal work, see `Run.gflops`."""
    reference: Run | None
    reference_absent: str = ""
    """Why there is no reference."""
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        """ "4096x1024 heavy"."""
        return f"{self.shape[0]}x{self.shape[1]} {self.spectrum}"


class Benchmark(msgspec.Struct, frozen=True, kw_only=True):
    """All that was measured."""

    format: str = BENCH_FORMAT
    date: str
    """UTC, ISO 8601."""
    machine: Machine
    device: str
    dtype: str
    """Of both inputs and the output."""
    threads: int
    """Most that the reference may use; the backends use one per matrix."""
    load_before: float
    """The system's load average over the minute before: other work on the machine disturbs times."""
    repeats: int
    cases: tuple[CaseRecord, ...]

    @property
    def faults(self) -> tuple[str, ...]:
        """Backends whose answer is not float64's, in words."""
        return tuple(
            f"{case.label}: {run.name} keeps {run.rank_kept} values where a float64 SVD keeps {run.check.rank_exact}, "
            f"its delta is off by {run.check.delta_error:.1e}"
            for case in self.cases
            for run in case.runs
            if run.check is not None and not run.check.passed
        )
