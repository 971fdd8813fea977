"""What a run tells the page cache, seen by what is in it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from streamrepair import api
from streamrepair.checkpoint.read import InputFiles
from streamrepair.engine.pagecache import PageCache, lets_go
from streamrepair.engine.plan import Plan, Task
from tests.pairs import write_pair

PLENTY = 1 << 40


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Two matrices of 400 kB on each side, on disk and not in the page cache."""
    pair = write_pair(tmp_path, {"a": (500, 400), "b": (500, 400)}, shards=(1, 1))
    for folder in (pair.base, pair.ft):
        _drop(folder / "model.safetensors")
    if _cached(pair.ft / "model.safetensors"):
        pytest.skip("this file system lives in memory")
    return api.plan(pair.base, pair.ft, workers=1)


def _drop(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def _cached(path: Path, offset: int = 1 << 16) -> bool:
    """Whether a page can be read without waiting for the device."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(fd, [bytearray(4096)], offset, os.RWF_NOWAIT) == 4096
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def _middles(task: Task) -> list[tuple[Path, int]]:
    """A place in the middle of a task's tensor on both sides."""
    assert task.pairing.base is not None
    sides = (task.pairing.base, task.ft)
    return [(side.shard.path, side.entry.start + side.entry.nbytes // 2) for side in sides]


def _soon(places: list[tuple[Path, int]]) -> bool:
    for _ in range(200):
        if all(_cached(*place) for place in places):
            return True
        time.sleep(0.01)
    return False


def test_the_next_in_line_is_read_ahead_on_both_sides(plan: Plan) -> None:
    files = InputFiles()
    cache = PageCache(files, free_bytes=PLENTY, lets_go=False)
    cache.upcoming(plan.tasks[1])
    assert _soon(_middles(plan.tasks[1]))
    cache.close()
    files.close()


def test_no_more_is_read_ahead_than_there_is_room_for(plan: Plan) -> None:
    """A tenth of what is free: here it holds one task, and the next once that is done."""
    files = InputFiles()
    first, second = plan.tasks
    cache = PageCache(files, free_bytes=15 * first.read_once_bytes, lets_go=False)
    cache.upcoming(first)
    assert _soon(_middles(first))
    for path, _ in _middles(first):
        _drop(path)
    cache.upcoming(second)
    cache.upcoming(first)  # once is enough
    cache.done_with(first)
    cache.upcoming(second)
    assert _soon(_middles(second))
    cache.close()
    files.close()


@pytest.mark.parametrize("large", [True, False])
def test_a_run_that_is_large_against_free_memory_lets_go_of_what_it_has_read(plan: Plan, large: bool) -> None:
    files = InputFiles()
    task = plan.tasks[0]
    free_bytes = plan.out_bytes if large else PLENTY
    assert lets_go(plan, free_bytes) == large
    cache = PageCache(files, free_bytes=free_bytes, lets_go=large)
    places = _middles(task)
    for path, _ in places:
        path.read_bytes()
    cache.done_with(task)
    assert [_cached(*place) for place in places] == [not large, not large]
    cache.close()
    files.close()


def test_an_input_that_is_gone_is_left_for_its_task_to_meet(plan: Plan) -> None:
    """Reading ahead fails without a word, and the thread lives on."""
    for folder in (plan.base.folder, plan.ft.folder):
        for path in folder.glob("*.safetensors"):
            path.unlink()
    cache = PageCache(InputFiles(), free_bytes=PLENTY, lets_go=False)
    for task in plan.tasks:
        cache.upcoming(task)
    cache.close()
