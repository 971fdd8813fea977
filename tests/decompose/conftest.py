"""One thread for these small matrices: more of them wait for each other longer than they compute."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from streamrepair.decompose import truncation
from streamrepair.decompose.krylov import BlockLanczos, Ritz


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="package")
def _no_delta_is_large() -> Iterator[None]:
    """The deltas here stand alone, W_base is zero: what mixes is not held against weights (engine/test_rounding is)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truncation, "_MOST_TURNED", float("inf"))
        yield


@pytest.fixture
def lossy_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Krylov bases that never show their third value."""
    original = BlockLanczos.ritz

    def lossy(self: BlockLanczos) -> Ritz:
        ritz = original(self)
        keep = np.arange(len(ritz.values)) != 2
        return Ritz(ritz.values[keep], ritz.residuals[keep], ritz.weights[keep], ritz.coefficients[:, keep])

    monkeypatch.setattr(BlockLanczos, "ritz", lossy)
