"""The command line in a process of its own, as a user and a batch system run it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

EAGER = """
import itertools, os, sys, time
from streamrepair.engine import commit, task

commit._EVERY_S = 0.0
limit, gate, started, repair = int(os.environ["LIMIT"]), os.environ["GATE"], itertools.count(1), task._repair


def held(job):
    if next(started) > limit:
        stop = job.around.check_stop.__self__
        while not stop.requested and not os.path.exists(gate):
            time.sleep(0.005)
    return repair(job)


task._repair = held
from streamrepair.cli import main

sys.exit(main())
"""
"""The command line, with every tensor committed as soon as it is done, so that short runs are met between commits.

After so many matrices of this process the next one waits for a stop request or for a file: however fast the machine
is and however late the test looks, the run is then still at work.
"""


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a failure; fails where there is none, or more."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


def start(*arguments: object, cwd: Path | None = None) -> subprocess.Popen[str]:
    """A running command."""
    words = [sys.executable, "-m", "streamrepair", *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)


def start_held(*arguments: object, after: int, until: Path) -> subprocess.Popen[str]:
    """A running command that commits every tensor at once and, `after` so many matrices, waits `until` a file is."""
    words = [sys.executable, "-c", EAGER, *map(str, arguments)]
    environment = os.environ | {"LIMIT": str(after), "GATE": str(until)}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> Result:
    """Wait for a command's end."""
    out, err = process.communicate(timeout=120)
    return Result(process.returncode, out, err)


def run(*arguments: object, cwd: Path | None = None) -> Result:
    """A command, start to end."""
    return finish(start(*arguments, cwd=cwd))
