"""Workers without a task are lent to one that has a large matrix, and nothing else."""

from __future__ import annotations

import contextvars
import threading
import time
from functools import partial

import pytest

from streamrepair.engine.spares import Spares
from streamrepair.engine.timeline import Lane, Timeline


def _spares(workers: int) -> tuple[Spares, list[Lane]]:
    timeline = Timeline()
    lanes = [Lane(timeline, f"cpu {number}") for number in range(workers)]
    return Spares(lanes), lanes


def _threads_of(spares: Spares) -> tuple[str, str]:
    """Which threads did the two pieces of work."""
    names: dict[str, str] = {}

    def note(which: str) -> None:
        names[which] = threading.current_thread().name

    spares.both(lambda: note("first"), lambda: note("second"))
    return names["first"], names["second"]


def test_the_second_piece_goes_aside_only_where_a_worker_is_free() -> None:
    here = threading.current_thread().name
    spares, lanes = _spares(2)
    with spares.at_work(lanes[0]):
        assert _threads_of(spares) == (here, "cpu 1 lent")
        with spares.at_work(lanes[1]):
            assert _threads_of(spares) == (here, here)
        assert _threads_of(spares) == (here, "cpu 1 lent")
    alone, lanes = _spares(1)
    with alone.at_work(lanes[0]):
        assert _threads_of(alone) == (here, here)


def test_a_worker_is_lent_to_one_at_a_time() -> None:
    (spares, lanes), names = _spares(3), list[tuple[str, str]]()
    with spares.at_work(lanes[0]), spares.at_work(lanes[2]):
        spares.both(lambda: names.append(_threads_of(spares)), lambda: None)
        names.append(_threads_of(spares))
    here = threading.current_thread().name
    assert names == [(here, here), (here, "cpu 1 lent")]


def test_one_that_goes_on_to_its_own_task_while_it_is_lent_is_two_threads() -> None:
    """Three workers: of the two without a task one is lent, then gets a task; the third is not lent beside both."""
    (spares, lanes), names = _spares(3), list[tuple[str, str]]()
    here = threading.current_thread().name

    def first() -> None:
        with spares.at_work(lanes[1]):
            names.append(_threads_of(spares))
        names.append(_threads_of(spares))

    with spares.at_work(lanes[0]):
        spares.both(first, lambda: None)
    assert names == [(here, here), (here, "cpu 2 lent")]


@pytest.mark.parametrize("free", [0, 1])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_in_either_is_the_callers_and_the_worker_is_returned(failing: int, free: int) -> None:
    def work(number: int) -> None:
        if number == failing:
            raise KeyError(number)

    spares, lanes = _spares(1 + free)
    with spares.at_work(lanes[0]):
        for _ in range(3):
            with pytest.raises(KeyError):
                spares.both(lambda: work(0), lambda: work(1))
        assert (_threads_of(spares)[1] == "cpu 1 lent") == bool(free)


def test_where_no_thread_can_be_started_one_does_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on threads is no failure of the work."""

    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    (spares, lanes), done = _spares(2), list[int]()
    with spares.at_work(lanes[0]):
        monkeypatch.setattr(threading.Thread, "start", refused)
        spares.both(lambda: done.append(1), lambda: done.append(2))
        assert done == [1, 2]
        monkeypatch.undo()
        assert _threads_of(spares)[1] == "cpu 1 lent"


def test_both_run_at_the_same_time() -> None:
    (spares, lanes), met = _spares(2), threading.Barrier(2, timeout=20)
    with spares.at_work(lanes[0]):
        spares.both(met.wait, met.wait)


def test_two_that_ask_at_once_do_not_get_the_same_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three workers, of which two have tasks and ask in step: one gets the third, the other does all itself."""
    (spares, lanes), aside, rounds = _spares(3), list[int](), threading.Barrier(2, timeout=20)
    original = contextvars.copy_context

    def slow() -> contextvars.Context:
        """What is done to lend takes so long that the other asks meanwhile."""
        time.sleep(0.005)
        return original()

    def work(lane: Lane) -> None:
        with spares.at_work(lane):
            for number in range(20):
                rounds.wait()
                spares.both(rounds.wait, partial(second, number))

    def second(number: int) -> None:
        if threading.current_thread().name == "cpu 2 lent":
            aside.append(number)

    monkeypatch.setattr(contextvars, "copy_context", slow)
    threads = [threading.Thread(target=work, args=(lane,)) for lane in lanes[:2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(aside) == list(range(20))
