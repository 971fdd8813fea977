from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamrepair.decompose.choose import krylov_share
from streamrepair.engine import rates
from streamrepair.engine.cost import predicted
from streamrepair.engine.memory import MatrixShape


def _shape(m: int, n: int, item: int = 2) -> MatrixShape:
    return MatrixShape(m, n, item, item, item)


@given(
    m=st.integers(64, 200_000), n=st.integers(64, 8192), method=st.sampled_from(["gram", "randomized", "fast", "full"])
)
def test_predictions_grow_with_the_matrix_and_with_what_is_kept(m: int, n: int, method: str) -> None:
    m = max(m, n)
    here = predicted(_shape(m, n), method, rates.CPU, 0.1)
    assert min(here.gram_s, here.factor_s, here.merge_s) > 0.0
    assert here.total_s < predicted(_shape(2 * m, n), method, rates.CPU, 0.1).total_s
    assert here.total_s < predicted(_shape(m, n), method, rates.CPU, 0.2).total_s
    assert here.gram_s <= predicted(_shape(m, n, 4), method, rates.CPU, 0.1).gram_s


@pytest.mark.parametrize("n", [256, 1024, 2048, 4096, 8192])
def test_krylov_is_tried_where_the_model_says_that_it_wins_if_little_is_kept(n: int) -> None:
    """Off by a factor of 1.1 in time at most: the choice is by shape, the model by speed."""
    gram, krylov = (predicted(_shape(n, n), method, rates.CPU, 0.03).total_s for method in ("gram", "randomized"))
    if krylov_share("auto", "exact", n):
        assert krylov < 1.1 * gram
    else:
        assert gram < 1.1 * krylov


def test_a_measurement_is_kept_for_this_machine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert rates.load() is None
    mine = msgspec.structs.replace(rates.CPU, start_s=0.5)
    assert rates.save(mine) == tmp_path / "streamrepair" / "rates.json"
    assert [path.name for path in rates.path().parent.iterdir()] == ["rates.json"]
    assert rates.load() == mine
    other = msgspec.json.decode(rates.path().read_bytes(), type=rates.Measured)
    rates.path().write_bytes(msgspec.json.encode(msgspec.structs.replace(other, machine="another")))
    assert rates.load() is None
    for text in ("{", rates.path().read_text().replace("0.5", "0.0")):
        rates.path().write_text(text)
        assert rates.load() is None


@pytest.mark.slow
def test_measured_rates_are_speeds_of_a_processor() -> None:
    found = rates.measure()
    assert found.float64_flops_per_s < found.float32_flops_per_s
    assert 1e8 < found.memory_bytes_per_s <= found.cache_bytes_per_s < 1e12
