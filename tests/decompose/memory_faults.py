"""A device that runs out of memory, made of torch's own dispatch: no code of the package is replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BRIEFLY = "CUDA out of memory. Tried to allocate 2.00 GiB."
MESSAGE = (
    f"{BRIEFLY} GPU 0 has a total capacity of 79.10 GiB of which 1.50 GiB is free. Including non-PyTorch memory, …"
)


class Exhausted(TorchDispatchMode):
    """Operations fail as `fails(number, bytes)` says: their number from 0, and what they newly allocate of `dtype`.

    Views are no operations; those in place are, since a library may want memory for its workspace.
    """

    def __init__(self, fails: Callable[[int, int], bool], dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self._fails, self._dtype = fails, dtype
        self.operations = 0
        self.failures = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        new = {
            leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes()
            for leaf in tree_leaves(result)
            if torch.is_tensor(leaf)
            and leaf.untyped_storage().data_ptr() not in before
            and self._dtype in (None, leaf.dtype)
        }
        if not any(new.values()) and not func._schema.is_mutable:
            return result  # a view, or a number for the host: nothing that needs memory
        number, self.operations = self.operations, self.operations + 1
        if self._fails(number, sum(new.values())):
            self.failures += 1
            raise torch.OutOfMemoryError(MESSAGE)
        return result


def at(number: int) -> Exhausted:
    """Only operation `number` fails."""
    return Exhausted(lambda index, _: index == number)


def above(limit_bytes: int, dtype: torch.dtype | None = None) -> Exhausted:
    """Whatever allocates more than so much (of a dtype) fails, every time."""
    return Exhausted(lambda _, allocated: allocated > limit_bytes, dtype)
