"""Fixtures of several modules."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.pairs import DEMO, snapshot


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """More threads wait for each other longer than they compute, on small matrices."""
    import torch  # most of these tests need none of it

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def inputs_are_never_written() -> Iterator[None]:
    """Whatever a run does, the demonstration pair is afterwards what it was."""
    before = snapshot(DEMO)
    yield
    assert snapshot(DEMO) == before
