"""Makes finished tensors count: their bytes are synced, then their records journalled, then whole shards sealed.

Tensors are committed in groups, since a sync per tensor would cost more than the tensor: what a crash can cost is the
last few seconds' work, never the consistency of what is recorded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import msgspec

from streamrepair.engine.stop import StopRequest
from streamrepair.engine.workspace import Workspace
from streamrepair.report import JournalEntry, TensorRecord

_EVERY_S = 3.0
_EVERY_BYTES = 1 << 30


class Committer:
    """The only writer of the journal and of final names.

    Args:
        workspace: OUT. records: what is committed already. before_commit: raises if nothing may count now.
        after_commit: called once pending tensors count. synced: told how many bytes of tensors a sync has put on disk.
        stop: once it is requested no shard is sealed any more: reading one back may take longer than there is time.
        lets_go: the page cache need not keep sealed shards.
    """

    def __init__(
        self,
        workspace: Workspace,
        records: Mapping[str, TensorRecord],
        *,
        before_commit: Callable[[], None],
        after_commit: Callable[[], None],
        synced: Callable[[int], None],
        stop: StopRequest,
        lets_go: bool,
    ) -> None:
        self._workspace, self._before_commit, self._after_commit = workspace, before_commit, after_commit
        self._synced, self._stop, self._lets_go = synced, stop, lets_go
        self.records = dict(records)
        self._pending: dict[str, tuple[int, TensorRecord]] = {}
        self._pending_bytes = 0
        self._since = time.monotonic()
        self._held_at = float("-inf")
        """When the inputs were last looked at."""
        self._missing = [set(shard.layout.entries) - self.records.keys() for shard in workspace.shards]

    def add(self, name: str, shard: int, record: TensorRecord, nbytes: int) -> None:
        """Take a finished tensor; it counts after the next `flush`."""
        self._pending[name] = (shard, record)
        self._pending_bytes += nbytes

    @property
    def due(self) -> bool:
        """Whether enough has gathered."""
        return bool(self._pending) and (
            self._pending_bytes >= _EVERY_BYTES or time.monotonic() - self._since >= _EVERY_S
        )

    def flush(self) -> None:
        """Sync the shards of all pending tensors, journal them, and seal the shards that are whole.

        Raises:
            InputError: the inputs changed; what was pending does not count.
            OutputError: the device refused, or OUT was moved away; what was pending does not count.
            DamageError: a shard does not read back as written.
            InterruptedRunError: a stop was requested while a shard was read back.
        """
        pending, self._pending = self._pending, {}
        pending_bytes, self._pending_bytes = self._pending_bytes, 0
        if pending:
            self._workspace.check_held()
            self._hold_inputs()
        for shard in sorted({shard for shard, _ in pending.values()}):
            self._workspace.shards[shard].sync()
        self._synced(pending_bytes)
        if pending:
            self._workspace.journal.append(
                msgspec.json.encode(JournalEntry(name, self._workspace.shards[shard].layout.name, record))
                for name, (shard, record) in pending.items()
            )
        for name, (shard, record) in pending.items():
            self.records[name] = record
            self._missing[shard].discard(name)
        if pending:
            self._after_commit()
        self._seal_whole()
        self._since = time.monotonic()

    def _hold_inputs(self) -> None:
        began = time.monotonic()
        self._before_commit()
        self._held_at = began

    def _seal_whole(self) -> None:
        for shard, missing in zip(self._workspace.shards, self._missing, strict=True):
            if not missing and not shard.sealed and not self._stop.requested:
                if time.monotonic() - self._held_at > _EVERY_S:  # it looks at every shard of both inputs
                    self._hold_inputs()
                digests = {name: self.records[name].digest or "" for name in shard.layout.entries}
                shard.seal(digests, check_stop=self._stop.check_at_once)
                if self._lets_go:
                    shard.let_go()
