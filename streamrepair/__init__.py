"""Out-of-core spectral repair of fine-tuned checkpoints under a stated memory budget.

The names below are imported when they are first used: the command line installs its signal handlers before that.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from streamrepair.version import __version__

if TYPE_CHECKING:
    from streamrepair.api import plan, repair, verify
    from streamrepair.engine.plan import Plan
    from streamrepair.engine.stop import StopRequest
    from streamrepair.engine.watcher import Watcher
    from streamrepair.errors import (
        BudgetError,
        DamageError,
        DiskSpaceError,
        InputError,
        InterruptedRunError,
        LockedError,
        NumericalError,
        OutputError,
        StreamRepairError,
        UsageError,
    )
    from streamrepair.report import Budget, CheckpointSummary, Report, ResourceUse, Settings, TensorRecord, Timings
    from streamrepair.verification import Damage, DeepCheck, Verified

__all__ = [
    "Budget",
    "BudgetError",
    "CheckpointSummary",
    "Damage",
    "DamageError",
    "DeepCheck",
    "DiskSpaceError",
    "InputError",
    "InterruptedRunError",
    "LockedError",
    "NumericalError",
    "OutputError",
    "Plan",
    "Report",
    "ResourceUse",
    "Settings",
    "StopRequest",
    "StreamRepairError",
    "TensorRecord",
    "Timings",
    "UsageError",
    "Verified",
    "Watcher",
    "__version__",
    "plan",
    "repair",
    "verify",
]

_ELSEWHERE = {
    **dict.fromkeys(("plan", "repair", "verify"), "api"),
    **dict.fromkeys(
        ("Budget", "CheckpointSummary", "Report", "ResourceUse", "Settings", "TensorRecord", "Timings"), "report"
    ),
    **dict.fromkeys(("Damage", "DeepCheck", "Verified"), "verification"),
    "Plan": "engine.plan",
    "StopRequest": "engine.stop",
    "Watcher": "engine.watcher",
}
"""Name → module; the other names are errors."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ELSEWHERE.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return list(__all__)
