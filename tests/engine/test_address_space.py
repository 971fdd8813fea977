"""Limits on what a process may map: refused in one line before any work, never met by OpenBLAS, which cannot fail."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from streamrepair import api
from streamrepair.engine import address_space
from streamrepair.engine.address_space import tightest
from tests.command import Result
from tests.pairs import DEMO, Pair, shard_bytes, write_pair

UNLIMITED = resource.RLIM_INFINITY
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS")
BY_ITSELF: Mapping[str, str] = {}
ONE: Mapping[str, str] = {"OMP_NUM_THREADS": "1"}
SPACE = (resource.RLIMIT_AS, "address space (ulimit -v)")
DATA = (resource.RLIMIT_DATA, "data (ulimit -d)")
PAIR = Pair(DEMO / "base", DEMO / "ft")


def _limited(kind: int, limit_kb: int, *words: object, set_by_user: Mapping[str, str] = BY_ITSELF) -> Result:
    def limit() -> None:
        resource.setrlimit(kind, (limit_kb << 10, limit_kb << 10))

    done = subprocess.run(
        [sys.executable, "-m", "streamrepair", *map(str, words)],
        env={name: value for name, value in os.environ.items() if name not in THREADS} | set_by_user,
        preexec_fn=limit, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


def _assert_refused(result: Result, name: str) -> int:
    """It ended in one line that names the limit; the limit that it asks for."""
    found = re.fullmatch(
        rf"error: the limit on {re.escape(name)} leaves \S+ \S+, and .+ needs \S+ \S+: "
        r"raise it to (\d+) kB or more.*\n",
        result.err,
    )
    assert found, result
    assert (result.status, result.out) == (5, "")
    return int(found[1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pair's result, made without limits."""
    out = tmp_path_factory.mktemp("whole") / "out"
    api.repair(PAIR.base, PAIR.ft, out)
    return out


@pytest.mark.parametrize(
    ("limit", "limit_kb", "workers", "set_by_user"),
    [
        (SPACE, 100_000, 1, BY_ITSELF),  # NumPy's BLAS ended the process
        (SPACE, 130_000, 1, BY_ITSELF),  # or interrupted it
        (SPACE, 180_000, 1, ONE),  # SciPy's asked for ever
        (SPACE, 190_000, 2, ONE),
        (SPACE, 240_000, 1, BY_ITSELF),
        (SPACE, 280_000, 2, BY_ITSELF),
        (SPACE, 600_000, 8, BY_ITSELF),  # eight workers' buffers did not fit together
        (DATA, 60_000, 1, BY_ITSELF),
        (DATA, 115_000, 1, ONE),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(
    tmp_path: Path, limit: tuple[int, str], limit_kb: int, workers: int, set_by_user: Mapping[str, str]
) -> None:
    kind, name = limit
    words = PAIR.base, PAIR.ft, tmp_path / "out", "--quiet", "--workers", workers
    _assert_refused(_limited(kind, limit_kb, *words, set_by_user=set_by_user), name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit_kb", [160_000, 170_000, 220_000, 260_000])
def test_so_is_verify_deep(whole: Path, limit_kb: int) -> None:
    for kind, name in (SPACE, DATA):
        result = _limited(kind, limit_kb - (kind == DATA[0]) * 60_000, "verify", whole, "--deep", "--quiet")
        _assert_refused(result, name)
        assert "--workers" not in result.err
        assert "--ram" not in result.err


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("limit", [SPACE, DATA], ids=["space", "data"])
@pytest.mark.parametrize("set_by_user", [BY_ITSELF, {"OMP_NUM_THREADS": "3"}], ids=["by itself", "three"])
def test_the_limit_that_a_refusal_asks_for_is_enough(
    whole: Path, tmp_path: Path, workers: int, limit: tuple[int, str], set_by_user: Mapping[str, str]
) -> None:
    kind, name = limit
    words = PAIR.base, PAIR.ft, tmp_path / "out", "--quiet", "--workers", workers
    enough_kb = _assert_refused(_limited(kind, 250_000 if kind == SPACE[0] else 200_000, *words), name)
    assert _limited(kind, enough_kb, *words, set_by_user=set_by_user).status in (0, 5)
    assert _limited(kind, enough_kb, *words) == Result(0, "", "")
    assert shard_bytes(tmp_path / "out") == shard_bytes(whole)


def test_as_many_workers_as_a_refusal_names_fit(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {f"w{i}": (500, 400) for i in range(8)})
    words = pair.base, pair.ft, tmp_path / "out", "--quiet", "--workers"
    refused = _limited(SPACE[0], 600_000, *words, 8)
    _assert_refused(refused, SPACE[1])
    found = re.search(r", or give --workers (\d+)\n$", refused.err)
    assert found
    assert _limited(SPACE[0], 600_000, *words, found[1]) == Result(0, "", "")


def test_the_default_is_as_many_workers_as_fit(whole: Path, tmp_path: Path) -> None:
    """However many processors there are: under a batch system's limit the plain command works."""
    words = PAIR.base, PAIR.ft, "--device", "cpu"
    refused = _limited(SPACE[0], 250_000, *words, tmp_path / "out", "--quiet", "--workers", 1)
    enough_kb = _assert_refused(refused, SPACE[1])
    planned = _limited(SPACE[0], enough_kb, "plan", *words, "--json")
    assert json.loads(planned.out)["workers"] == 1
    assert _limited(SPACE[0], enough_kb, *words, tmp_path / "out", "--quiet") == Result(0, "", "")
    assert shard_bytes(tmp_path / "out") == shard_bytes(whole)


def test_help_and_headers_need_little(tmp_path: Path) -> None:
    assert _limited(SPACE[0], 100_000, "--help").status == 0
    assert _limited(SPACE[0], 190_000, "plan", PAIR.base, PAIR.ft).status == 0


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, int]], None]:
    def use(soft: dict[int, int]) -> None:
        monkeypatch.setattr(address_space.resource, "getrlimit", lambda kind: (soft.get(kind, UNLIMITED), UNLIMITED))

    return use


def test_the_tightest_limit_is_the_one_that_leaves_least(
    limits: Callable[[dict[int, int]], None], tmp_path: Path
) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    statm = tmp_path / "statm"
    statm.write_text("1000 300 100 1 0 400 0\n")
    limits({})
    assert tightest(statm) is None
    limits({resource.RLIMIT_AS: 1500 * page})
    limit = tightest(statm)
    assert limit is not None
    assert (limit.name, limit.left_bytes) == ("address space (ulimit -v)", 500 * page)
    limits({resource.RLIMIT_AS: 1500 * page, resource.RLIMIT_DATA: 700 * page})
    limit = tightest(statm)
    assert limit is not None
    assert (limit.name, limit.left_bytes) == ("data (ulimit -d)", 300 * page)
    limits({resource.RLIMIT_DATA: 100 * page})
    limit = tightest(statm)
    assert limit is not None
    assert limit.left_bytes == 0


def test_no_limit_changes_nothing(monkeypatch: pytest.MonkeyPatch, limits: Callable[[dict[int, int]], None]) -> None:
    """Neither the environment nor malloc."""
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "numpy")
    monkeypatch.setattr(address_space, "share_one_arena", lambda: pytest.fail("malloc was changed"))
    limits({})
    address_space.prepare_for_numpy()
    assert not os.environ.keys() & set(THREADS)


def test_under_a_limit_blas_starts_one_thread_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, limits: Callable[[dict[int, int]], None]
) -> None:
    monkeypatch.delitem(sys.modules, "numpy")
    monkeypatch.setattr(address_space, "share_one_arena", lambda: None)
    limits({resource.RLIMIT_AS: 1 << 50})
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    address_space.prepare_for_numpy()
    assert "OPENBLAS_NUM_THREADS" not in os.environ
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "")  # so that it is put back
    address_space.prepare_for_numpy()
    assert os.environ["OPENBLAS_NUM_THREADS"] == "1"
