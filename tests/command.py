"""The command line in a process of its own, as a user and a batch system run it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

EAGER = (
    "import sys; from streamrepair.engine import commit; commit._EVERY_S = 0.0; "
    "from streamrepair.cli import main; sys.exit(main())"
)
"""The command line, with every tensor committed as soon as it is done: short runs are then killed between commits."""


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


def start(*arguments: object, eager: bool = False, cwd: Path | None = None) -> subprocess.Popen[str]:
    """A running command."""
    how = ["-c", EAGER] if eager else ["-m", "streamrepair"]
    words = [sys.executable, *how, *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)


def finish(process: subprocess.Popen[str]) -> Result:
    """Wait for a command's end."""
    out, err = process.communicate(timeout=120)
    return Result(process.returncode, out, err)


def run(*arguments: object, cwd: Path | None = None) -> Result:
    """A command, start to end."""
    return finish(start(*arguments, cwd=cwd))
