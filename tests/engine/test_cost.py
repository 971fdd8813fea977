from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamrepair.decompose.choose import MOST_KEPT, Estimate, krylov_share
from streamrepair.decompose.speed import CPU
from streamrepair.engine import limits, rates
from streamrepair.engine.cost import predicted
from streamrepair.engine.memory import MatrixShape


def _shape(m: int, n: int, item: int = 2) -> MatrixShape:
    return MatrixShape(m, n, item, item, item)


@given(
    m=st.integers(64, 200_000), n=st.integers(64, 8192), method=st.sampled_from(["gram", "randomized", "fast", "full"])
)
def test_predictions_grow_with_the_matrix_and_with_what_is_kept(m: int, n: int, method: str) -> None:
    m = max(m, n)
    here = predicted(_shape(m, n), method, CPU, 0.1)
    assert min(here.gram_s, here.factor_s, here.merge_s) > 0.0
    assert here.total_s < predicted(_shape(2 * m, n), method, CPU, 0.1).total_s
    assert here.total_s < predicted(_shape(m, n), method, CPU, 0.2).total_s
    assert here.gram_s <= predicted(_shape(m, n, 4), method, CPU, 0.1).gram_s


@pytest.mark.parametrize("estimate", ["exact", "fast"])
@pytest.mark.parametrize("n", [256, 1024, 2048, 4096, 8192])
def test_krylov_is_tried_where_the_model_says_that_it_wins_if_little_is_kept(n: int, estimate: Estimate) -> None:
    method = "fast" if estimate == "fast" else "randomized"
    share = krylov_share("auto", estimate, n)
    for kept in (0.02, 0.03, 0.05, 0.08):
        gram, krylov = (predicted(_shape(n, n), name, CPU, kept).factor_s for name in ("gram", method))
        assert (kept <= share) == (1.25 * krylov <= gram)


def test_the_share_that_krylov_is_tried_for_rises_with_the_short_side() -> None:
    shares = [krylov_share("auto", "exact", n) for n in range(512, 8193, 512)]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, MOST_KEPT)
    assert krylov_share("auto", "fast", 2048) > krylov_share("auto", "exact", 2048) == 0.0
    assert krylov_share("randomized", "exact", 300) == MOST_KEPT
    assert krylov_share("gram", "exact", 8192) == krylov_share("full", "exact", 8192) == 0.0


@pytest.mark.skipif("model name" not in Path("/proc/cpuinfo").read_text(), reason="the kernel names no processor")
def test_a_machine_is_told_by_its_processor_too() -> None:
    """Hosts of one name may have different ones: those of containers, of a queue's nodes."""
    assert limits.cpu_model()
    assert f", {limits.cpu_model()}, " in rates.machine()


def test_a_measurement_is_kept_for_this_machine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert rates.load() is None
    mine = replace(CPU, start_s=0.5)
    assert rates.save(mine) == tmp_path / "streamrepair" / "rates.json"
    assert [path.name for path in rates.path().parent.iterdir()] == ["rates.json"]
    assert rates.load() == mine
    written = rates.path().read_bytes()
    for nonsense in (1e308, 1e-300, -1.0, None):
        content = msgspec.json.decode(written)
        content["rates"]["float32_flops_per_s"] = nonsense
        rates.path().write_bytes(msgspec.json.encode(content))
        assert rates.load() is None
    other = msgspec.json.decode(written, type=rates.Measured)
    rates.path().write_bytes(msgspec.json.encode(msgspec.structs.replace(other, machine="another")))
    assert rates.load() is None
    for text in ("{", rates.path().read_text().replace("0.5", "0.0")):
        rates.path().write_text(text)
        assert rates.load() is None


@pytest.mark.slow
def test_measured_rates_are_speeds_of_a_processor() -> None:
    found = rates.measure()
    # No closer: a processor that others use at times does not give float32 its advantage.
    assert all(1e8 < speed < 1e13 for speed in (found.float32_flops_per_s, found.float64_flops_per_s))
    assert 1e8 < found.memory_bytes_per_s <= found.cache_bytes_per_s < 1e12
