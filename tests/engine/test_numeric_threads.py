"""BLAS computes on one thread in every worker of every run of a process, and as before afterwards."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg.blas
from threadpoolctl import threadpool_info, threadpool_limits

from streamrepair.engine.numeric_threads import NumericThreads


def _threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def _in_another_thread(call: Callable[[], object]) -> object:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("ran_before", ["nothing", "a worker", "the main thread"])
def test_a_worker_can_hold_whoever_set_limits_before(ran_before: str) -> None:
    """threadpoolctl silently ignores all threads but the first that ever set a limit."""
    numbers = NumericThreads()
    before = _threads()
    if ran_before == "a worker":
        _in_another_thread(lambda: threadpool_limits(limits=1).restore_original_limits())
    elif ran_before == "the main thread":
        threadpool_limits(limits=1).restore_original_limits()
    for _ in range(3):
        _in_another_thread(numbers.hold)
        assert _threads() == _in_another_thread(_threads) == {1}
        numbers.release()
        assert _threads() == before


def test_sums_are_the_same_in_every_run_of_a_process() -> None:
    matrix = np.random.default_rng(0).standard_normal((1800, 700)).astype(np.float32)
    numbers = NumericThreads()

    def gram() -> bytes:
        numbers.hold()
        product: np.ndarray = scipy.linalg.blas.ssyrk(1.0, matrix.T)
        return product.tobytes()

    first = _in_another_thread(gram)
    for _ in range(2):
        numbers.release()
        assert _in_another_thread(gram) == first
    numbers.release()


def test_the_last_of_several_runs_puts_the_settings_back() -> None:
    """A program's threads may have a run each: the first one's end is none for the others."""
    before = _threads()
    first, second = NumericThreads(), NumericThreads()
    _in_another_thread(first.hold)
    _in_another_thread(second.hold)
    first.release()
    first.release()
    assert _threads() == {1}
    second.release()
    assert _threads() == before


def test_releasing_what_is_not_held_changes_nothing() -> None:
    before = _threads()
    NumericThreads().release()
    assert _threads() == before


WITHOUT_ROOM = """
import re, resource
from pathlib import Path
from streamrepair.decompose import lapack
from streamrepair.engine.numeric_threads import NumericThreads

first = NumericThreads()
first.hold()
first.release()
taken = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 24), resource.RLIM_INFINITY))
try:
    NumericThreads().hold()
except MemoryError as error:
    print(error)
"""


def test_a_thread_without_room_for_a_buffer_fails_before_it_computes() -> None:
    """OpenBLAS, refused its buffer by a limit on the address space, asks again for ever."""
    words = [sys.executable, "-c", WITHOUT_ROOM]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "no 64 MiB of address space are left for a thread\n"


TORCH_IN_THE_PROGRAM = """
import threading, torch
from streamrepair.engine.numeric_threads import NumericThreads

torch.set_num_threads({number})
assert torch.get_num_threads() == {number}
numbers = NumericThreads()
thread = threading.Thread(target=numbers.hold)
thread.start()
thread.join()
numbers.release()
print(torch.get_num_threads())
"""


@pytest.mark.parametrize("number", [1, 2, 5])
def test_the_program_s_torch_keeps_its_threads(number: int) -> None:
    """OpenMP has a number for each thread: a worker's, put back in the program's, would be another."""
    command = [sys.executable, "-c", TORCH_IN_THE_PROGRAM.format(number=number)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout == f"{number}\n"
