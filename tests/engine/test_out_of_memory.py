"""A device without memory for the merge hands it to the CPU; and a clock that was set back disturbs nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamrepair import api
from streamrepair.checkpoint import osfile
from streamrepair.decompose.host import HostArithmetic
from streamrepair.engine import repair_task
from streamrepair.errors import OutputError
from tests.faults import Kernel, fails
from tests.pairs import read_tensors, rounded_share, shard_bytes, tensor_bytes, values, write_pair

SHAPES = {"a": (48, 40), "b": (40, 48), "v": (40,), "c": (64, 32)}


class NoMemory:
    """The host's arithmetic on a device that has no memory left once it comes to the merge."""

    def __init__(self, host: HostArithmetic) -> None:
        self._host = host
        self.asked = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._host, name)

    def merger(self, *_: object) -> NoMemory:
        """One that fails once it is to merge."""
        return self

    def merged(self, _: object) -> Iterator[object]:
        """Fail as torch does, whose error is a RuntimeError."""
        raise RuntimeError("CUDA out of memory")


def test_a_merge_that_does_not_fit_the_device_is_done_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = write_pair(tmp_path, SHAPES, shards=(1, 2))
    api.repair(pair.base, pair.ft, tmp_path / "whole")
    made = []

    def arithmetic(_: object, host: HostArithmetic) -> NoMemory:
        made.append(host)
        return NoMemory(host)

    monkeypatch.setattr(repair_task, "_arithmetic", arithmetic)
    api.repair(pair.base, pair.ft, tmp_path / "out")
    assert len(made) == 3
    assert not api.verify(tmp_path / "out").damage
    found, expected = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "whole")
    for name in SHAPES:  # float32 sums of another route
        assert rounded_share(values(found[name]), values(expected[name]), "BF16") > 0.99


def test_a_clock_that_was_set_back_is_not_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs, and everything of an unfinished run, are from the future: times are compared for equality only."""
    pair = write_pair(tmp_path, SHAPES, shards=(1, 2))
    for path in [*pair.base.iterdir(), *pair.ft.iterdir()]:
        os.utime(path, (5e9, 5e9))
    api.repair(pair.base, pair.ft, tmp_path / "whole")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(osfile, "os", Kernel(("replace",), fails(2, 5)))
        with pytest.raises(OutputError):
            api.repair(pair.base, pair.ft, out, workers=1)
    for path in out.rglob("*"):
        os.utime(path, (5e9, 5e9))
    assert api.repair(pair.base, pair.ft, out).timings.bytes_written == tensor_bytes(out)
    assert shard_bytes(out) == shard_bytes(tmp_path / "whole")
