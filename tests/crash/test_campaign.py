"""A sample of the crash campaign; `python -m tests.crash.campaign` runs every operation of it."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from streamrepair.checkpoint import osfile
from streamrepair.engine import copying, pagecache
from tests.builders import bf16
from tests.crash import powercut
from tests.crash.campaign import FAULTS, SHAPES, one_fault, one_kill, operations
from tests.crash.judge import Undisturbed, undisturbed
from tests.pairs import write_pair

pytestmark = pytest.mark.slow

_FAULT_STEP, _KILL_STEP, _CUT_STEP = 11, 3, 3


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("crash")
    return undisturbed(write_pair(folder, SHAPES, shards=(1, 2)), folder / "undisturbed")


@pytest.fixture(scope="module")
def count(reference: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> int:
    calls = operations(reference, tmp_path_factory.mktemp("counted") / "out")
    assert {"open", "preadv", "pwrite", "posix_fallocate", "fsync", "replace", "unlink", "makedirs"} <= set(calls)
    return len(calls)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_at_any_operation(reference: Undisturbed, count: int, tmp_path: Path, name: str) -> None:
    ended = 0
    for number in range(1 + list(FAULTS).index(name), count + 1, _FAULT_STEP):
        failed, _ = one_fault(reference, tmp_path / str(number), FAULTS[name](number))
        ended += failed
    assert ended > 0 or name.startswith("half"), "no fault had any effect"


def test_a_kill_at_any_operation(reference: Undisturbed, count: int, tmp_path: Path) -> None:
    runs = [one_kill(reference, tmp_path / str(n), n) for n in range(1, count + 1, _KILL_STEP)]
    assert all(killed for killed, _ in runs[:-2])
    assert runs[0] == (True, 0)
    assert max(runs)[1] == len(SHAPES)


@pytest.mark.parametrize("grouped", [False, True], ids=["tensor by tensor", "one commit"])
@pytest.mark.parametrize("mode", powercut.MODES)
def test_a_power_cut_after_any_operation(reference: Undisturbed, tmp_path: Path, mode: str, grouped: bool) -> None:
    reference = replace(reference, grouped=grouped)
    disk = powercut.recorded(reference, tmp_path / "recorded")
    first = powercut.MODES.index(mode) % _CUT_STEP
    points = [*range(first, len(disk.operations), _CUT_STEP), len(disk.operations)]
    kept = [powercut.one_cut(reference, disk, n, tmp_path / str(n), mode=mode, rng=random.Random(n)) for n in points]
    assert kept[0] == 0
    assert kept[-1] == len(SHAPES)


def test_a_power_cut_with_writes_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of large tensors; where the file system has no such writes this is the test above once more."""
    monkeypatch.setattr(copying, "_DIRECT_FROM_BYTES", 8192)
    monkeypatch.setattr(pagecache, "_LARGE_SHARE", 0.0)  # every run is large
    large = bf16(np.random.default_rng(0).standard_normal((128, 96)))
    pair = write_pair(tmp_path, SHAPES, shards=(1, 2), extra={"large": large})
    reference = undisturbed(pair, tmp_path / "undisturbed")
    disk = powercut.recorded(reference, tmp_path / "recorded")
    probe = osfile.open_direct(pair.ft / "config.json")
    assert (disk.past_cache > 0) == (probe >= 0)
    osfile.close(probe)
    for number, mode in itertools.product(range(0, len(disk.operations) + 1, 5), powercut.MODES[::2]):
        out = tmp_path / f"{number} {mode}"
        powercut.one_cut(reference, disk, number, out, mode=mode, rng=random.Random(number))
