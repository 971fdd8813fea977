"""Workers without a task are lent to one that has a large matrix, and nothing else."""

from __future__ import annotations

import threading

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


def test_both_run_at_the_same_time() -> None:
    spares, met = Spares(2), threading.Barrier(2, timeout=20)
    with spares.at_work():
        spares.both(met.wait, met.wait)
