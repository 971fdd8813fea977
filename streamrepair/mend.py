"""`verify --repair`: put right what `verify` finds, by doing the damaged tensors again and nothing else.

It is the run that made OUT, continued: the same lock, fingerprint, journal and sealing. What is not the run's own (a
stray file) stays and is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from streamrepair.checkpoint.layout import Checkpoint
from streamrepair.engine.plan import Plan
from streamrepair.engine.run import execute
from streamrepair.engine.stop import StopRequest
from streamrepair.engine.watcher import Watcher
from streamrepair.errors import DamageError, shown
from streamrepair.origins import open_origins
from streamrepair.report import STATE, Settings
from streamrepair.verification import Verified, read_report, verify

MakePlan = Callable[[Checkpoint, Checkpoint, Settings], Plan]


def mend(out: Path, found: Verified, make_plan: MakePlan, *, watcher: Watcher, stop: StopRequest) -> Verified:
    """Redo what `found` lists as damaged and verify again.

    Returns:
        What is still wrong, and as `mended` what no longer is.

    Raises:
        DamageError: the state of the run is gone, so that its inputs cannot be told from others.
        InputError: BASE or FT is gone or has changed.
        StreamRepairError: the work failed.
    """
    if not found.damage:
        return found
    report, as_written = read_report(out)
    if not (out / STATE / "run.json").is_file():
        raise DamageError(
            f"{shown(str(out / STATE / 'run.json'))}: missing, so that nothing tells whether BASE and FT are what the "
            "result was made from: run the repair again with --overwrite"
        )
    base, ft = open_origins(report)
    finished = {name: record for name, record in report.tensors.items() if record.action != "dropped" and as_written}
    execute(make_plan(base, ft, report.settings), out, stop=stop, watcher=watcher, finished=finished)
    after = verify(out)
    left = {damage.where for damage in after.damage}
    return msgspec.structs.replace(after, mended=tuple(d for d in found.damage if d.where not in left))
