"""The floors of the package: imports point down only, and heavy or dangerous modules are met in one place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import streamrepair

PACKAGE = Path(streamrepair.__file__).parent
FLOORS = (
    ("__main__",),
    ("entry",),
    ("cli", "cli_bench", "cli_options", "console"),
    ("terminal", "views"),
    ("__init__",),
    ("api",),
    ("verification", "deep", "mend", "origins", "benchmark"),
    ("engine",),
    ("decompose", "checkpoint"),
    ("spectral",),
    ("errors", "units", "options", "report", "streams", "version"),
)
APART = {("decompose", "checkpoint"), ("checkpoint", "decompose")}
"""Neighbours on one floor that must not know each other."""
FILE_CALLS = {
    "open", "close", "read", "write", "pread", "preadv", "pwrite", "fsync", "fdatasync", "ftruncate", "truncate",
    "posix_fallocate", "replace", "rename", "unlink", "remove", "mkdir", "makedirs", "rmdir", "link", "symlink",
}  # fmt: skip
FILE_METHODS = {"read_bytes", "read_text", "write_bytes", "write_text", "mkdir", "unlink", "rmdir", "touch", "rename"}


def _modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield str(path.relative_to(PACKAGE)), ast.parse(path.read_text())


def _part(module: str) -> str:
    """The floor's word for a module of the package: "engine" of "engine/run.py" or "streamrepair.engine.run"."""
    parts = module.removesuffix(".py").replace("/", ".").removeprefix("streamrepair").strip(".").split(".")
    return parts[0] or "__init__"


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            assert node.module is not None
            if node.module == "streamrepair":
                yield from (f"streamrepair.{alias.name}" for alias in node.names)
            else:
                yield node.module


def _for_types_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _floor(part: str) -> int:
    return next(i for i, parts in enumerate(FLOORS) if part in parts)


@pytest.mark.parametrize(("name", "tree"), list(_modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_down(name: str, tree: ast.Module) -> None:
    own = _part(name)
    for module in _imported(tree):
        if module.split(".")[0] == "streamrepair":
            assert _floor(own) <= _floor(_part(module)), f"{name} imports {module}, a floor above it"
            assert (own, _part(module)) not in APART, f"{name} imports {module}, its neighbour"


def test_torch_is_met_in_one_folder_and_late_elsewhere() -> None:
    """decompose/device is made of torch; three modules ask for it inside functions; nothing else knows it.

    engine/budget.py asks it about cards, engine/gpu.py prepares a thread for its card, benchmark/reference.py is what
    others do with it.
    """
    anywhere = {name for name, tree in _modules() if any(m.split(".")[0] == "torch" for m in _imported(tree))}
    late = {"engine/budget.py", "engine/gpu.py", "benchmark/reference.py"}
    assert {name for name in anywhere if not name.startswith("decompose/device/")} == late
    for name in late:
        body = ast.parse((PACKAGE / name).read_text()).body
        at_import = [node for node in body if not isinstance(node, ast.FunctionDef) and not _for_types_only(node)]
        assert not {m.split(".")[0] for m in _imported(ast.Module(at_import, []))} & {"torch"}


def test_spectral_mathematics_knows_no_files_and_no_torch() -> None:
    for name, tree in _modules():
        if name.startswith("spectral/"):
            assert not {m.split(".")[0] for m in _imported(tree)} & {"torch", "os", "pathlib", "io"}


def test_files_are_touched_through_one_module() -> None:
    """A fault put under osfile's `os` meets every operation on weights, journal and report."""
    exempt = {"checkpoint/osfile.py", "console.py", "streams.py"}  # the terminal, /dev/null and the standard streams
    exempt |= {"engine/address_space.py", "engine/budget.py", "engine/limits.py"}  # /proc, /sys
    for name, tree in _modules():
        if name in exempt:
            continue
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                assert not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open")
                continue
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id == "os":
                assert node.func.attr not in FILE_CALLS, f"{name}: os.{node.func.attr}"
            elif isinstance(owner, ast.Name) and owner.id in ("shutil", "fcntl"):
                pytest.fail(f"{name}: {owner.id}.{node.func.attr}")
            elif not (isinstance(owner, ast.Name) and owner.id == "osfile"):
                assert node.func.attr not in FILE_METHODS, f"{name}: .{node.func.attr}()"
