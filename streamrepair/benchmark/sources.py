"""A pair of matrices in memory, streamed to the backends as the engine streams files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from streamrepair.decompose.convert import Doubles, Raw, difference
from streamrepair.decompose.operator import Panel


@dataclass(frozen=True, slots=True)
class MemorySource:
    """W_base and W_ft as stored, either way round."""

    base: Raw
    ft: Raw
    dtype: str
    """Of both: BF16, F16, F32 or F64."""

    @property
    def wide(self) -> bool:
        """Whether the second axis is the long one."""
        return bool(self.ft.shape[1] > self.ft.shape[0])

    @property
    def rows(self) -> int:
        """The longer side, m."""
        return int(max(self.ft.shape))

    @property
    def cols(self) -> int:
        """The shorter side, n."""
        return int(min(self.ft.shape))

    def panels(self) -> Iterator[Panel]:
        """All of it as one panel: it is in memory already, and backends work block by block anyway."""
        yield Panel(0, self.base, self.ft, self.dtype, self.dtype, self.wide)

    def delta(self) -> Doubles:
        """Δ in float64, upright: (m, n)."""
        stored = np.empty(self.ft.shape)
        difference(self.ft, self.dtype, self.base, self.dtype, stored)
        return np.ascontiguousarray(stored.T) if self.wide else stored
