"""The ledger, with real threads: every task once, never too many bytes, no deadlock, nobody overtaken."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamrepair.engine.admission import Admission
from streamrepair.engine.lanes import Place
from streamrepair.engine.ledger import Ledger
from streamrepair.engine.plan import Task
from tests.engine.tasks import bf16_task

ROOM = 100
DEADLOCK_S = 20.0


@dataclass(frozen=True)
class Work:
    """A task to be, and what goes wrong with it."""

    place: Place
    ram_bytes: int
    more_bytes: tuple[int, ...]
    """Asked for one after another while it runs."""
    fails: bool


WORK = st.builds(
    Work,
    place=st.sampled_from(["cpu", "cuda"]),
    ram_bytes=st.integers(1, ROOM + 20),  # more than the room is possible: an estimate of the fixed part was short
    more_bytes=st.lists(st.integers(1, ROOM), max_size=2).map(tuple),
    fails=st.sampled_from([False, False, False, True]),
)


def _tasks(works: list[Work]) -> list[Task]:
    return [bf16_task(str(i), (64, 32), place=work.place, ram_bytes=work.ram_bytes) for i, work in enumerate(works)]


@dataclass
class Books:
    """A second account of what is reserved, kept by the workers themselves."""

    held: dict[str, int] = field(default_factory=dict)
    begun: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def book(self, name: str, nbytes: int, *, first: bool) -> None:
        with self.lock:
            self.held[name] = self.held.get(name, 0) + nbytes
            if first:
                self.begun.append(name)
            if sum(self.held.values()) > ROOM and len(self.held) > 1:
                self.faults.append(f"overcommitted: {self.held}")

    def close(self, name: str) -> None:
        with self.lock:
            del self.held[name]


def _worker(ledger: Ledger, number: int, place: Place, works: list[Work], books: Books) -> None:
    """As in the executor: a task that fails returns its bytes and the ledger is closed by the collector, not here."""
    while (task := ledger.take(number, place, before_waiting=lambda: None)) is not None:
        work = works[int(task.name)]
        books.book(task.name, task.ram_bytes, first=True)
        try:
            for more_bytes in work.more_bytes:
                if ledger.grow(number, more_bytes):
                    books.book(task.name, more_bytes, first=False)
                elif work.ram_bytes + sum(work.more_bytes) <= ROOM and len(works) == 1:
                    books.faults.append("refused although it was alone and fitted")
            if work.fails:
                raise ValueError("made up")
        except ValueError:
            continue
        finally:
            books.close(task.name)
            ledger.give_back(number)


@settings(max_examples=120, deadline=None)
@given(works=st.lists(WORK, max_size=25), workers=st.tuples(st.integers(1, 4), st.integers(1, 3)))
def test_random_tasks_that_grow_and_fail(works: list[Work], workers: tuple[int, int]) -> None:
    """Every task gets its turn exactly once, in the order of its place, and the room is never exceeded."""
    ledger, books = Ledger(_tasks(works), room_bytes=ROOM), Books()
    places: list[Place] = ["cpu"] * workers[0] + ["cuda"] * workers[1]  # type: ignore[list-item]
    threads = [
        threading.Thread(target=_worker, args=(ledger, number, place, works, books), daemon=True)
        for number, place in enumerate(places)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLOCK_S)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    assert books.faults == []
    assert sorted(books.begun, key=int) == [str(i) for i in range(len(works))]


@settings(max_examples=40, deadline=None)
@given(works=st.lists(WORK, min_size=1, max_size=25), after=st.integers(0, 25))
def test_closing_lets_every_worker_go(works: list[Work], after: int) -> None:
    """However many tasks are left and whoever waits: a run that is stopped ends."""
    ledger, books = Ledger(_tasks(works), room_bytes=ROOM), Books()
    places: list[Place] = ["cpu", "cpu", "cuda"]
    threads = [
        threading.Thread(target=_worker, args=(ledger, number, place, works, books), daemon=True)
        for number, place in enumerate(places)
    ]
    for thread in threads:
        thread.start()
    while len(books.begun) < min(after, len(works)):
        pass
    ledger.close()
    for thread in threads:
        thread.join(DEADLOCK_S)
    assert not any(thread.is_alive() for thread in threads)
    assert books.held == {}
    assert ledger.following("cpu", 3) == []


class Machine:
    """The rules without threads: a random worker moves at a time; whoever is refused for now stands in line."""

    def __init__(self, works: list[Work], workers: int, pick: Callable[[list[int]], int]) -> None:
        self.state = Admission.of(_tasks(works), ROOM)
        self.places: list[Place] = ["cuda" if i % 3 == 2 else "cpu" for i in range(workers)]
        self.pick = pick
        self.refused: list[int] = []
        """Workers that were told to wait, the longest-waiting first."""
        self.served: list[tuple[int, list[int]]] = []
        """Who got a task, and who had been waiting by then."""

    def step(self) -> bool:
        moves = [w for w, place in enumerate(self.places) if w in self.state.held or not self.state.exhausted(place)]
        if not moves:
            return False
        worker = self.pick(moves)
        if worker in self.state.held:
            self.state.give_back(worker)
        elif self.state.take(worker, self.places[worker]) is not None:
            self.served.append((worker, list(self.refused)))
            if worker in self.refused:
                self.refused.remove(worker)
        elif worker not in self.refused:
            self.refused.append(worker)
        for waiting in list(self.refused):
            if self.state.exhausted(self.places[waiting]):
                self.state.leave(waiting)
                self.refused.remove(waiting)
        return True


@settings(max_examples=150, deadline=None)
@given(works=st.lists(WORK, max_size=20), workers=st.integers(1, 5), data=st.data())
def test_nobody_who_waits_is_overtaken(works: list[Work], workers: int, data: st.DataObject) -> None:
    """A large task waits for those that run, never for one that asks later: whoever is served had waited longest."""
    machine = Machine(works, workers, lambda moves: data.draw(st.sampled_from(moves)))
    for _ in range(400):
        if not machine.step():
            break
    for worker, waiting in machine.served:
        assert not waiting or waiting[0] == worker


def test_a_large_task_is_not_starved_by_small_ones() -> None:
    """One worker runs a small task, the next wants the large one: the small ones behind it wait until it has run."""
    tasks = [bf16_task("small", (64, 32), ram_bytes=10), bf16_task("large", (64, 32), ram_bytes=95)]
    tasks += [bf16_task(f"gpu {i}", (64, 32), place="cuda", ram_bytes=5) for i in range(3)]
    state = Admission.of(tasks, ROOM)
    assert state.take(0, "cpu") is tasks[0]
    assert state.take(1, "cpu") is None  # 95 of 90 free
    assert state.take(2, "cuda") is None  # it would fit, but is behind
    state.give_back(0)
    assert state.take(2, "cuda") is None
    assert state.take(1, "cpu") is tasks[1]
    assert state.take(2, "cuda") is tasks[2]
    assert state.take(3, "cuda") is None  # 95 + 5 are all


def test_two_that_want_more_do_not_wait_for_each_other() -> None:
    """The first is refused, as nobody is left who would return anything; the second then gets what the first leaves."""
    tasks = [bf16_task(str(i), (64, 32), ram_bytes=40) for i in range(3)]
    state = Admission.of(tasks, ROOM)
    assert state.take(0, "cpu") is not None
    assert state.take(1, "cpu") is not None
    assert state.grow(0, 50) is None  # 20 are free; the other one may end
    assert state.take(2, "cpu") is None  # and no new task takes them meanwhile
    assert state.grow(1, 50) is None
    assert state.grow(0, 50) is False
    state.give_back(0)
    assert state.grow(1, 50) is True
    assert state.free_bytes == 10
    state.give_back(1)
    assert state.take(2, "cpu") is not None
    assert state.free_bytes == 60


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_a_task_larger_than_the_room_runs_alone(place: Place) -> None:
    tasks = [bf16_task("a", (64, 32), place=place, ram_bytes=ROOM + 1), bf16_task("b", (64, 32), ram_bytes=1)]
    state = Admission.of(tasks, ROOM)
    assert state.take(0, place) is tasks[0]
    assert state.take(1, "cpu") is None
    state.give_back(0)
    assert state.take(1, "cpu") is tasks[1]


@settings(max_examples=150, deadline=None)
@given(shards=st.lists(st.integers(0, 3), max_size=20), data=st.data())
def test_whoever_wants_to_be_apart_gets_a_shard_of_its_own_while_there_is_one(
    shards: list[int], data: st.DataObject
) -> None:
    """Units of one shard keep their order, every unit has its turn once, and who does not ask gets the next of all."""
    tasks = [bf16_task(str(i), (64, 32), shard=shard, ram_bytes=1) for i, shard in enumerate(shards)]
    state, taken = Admission.of(tasks, ROOM), list[Task]()
    while not state.exhausted("cpu"):
        worker, apart = data.draw(st.integers(0, 2)), data.draw(st.booleans())
        if worker in state.held:
            state.give_back(worker)
            continue
        left = [task for task in tasks if task not in taken]
        free = [task for task in left if task.shard not in state.shards.values()]
        unit = state.take(worker, "cpu", apart=apart)
        assert unit is (free[0] if apart and free else left[0])
        taken.append(unit)
    assert len(taken) == len(tasks)
