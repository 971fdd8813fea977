"""Workers without a task are lent to one that has a large matrix, and nothing else."""

from __future__ import annotations

import contextvars
import threading
import time
from functools import partial

import pytest

from streamrepair.engine.spares import Spares


def _threads_of(spares: Spares) -> tuple[str, str]:
    """Which threads did the two pieces of work."""
    names: dict[str, str] = {}

    def note(which: str) -> None:
        names[which] = threading.current_thread().name

    spares.both(lambda: note("first"), lambda: note("second"))
    return names["first"], names["second"]


def test_the_second_piece_goes_aside_only_where_a_worker_is_free() -> None:
    here = threading.current_thread().name
    spares = Spares(2)
    with spares.at_work():
        assert _threads_of(spares) == (here, f"{here} aside")
        with spares.at_work():
            assert _threads_of(spares) == (here, here)
        assert _threads_of(spares) == (here, f"{here} aside")
    alone = Spares(1)
    with alone.at_work():
        assert _threads_of(alone) == (here, here)


def test_a_worker_is_lent_to_one_at_a_time() -> None:
    spares, names = Spares(3), list[tuple[str, str]]()
    with spares.at_work(), spares.at_work():
        spares.both(lambda: names.append(_threads_of(spares)), lambda: None)
        names.append(_threads_of(spares))
    here = threading.current_thread().name
    assert names == [(here, here), (here, f"{here} aside")]


@pytest.mark.parametrize("free", [0, 1])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_in_either_is_the_callers_and_the_worker_is_returned(failing: int, free: int) -> None:
    def work(number: int) -> None:
        if number == failing:
            raise KeyError(number)

    spares = Spares(1 + free)
    with spares.at_work():
        for _ in range(3):
            with pytest.raises(KeyError):
                spares.both(lambda: work(0), lambda: work(1))
        assert (spares._free > 0) == bool(free)


def test_where_no_thread_can_be_started_one_does_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on threads is no failure of the work."""

    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    spares, done = Spares(2), list[int]()
    with spares.at_work():
        monkeypatch.setattr(threading.Thread, "start", refused)
        spares.both(lambda: done.append(1), lambda: done.append(2))
        assert (done, spares._free) == ([1, 2], 1)


def test_both_run_at_the_same_time() -> None:
    spares, met = Spares(2), threading.Barrier(2, timeout=20)
    with spares.at_work():
        spares.both(met.wait, met.wait)


def test_two_that_ask_at_once_do_not_get_the_same_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three workers, of which two have tasks and ask in step: one gets the third, the other does all itself."""
    spares, aside, rounds = Spares(3), list[int](), threading.Barrier(2, timeout=20)
    original = contextvars.copy_context

    def slow() -> contextvars.Context:
        """What is done to lend takes so long that the other asks meanwhile."""
        time.sleep(0.005)
        return original()

    def work() -> None:
        with spares.at_work():
            for number in range(20):
                rounds.wait()
                spares.both(rounds.wait, partial(second, number))

    def second(number: int) -> None:
        if "aside" in threading.current_thread().name:
            aside.append(number)

    monkeypatch.setattr(contextvars, "copy_context", slow)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(aside) == list(range(20))
    assert spares._free == 3
