from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from streamrepair.decompose import certify
from streamrepair.decompose.convert import widen
from streamrepair.decompose.device import DeviceArithmetic
from streamrepair.decompose.device import arithmetic as device_arithmetic
from streamrepair.decompose.device import rates as device_rates
from streamrepair.decompose.device.rates import Rates, ieee_products, rates
from streamrepair.decompose.device.staging import TORCH_TYPE, Download, Upload
from streamrepair.decompose.host import HostArithmetic
from streamrepair.decompose.operator import Panel
from streamrepair.errors import NumericalError
from tests.decompose.sources import ArraySource, fine_tuned, from_delta, low_rank_plus_noise, stored

Doubles = NDArray[np.float64]
CPU = torch.device("cpu")
FAST, SLOW = Rates(1e12, 1e12), Rates(1e12, 1e10)


class Operations(TorchDispatchMode):
    """Counts torch's operations by name, and notes the setting for float32 products at each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.settings: list[str] = []
        self.products: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket).removeprefix("aten.")
        self.names.append(name)
        if name == "mm":
            self.products.append(args[0].dtype)
        if name in ("mm", "addmm", "addmm_") and args[-1].dtype == torch.float32:
            self.settings.append(device_rates._get_product_setting())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("float64", "expected"), [(1e12, ("float64",)), (0.5e12, ("float64",))])
def test_fast_float64_is_used_alone(float64: float, expected: tuple[str, ...]) -> None:
    assert DeviceArithmetic("cpu", measured=Rates(1e12, float64)).precisions == expected


@pytest.mark.parametrize("ratio", [32, 64])
def test_slow_float64_is_tried_second(ratio: int) -> None:
    assert DeviceArithmetic("cpu", measured=Rates(1e12, 1e12 / ratio)).precisions == ("float32", "float64")


def test_rates_are_measured_once_in_a_process() -> None:
    found = rates(CPU)
    assert found.float32 > 0
    assert found.float64 > 0
    with Operations() as seen:
        assert rates(CPU) is found
    assert seen.names == []
    assert DeviceArithmetic("cpu").precisions == found.precisions


@pytest.fixture
def unmeasured() -> Iterator[None]:
    """As at the start of a process."""
    device_rates._measured.cache_clear()
    yield
    device_rates._measured.cache_clear()


def test_both_precisions_are_measured_in_turn(unmeasured: None) -> None:
    """An idle card takes a while to reach its clock: by itself, the precision that comes first would look slow."""
    with Operations() as seen:
        rates(CPU)
    assert seen.products == [torch.float32, torch.float64] * 6


def test_solvers_are_loaded_by_one_thread(monkeypatch: pytest.MonkeyPatch, unmeasured: None) -> None:
    """torch loads them at the first call, and raises where a second one comes meanwhile."""
    original, loading = torch.linalg.eigh, threading.Lock()
    calls = []

    def eigh(matrix: torch.Tensor) -> Any:
        calls.append(loading.acquire(blocking=False))
        time.sleep(0.05)
        loading.release()
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    threads = [threading.Thread(target=rates, args=(torch.device(name),)) for name in ("cpu", "cpu:0")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [True, True]


@pytest.fixture
def allowed() -> Any:
    """A program that has allowed TF32."""
    before = device_rates._get_product_setting()
    device_rates._set_product_setting("tf32")
    yield
    device_rates._set_product_setting(before)


def test_float32_products_are_never_tf32(allowed: Any) -> None:
    source = fine_tuned(low_rank_plus_noise(600, 50, 4), "BF16")
    arithmetic = DeviceArithmetic("cpu", measured=SLOW)
    with Operations() as seen:
        arithmetic.gram(source, certify.probe_vectors(50), "float32")
        merger = arithmetic.merger(np.eye(50)[:4], "BF16")
        assert list(merger.merged(source.panels()))
    assert len(seen.settings) >= 4
    assert set(seen.settings) == {"ieee"}
    assert device_rates._get_product_setting() == "tf32"


def test_the_setting_is_put_back_by_the_last_of_several_threads(allowed: Any) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with ieee_products():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(10)
    with ieee_products():
        pass
    assert device_rates._get_product_setting() == "ieee"
    leave.set()
    thread.join()
    assert device_rates._get_product_setting() == "tf32"


def test_the_setting_is_put_back_after_an_error(allowed: Any) -> None:
    with pytest.raises(KeyError), ieee_products():
        raise KeyError
    assert device_rates._get_product_setting() == "tf32"


def _panel(dtype: str, base_dtype: str, *, wide: bool, seed: int = 0) -> Panel:
    rng = np.random.default_rng(seed)
    shape = (7, 31) if wide else (31, 7)
    ft, base = (stored(rng.standard_normal(shape), name) for name in (dtype, base_dtype))
    return Panel(0, base, ft, base_dtype, dtype, wide)


def _exact(panel: Panel) -> tuple[Doubles, Doubles]:
    """Δ and W_base in float64, as stored."""
    ft, base = np.empty(panel.ft.shape), np.empty(panel.base.shape)
    widen(panel.ft, panel.ft_dtype, ft)
    widen(panel.base, panel.base_dtype, base)
    return ft - base, base


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("base_dtype", TORCH_TYPE)
@pytest.mark.parametrize("dtype", TORCH_TYPE)
def test_blocks_arrive_as_they_were_stored(dtype: str, base_dtype: str, wide: bool) -> None:
    """More blocks than there are buffers, of several sizes, from slices of larger arrays."""
    upload = Upload(CPU)
    for seed in range(7):
        whole = _panel(dtype, base_dtype, wide=wide, seed=seed)
        part = whole.part(3, 5 + 4 * seed)
        delta, base = _exact(part)
        for work in (torch.float32, torch.float64):
            found = upload.delta(part, torch.empty(delta.shape, dtype=work)).numpy()
            exact_base = upload.base(part, torch.empty(base.shape, dtype=work)).numpy()
            if work == torch.float64:
                np.testing.assert_array_equal(found, delta)
                np.testing.assert_array_equal(exact_base, base)
            else:
                np.testing.assert_allclose(found, delta, rtol=2**-23 if "F64" not in (dtype, base_dtype) else 2**-24)
                np.testing.assert_allclose(exact_base, base, rtol=2**-24)


def test_fresh_memory_is_written_after_the_work_of_whoever_had_it_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch hands memory on while kernels that use it are queued: in order on their stream, not on that of copies."""
    waited: list[object] = []

    class Stream(torch.cpu.Stream):
        def wait_stream(self, stream: object) -> None:
            waited.append(stream)

    monkeypatch.setattr(torch.cpu, "Stream", Stream)
    upload, panel = Upload(CPU), _panel("BF16", "BF16", wide=False)
    for _ in range(4):
        upload.delta(panel, torch.empty(panel.ft.shape))
    assert waited == [torch.cpu.current_stream()] * 4  # once for each buffer


def test_a_float64_side_is_subtracted_before_it_is_rounded() -> None:
    base = np.random.default_rng(1).standard_normal((20, 5))
    panel = Panel(0, base, base + 1e-12, "F64", "F64", wide=False)
    found = Upload(CPU).delta(panel, torch.empty((20, 5), dtype=torch.float32)).numpy()
    np.testing.assert_allclose(found, panel.ft - base, rtol=1e-6)


def test_read_only_arrays_are_read_without_a_warning() -> None:
    source = fine_tuned(low_rank_plus_noise(60, 20, 2), "BF16")
    frozen = ArraySource(source.base.copy(), source.ft.copy(), "BF16")
    frozen.base.flags.writeable = frozen.ft.flags.writeable = False
    probes = certify.probe_vectors(20)
    probes.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.set_warn_always(True)
        try:
            found = DeviceArithmetic("cpu", measured=FAST).gram(frozen, probes, "float64")
        finally:
            torch.set_warn_always(False)
    sound = DeviceArithmetic("cpu", measured=FAST).gram(source, probes, "float64")
    np.testing.assert_array_equal(found.images, sound.images)


def test_results_arrive_while_the_next_one_is_sent() -> None:
    download = Download(CPU)
    values = [torch.full((4, 3), float(i), dtype=torch.bfloat16) for i in range(6)]
    waiting = download.send(values[0], "BF16")
    for i in range(1, 6):
        following = download.send(values[i], "BF16")
        raw = waiting.arrived()
        assert raw.dtype == np.uint16
        np.testing.assert_array_equal(raw, stored(np.full((4, 3), float(i - 1)), "BF16"))
        waiting = following


def test_no_result_is_waited_for_inside_the_loops() -> None:
    """A number fetched by the host (`_local_scalar_dense`) waits for a GPU: a fixed few per pass, not one per block."""
    fetched = {}
    for blocks in (2, 9):
        source = fine_tuned(low_rank_plus_noise(2048 * blocks, 40, 3), "BF16", panel_blocks=100)
        arithmetic = DeviceArithmetic("cpu", measured=FAST)
        with Operations() as seen:
            arithmetic.gram(source, certify.probe_vectors(40), "float64")
            merger = arithmetic.merger(np.eye(40)[:4], "BF16")
            assert len(list(merger.merged(source.panels()))) == blocks
            merger.lost()
        fetched[blocks] = seen.names.count("_local_scalar_dense")
        assert seen.names.count("addmm_") == 2 * blocks
    assert fetched[2] == fetched[9] == 2


@pytest.mark.parametrize("panel_blocks", [1, 3, 100])
def test_the_merge_is_one_block_ahead_of_its_reader(panel_blocks: int) -> None:
    source = fine_tuned(low_rank_plus_noise(2048 * 4, 40, 3), "BF16", panel_blocks=panel_blocks)
    merger = DeviceArithmetic("cpu", measured=FAST).merger(np.eye(40)[:4], "BF16")
    with Operations() as seen:
        results = merger.merged(source.panels())
        for ahead in (2, 3, 4, 4):
            next(results)
            assert seen.names.count("addmm_") == ahead


class Reusing(ArraySource):
    """Panels in one buffer that each overwrites, as the engine's ring does after three."""

    def panels(self) -> Iterator[Panel]:
        base, ft = (np.empty_like(raw) for raw in (self.base, self.ft))
        for panel in super().panels():
            rows = panel.rows
            base[:rows], ft[:rows] = panel.base, panel.ft
            yield replace(panel, base=base[:rows], ft=ft[:rows])
            base[...], ft[...] = 0x7FC0, 0x7FC0  # NaN


def test_nothing_of_a_panel_is_read_after_the_next_was_asked_for() -> None:
    source = fine_tuned(low_rank_plus_noise(2048 * 4, 40, 3), "BF16")
    reusing = Reusing(source.base, source.ft, "BF16")
    arithmetic = DeviceArithmetic("cpu", measured=FAST)
    probes = certify.probe_vectors(40)
    one, other = (arithmetic.gram(place, probes, "float64").images for place in (source, reusing))
    np.testing.assert_array_equal(one, other)
    results = []
    for place in (source, reusing):
        merger = arithmetic.merger(np.eye(40)[:4], "BF16")
        results.append([raw.copy() for _, raw in merger.merged(place.panels())])
    np.testing.assert_array_equal(results[0], results[1])


def test_float32_products_are_summed_in_float64() -> None:
    """Many blocks: the error stays that of one block's sum."""
    source = from_delta(np.random.default_rng(0).standard_normal((2048 * 12, 24)) + 3.0, "F32")
    probes = certify.probe_vectors(24)
    delta = source.delta()
    errors = []
    for precision in ("float32", "float64"):
        gram = DeviceArithmetic("cpu", measured=FAST).gram(source, probes, precision)  # type: ignore[arg-type]
        errors.append(float(np.abs(gram.images - probes @ (delta.T @ delta)).max() / gram.trace))
    assert errors[0] < 3e-7
    assert errors[1] < 1e-14


@pytest.mark.parametrize(
    ("n", "driver", "chosen"), [(8, "default", None), (8, "gesvd", "gesvd"), (1100, "default", "gesvd")]
)
def test_large_matrices_are_not_left_to_jacobis_method(
    monkeypatch: pytest.MonkeyPatch, n: int, driver: str, chosen: str | None
) -> None:
    """It is what torch takes on a GPU if it is not told otherwise: minutes, where gesvd needs seconds."""
    drivers, device = [], DeviceArithmetic("cpu", measured=FAST)

    def svd(matrix: torch.Tensor, *, full_matrices: bool, driver: str | None) -> Any:
        drivers.append(driver)
        raise RuntimeError("that is all there was to know")

    monkeypatch.setattr(torch.linalg, "svd", svd)
    monkeypatch.setattr(device_arithmetic, "to_device", lambda matrix, _: torch.from_numpy(matrix))
    device.device = torch.device("cuda")
    with pytest.raises(NumericalError):
        device.svd(np.eye(n), driver)
    assert drivers == [chosen]


@pytest.mark.parametrize("out_dtype", TORCH_TYPE)
def test_kept_vectors_merge_alike_from_the_device_and_from_the_host(out_dtype: str) -> None:
    source = fine_tuned(low_rank_plus_noise(700, 50, 4), "BF16")
    arithmetic = DeviceArithmetic("cpu", measured=FAST)
    resident = arithmetic.gram(source, certify.probe_vectors(50), "float64").factorise().top(4)
    host = HostArithmetic().gram(source, certify.probe_vectors(50), "float64").factorise().top(4)
    results = []
    for vectors in (resident, np.asarray(resident), host):
        merger = arithmetic.merger(vectors, out_dtype)
        results.append([raw.copy() for _, raw in merger.merged(source.panels())])
    for one, other, third in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.mean(one != third) < 1e-3 or out_dtype in ("F32", "F64")


@pytest.mark.parametrize("size", [1e5, 1e39])
def test_overflow_shows_in_what_was_lost(size: float) -> None:
    source = from_delta(size * low_rank_plus_noise(60, 20, 2), "F64")
    for arithmetic in (DeviceArithmetic("cpu", measured=FAST), HostArithmetic()):
        merger = arithmetic.merger(np.eye(20), "F16" if size < 1e38 else "F32")  # type: ignore[attr-defined]
        with np.errstate(over="ignore", invalid="ignore"):
            assert list(merger.merged(source.panels()))
        assert not merger.lost() < np.inf
