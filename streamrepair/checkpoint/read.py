"""Open shards of an input checkpoint, read by position, and the proof that they did not change meanwhile.

pread and not mmap: a mapped file that shrinks kills the process (SIGBUS), a pread of it is an error that can be named.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path

from streamrepair.checkpoint import osfile
from streamrepair.checkpoint.headers import ShardHeader
from streamrepair.errors import InputError, shown


class InputFiles:
    """Descriptors of shards, opened when first needed and kept; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fds: dict[Path, tuple[int, ShardHeader]] = {}
        self._closed = False

    def read_into(self, shard: ShardHeader, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from a file offset of `shard`.

        Raises:
            InputError: the file changed since its header was read, or cannot be read.
        """
        osfile.pread_into(self.descriptor(shard), buffer, offset, shard.path)

    def descriptor(self, shard: ShardHeader) -> int:
        """The open descriptor of a shard.

        Raises:
            InputError: the file is not the one whose header was read, or the run is over.
        """
        with self._lock:
            if self._closed:  # a worker that was left behind: what it opened nobody would close
                raise InputError(f"{shown(str(shard.path))}: not read any more: the run has ended")
            if shard.path not in self._fds:
                fd = osfile.open_input(shard.path)
                try:
                    _check(osfile.status(fd, shard.path), shard)
                except InputError:
                    osfile.close(fd)
                    raise
                self._fds[shard.path] = (fd, shard)
            return self._fds[shard.path][0]

    def check_unchanged(self, shards: Iterable[ShardHeader]) -> None:
        """Compare every shard, by its path and by what is open, with what it was when its header was read.

        Raises:
            InputError: one was replaced, truncated or rewritten.
        """
        for shard in shards:
            try:
                _check(shard.path.stat(), shard)
            except OSError as error:
                raise InputError(
                    f"{shown(str(shard.path))}: gone while it was being read ({error.strerror}): "
                    "restore it and run again"
                ) from error
            if shard.path in self._fds:
                _check(osfile.status(self._fds[shard.path][0], shard.path), shard)

    def close(self) -> None:
        """Close all descriptors, for good."""
        with self._lock:
            self._closed = True
            for fd, _ in self._fds.values():
                osfile.close(fd)
            self._fds.clear()


def _check(found: os.stat_result, shard: ShardHeader) -> None:
    was = (shard.file_bytes, shard.mtime_ns, shard.inode, shard.device)
    now = (found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev)
    if was != now:
        raise InputError(
            f"{shown(str(shard.path))}: changed while it was being read ({was[0]} bytes, mtime {was[1]} → "
            f"{now[0]} bytes, mtime {now[1]}): nothing may write to the inputs during a run; run again with --overwrite"
        )
