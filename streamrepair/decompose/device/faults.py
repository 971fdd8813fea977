"""Which failures of torch mean that the device has no memory left."""

from __future__ import annotations

import torch

_ALLOCATION = (
    "out of memory",
    "ALLOC_FAILED",
    "STATUS_NOT_INITIALIZED",
    "`cublasCreate",
    "`cusolverDnCreate(",
    "NVML_SUCCESS ==",
)
"""cuBLAS and cuSOLVER report memory they could not get, for themselves or their handles, as errors of their own.

torch's allocator asks NVML what to say of a full card, and fails an assertion where that does not answer: in a
container with a part of a card (MIG), for example.
"""


def no_memory(error: RuntimeError) -> bool:
    """Whether a failure of torch is for want of memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in _ALLOCATION)
