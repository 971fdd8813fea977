from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from streamrepair.decompose import full, ladder, lapack, twisted
from streamrepair.decompose.arithmetic import Arithmetic, Gram, Precision, on_host
from streamrepair.decompose.convert import Doubles
from streamrepair.decompose.device import DeviceArithmetic
from streamrepair.decompose.device.rates import Rates
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.operator import PanelSource
from streamrepair.decompose.truncation import NonFiniteDeltaError, Truncation, UnresolvedError
from streamrepair.errors import NumericalError
from streamrepair.spectral.threshold import HardThreshold
from tests.decompose.memory_faults import MESSAGE
from tests.decompose.sources import ArraySource, from_delta, low_rank_plus_noise

RULE = HardThreshold()
DEVICE = DeviceArithmetic("cpu", measured=Rates(1.0, 1.0))
Function = Callable[..., Any]


@pytest.fixture
def source() -> ArraySource:
    """Tall enough for float32 to be tried, and easy enough for it to succeed."""
    delta = np.random.default_rng(0).standard_normal((300, 90))
    delta[:, :5] *= 3.0
    return from_delta(delta, "F32")


def _decompose(source: ArraySource, arithmetic: Arithmetic | None = None, **knobs: Any) -> Truncation:
    return ladder.decompose(source, RULE, arithmetic=arithmetic or HostArithmetic(), backend="auto", **knobs)


def _is_right(truncation: Truncation, source: ArraySource) -> bool:
    delta = source.delta()
    u, s, vh = np.linalg.svd(delta, full_matrices=False)
    k = RULE.estimate(s, *delta.shape).rank_kept
    star = (u[:, :k] * s[:k]) @ vh[:k]
    mine = delta @ on_host(truncation.vh).T @ on_host(truncation.vh)
    return truncation.threshold.rank_kept == k and bool(np.linalg.norm(mine - star) <= 1e-4 * np.linalg.norm(star))


def _failing(original: Function, times: int, fault: Function) -> Function:
    """`original`, but its first `times` calls go through `fault`."""
    calls = 0

    def faulty(*arguments: Any, **knobs: Any) -> Any:
        nonlocal calls
        calls += 1
        return fault(original, *arguments, **knobs) if calls <= times else original(*arguments, **knobs)

    return faulty


def _raises(original: Function, *arguments: Any, **knobs: Any) -> Any:
    raise NumericalError("injected")


def _not_finite(original: Function, *arguments: Any, **knobs: Any) -> Any:
    result = original(*arguments, **knobs)
    parts = result if isinstance(result, tuple) else (result,)
    parts[-1].flat[:3] = np.nan
    return result


def _rotated(original: Function, *arguments: Any, **knobs: Any) -> Any:
    """Orthonormal vectors of something else."""
    vectors = original(*arguments, **knobs)
    vectors[...] = np.roll(vectors, 1, axis=1)
    return vectors


def _repeated(original: Function, *arguments: Any, **knobs: Any) -> Any:
    vectors = original(*arguments, **knobs)
    vectors[1:] = vectors[0]
    return vectors


def _shifted(original: Function, *arguments: Any, **knobs: Any) -> Any:
    values = original(*arguments, **knobs)
    values *= 1.0 + 1e-6
    return values


def _far_shifted(original: Function, *arguments: Any, **knobs: Any) -> Any:
    """By more than the windows, which compute again what lies in them, make good."""
    values = original(*arguments, **knobs)
    values[len(values) // 2 :] *= 1.1
    return values


def _another_median(original: Function, *arguments: Any, **knobs: Any) -> Any:
    """One value off, and that the one which decides: no kept vector and no count at τ² tells."""
    values = original(*arguments, **knobs)
    values[(len(values) - 1) // 2] = 0.5 * values[(len(values) - 1) // 2 :][:2].sum()
    return values


def _one_past_the_threshold(original: Function, *arguments: Any, **knobs: Any) -> Any:
    """A value of the bulk taken for a kept one: nothing but an independent count can tell before vectors are made."""
    values = original(*arguments, **knobs)
    values[-6] = 0.99 * values[-5]
    return values


def _scaled_diagonal(original: Function, *arguments: Any, **knobs: Any) -> Any:
    """By a little more than the precision in use explains."""
    diagonal, off, scales = original(*arguments, **knobs)
    return diagonal * diagonal.dtype.type(1.0 + (1e-3 if diagonal.dtype == np.float32 else 1e-7)), off, scales


def _no_rotation(original: Function, *arguments: Any, transpose: bool = False) -> None:
    """The vectors stay in T's basis."""
    if transpose:
        original(*arguments, transpose=True)


FAULTS: list[tuple[ModuleType, str, Function]] = [
    (lapack, "tridiagonalise", _raises),
    (lapack, "tridiagonalise", _not_finite),
    (lapack, "tridiagonalise", _scaled_diagonal),
    (lapack, "tridiagonal_values", _raises),
    (lapack, "tridiagonal_values", _not_finite),
    (lapack, "tridiagonal_values", _one_past_the_threshold),
]
FLOAT32_FAULTS = [
    *FAULTS,
    (lapack, "tridiagonal_values", _far_shifted),
    (twisted, "vectors", _raises),
    (twisted, "vectors", _not_finite),
    (twisted, "vectors", _rotated),
    (twisted, "vectors", _repeated),
    (lapack, "rotate_back", _no_rotation),
]
FLOAT64_FAULTS = [
    *FAULTS,
    (lapack, "tridiagonal_values", _shifted),
    (lapack, "tridiagonal_values", _another_median),
    (twisted, "vectors", _raises),
    (twisted, "vectors", _rotated),
    (lapack, "tridiagonal_vectors", _raises),
    (lapack, "tridiagonal_vectors", _not_finite),
    (lapack, "tridiagonal_vectors", _rotated),
    (lapack, "tridiagonal_vectors", _repeated),
    (lapack, "rotate_back", _no_rotation),
]


def test_a_sound_matrix_needs_no_climbing(source: ArraySource) -> None:
    truncation = _decompose(source)
    assert (truncation.backend, truncation.climbed) == ("gram-float32", ())
    assert truncation.threshold.rank_kept == 5
    assert _is_right(truncation, source)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("module", "routine", "fault"), FLOAT32_FAULTS)
def test_a_fault_in_float32_is_caught_and_float64_answers(
    monkeypatch: pytest.MonkeyPatch, source: ArraySource, module: ModuleType, routine: str, fault: Function
) -> None:
    times = 3 if routine == "rotate_back" else 1  # two of its calls serve the check of the reduction
    monkeypatch.setattr(module, routine, _failing(getattr(module, routine), times, fault))
    truncation = _decompose(source)
    assert truncation.backend == "gram-float64"
    assert truncation.climbed[0].startswith("gram-float32: ")
    assert len(truncation.climbed) == 1
    assert _is_right(truncation, source)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("module", "routine", "fault"), FLOAT64_FAULTS)
def test_a_fault_in_float64_is_caught_and_the_reference_answers(
    monkeypatch: pytest.MonkeyPatch, source: ArraySource, module: ModuleType, routine: str, fault: Function
) -> None:
    monkeypatch.setattr(module, routine, _failing(getattr(module, routine), 99, fault))
    if routine == "tridiagonal_vectors":  # asked for only where twisted factorisations were in vain
        monkeypatch.setattr(twisted, "vectors", _failing(twisted.vectors, 99, _repeated))
    truncation = _decompose(source, sharp=True)
    assert truncation.backend == "full"
    assert truncation.climbed[0].startswith("gram-float64: ")
    assert _is_right(truncation, source)


@pytest.mark.parametrize("fault", [_not_finite, _repeated])
def test_vectors_that_are_not_orthonormal_are_made_anew_by_mrrr(
    monkeypatch: pytest.MonkeyPatch, source: ArraySource, fault: Function
) -> None:
    monkeypatch.setattr(twisted, "vectors", _failing(twisted.vectors, 99, fault))
    truncation = _decompose(source, sharp=True)
    assert (truncation.backend, truncation.climbed) == ("gram-float64", ())
    assert _is_right(truncation, source)


def test_a_wrong_gram_matrix_is_caught(monkeypatch: pytest.MonkeyPatch, source: ArraySource) -> None:
    """The probes' images formed without it tell."""

    def spoiled(original: Function, panel: lapack.Real, gram: lapack.Real, *, beta: float) -> None:
        original(panel, gram, beta=beta)
        gram[0, 1] *= 1.5

    monkeypatch.setattr(lapack, "add_gram", _failing(lapack.add_gram, 99, spoiled))
    truncation = _decompose(source)
    assert truncation.backend == "full"
    assert _is_right(truncation, source)


def _svd_fault(kind: str, original: Function, matrix: Any, **knobs: Any) -> Any:
    if kind == "raises":
        raise NumericalError("LAPACK gesdd returned 1")
    u, s, vh = original(matrix, **knobs)
    if kind == "zeros":
        return u * 0, s * 0, vh * 0
    if kind == "nan":
        return u * np.nan, s, vh
    if kind == "values":
        return u, s * (1 + 1e-8), vh
    return u[:, ::-1], s, vh


@pytest.mark.parametrize("kind", ["raises", "zeros", "nan", "values", "vectors"])
def test_a_wrong_gesdd_is_caught_and_gesvd_answers(
    monkeypatch: pytest.MonkeyPatch, source: ArraySource, kind: str
) -> None:
    original = lapack.svd
    divided = []

    def faulty(matrix: Any, *, divide: bool) -> Any:
        divided.append(divide)
        return _svd_fault(kind, original, matrix, divide=divide) if divide else original(matrix, divide=divide)

    monkeypatch.setattr(lapack, "svd", faulty)
    truncation = full.truncate(source, RULE, arithmetic=HostArithmetic())
    assert divided == [True, False]
    assert _is_right(truncation, source)


@pytest.mark.parametrize("kind", ["raises", "zeros", "nan", "values", "vectors"])
def test_when_everything_fails_the_error_names_every_reason(
    monkeypatch: pytest.MonkeyPatch, source: ArraySource, kind: str
) -> None:
    monkeypatch.setattr(lapack, "tridiagonalise", _raises)
    monkeypatch.setattr(lapack, "svd", partial(_svd_fault, kind, lapack.svd))
    with pytest.raises(NumericalError) as caught:
        _decompose(source)
    message = str(caught.value)
    for part in ("gram-float32: ", "gram-float64: ", "rows: ", "row-space: ", "full: ", "default: ", "gesvd: "):
        assert part in message
    assert "\n" not in message


def test_the_reference_route_is_not_run_where_it_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, source: ArraySource
) -> None:
    def refuse(*_: Any, **__: Any) -> Truncation:
        raise AssertionError("full was run")

    monkeypatch.setattr(full, "truncate", refuse)
    monkeypatch.setattr(lapack, "tridiagonalise", _raises)
    with pytest.raises(NumericalError, match="does not fit the memory budget"):
        _decompose(source, full_fits=False)
    with pytest.raises(NumericalError, match="does not fit the memory budget"):
        ladder.decompose(source, RULE, arithmetic=HostArithmetic(), backend="full", full_fits=False)


def test_backend_full_goes_straight_there(source: ArraySource) -> None:
    truncation = ladder.decompose(source, RULE, arithmetic=HostArithmetic(), backend="full")
    assert (truncation.backend, truncation.climbed) == ("full", ())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("side", ["ft", "base", "both"])
@pytest.mark.parametrize("arithmetic", [HostArithmetic(), DEVICE], ids=["host", "device"])
def test_inputs_that_are_not_finite_are_named_as_such(
    arithmetic: Arithmetic, side: str, dtype: str, bad: float
) -> None:
    delta = np.random.default_rng(0).standard_normal((60, 20))
    sound = from_delta(delta, dtype)
    delta[59, 19] = bad
    spoiled = from_delta(delta, dtype)
    assert not np.isfinite(spoiled.delta()).all()
    base, ft = {
        "ft": (sound.base, spoiled.ft),
        "base": (spoiled.ft, sound.ft),
        "both": (spoiled.ft, spoiled.ft),
    }[side]
    for backend in ladder.Backend.__args__:  # type: ignore[attr-defined]
        with pytest.raises(NonFiniteDeltaError):
            ladder.decompose(ArraySource(base, ft, dtype), RULE, arithmetic=arithmetic, backend=backend)


def _eigh_fault(kind: str, original: Function, matrix: torch.Tensor) -> Any:
    if kind == "raises":
        raise torch.linalg.LinAlgError("failed to converge")  # type: ignore[attr-defined]
    if kind == "memory":
        raise RuntimeError(MESSAGE)
    values, vectors = original(matrix)
    if kind == "nan":
        vectors[0, 0] = float("nan")
    elif kind == "nan values":
        values[3] = float("nan")
    elif kind == "swapped":
        vectors = vectors.flip(1)
    elif kind == "not orthonormal":
        vectors[:, -1] = vectors[:, -2]
    elif kind == "values":
        values = values * (1.0 + 1e-6)
    else:
        values, vectors = torch.zeros_like(values), torch.zeros_like(vectors)
    return values, vectors


EIGH_FAULTS = ["raises", "memory", "nan", "nan values", "swapped", "not orthonormal", "values", "zeros"]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", EIGH_FAULTS)
def test_a_fault_in_eigh_is_caught_and_the_next_rung_answers(
    monkeypatch: pytest.MonkeyPatch, source: ArraySource, kind: str
) -> None:
    original = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: _eigh_fault(kind, original, matrix))
    truncation = _decompose(source, DEVICE)
    assert truncation.backend == "gram-float64"
    assert [reason.partition(":")[0] for reason in truncation.climbed] == ["gram-float64"]
    assert _is_right(truncation, source)


def test_a_device_that_fails_at_everything_leaves_the_work_to_the_host(
    monkeypatch: pytest.MonkeyPatch, source: ArraySource
) -> None:
    def no_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError(MESSAGE)

    for name in ("eigh", "svd", "qr"):
        monkeypatch.setattr(torch.linalg, name, no_memory)
    truncation = _decompose(source, DEVICE)
    assert [reason.partition(":")[0] for reason in truncation.climbed] == ["gram-float64"]
    assert not any("\n" in reason for reason in truncation.climbed)
    assert _is_right(truncation, source)


def test_mostly_empty_deltas_are_settled_by_counting_rows() -> None:
    delta = np.zeros((400, 60))
    delta[[3, 250, 399]] = np.random.default_rng(1).standard_normal((3, 60))
    for source in (from_delta(delta, "F32"), from_delta(delta.T, "F32")):
        truncation = _decompose(source, full_fits=False)
        assert (truncation.backend, truncation.noise_free) == ("rows", True)
        assert truncation.frob_delta_in == pytest.approx(float(np.linalg.norm(source.delta())), rel=1e-12)


def test_half_the_rows_filled_are_too_many_to_settle_it_so() -> None:
    """With n = 60 the lower median is the 30th value: 30 rows may leave it zero, 31 may not."""
    delta = np.zeros((400, 60))
    delta[:30] = np.random.default_rng(1).standard_normal((30, 60))
    assert _decompose(from_delta(delta, "F64")).noise_free
    delta[30] = 1.0
    truncation = _decompose(from_delta(delta, "F64"))
    assert truncation.backend not in ("rows", "row-space")
    assert not truncation.noise_free


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_squares_past_the_range_of_float64_are_no_fault_of_the_input(size: float) -> None:
    delta = low_rank_plus_noise(120, 40, 4)
    truncation = _decompose(from_delta(size * delta))
    assert truncation.backend == "full"
    assert truncation.threshold.rank_kept == 4
    assert truncation.frob_delta_in == pytest.approx(size * float(np.linalg.norm(delta)), rel=1e-12)
    assert 0.9 * truncation.frob_delta_in < truncation.frob_delta_out < truncation.frob_delta_in
    mostly_empty = np.where(np.arange(120)[:, None] < 5, size * delta, 0.0)
    sparse = _decompose(from_delta(mostly_empty))
    assert sparse.noise_free
    assert sparse.frob_delta_in == pytest.approx(size * float(np.linalg.norm(delta[:5])), rel=1e-12)


class _Counted(DeviceArithmetic):
    """A device that says in which precisions sums were asked for."""

    def __init__(self, rates: Rates) -> None:
        super().__init__("cpu", measured=rates)
        self.asked: list[str] = []

    def gram(self, source: PanelSource, probes: Doubles, precision: Precision) -> Gram:
        self.asked.append(precision)
        return super().gram(source, probes, precision)


def test_an_answer_from_a_batch_needs_no_other(source: ArraySource) -> None:
    alone = _decompose(source, DEVICE)
    counted = _Counted(Rates(1.0, 1.0))
    assert _decompose(source, counted, batched=alone) == alone
    assert counted.asked == []


@pytest.mark.parametrize(
    ("rates", "sharp", "failure", "asked"),
    [
        (Rates(1.0, 1.0), False, NumericalError("did not converge"), ["float64"]),
        (Rates(100.0, 1.0), False, NumericalError("did not converge"), ["float32"]),
        (Rates(100.0, 1.0), False, UnresolvedError("too blunt"), ["float64"]),
        (Rates(100.0, 1.0), True, UnresolvedError("too blunt"), []),
        (Rates(1.0, 1.0), False, UnresolvedError("too blunt"), []),
        (Rates(1.0, 1.0), False, NonFiniteDeltaError("squares overflowed"), ["float64"]),
    ],
)
def test_after_a_batch_the_usual_rungs_follow_but_for_what_would_fail_in_the_same_way(
    source: ArraySource, rates: Rates, sharp: bool, failure: NumericalError, asked: list[str]
) -> None:
    """float64 sums that were too blunt in a batch are too blunt alone; a solver may do better there."""
    counted = _Counted(rates)
    truncation = _decompose(source, counted, sharp=sharp, batched=failure)
    assert counted.asked == asked
    first = "float32" if rates.float32 > 50 and not sharp else "float64"
    assert truncation.climbed[0] == f"gram-{first} in a batch: {failure}"
    assert _is_right(truncation, source)
