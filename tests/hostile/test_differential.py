"""Where we and the safetensors library differ: where docs/durability.md says so, and for the reason it gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open

from streamrepair.checkpoint.headers import read_header
from streamrepair.errors import InputError
from tests.builders import write_file
from tests.hostile.test_hostile_headers import DATA, FILES, HEADERS
from tests.pairs import DEMO

STRICTER = {
    "duplicate tensor": "two readers could take different ones",
    "duplicate tensor, escaped": "the same, hidden by an escape",
    "duplicate metadata key": "two readers could take different ones",
    "metadata null": "the format has an object there",
    "leading space": "the format has the brace first",
    "extra key in an entry": "what it means is not known, and it would be written on",
    "too many dimensions": "neither torch nor numpy has tensors of more than 64",
}
"""Refused by us, accepted by the library (0.8.0)."""

DOCUMENTED = (DEMO.parent.parent / "docs" / "durability.md").read_text()


def _library_accepts(path: Path) -> bool:
    try:
        with safe_open(path, framework="np"):
            return True
    except (SafetensorError, OSError):
        return False


def _we_accept(path: Path) -> bool:
    try:
        read_header(path)
    except InputError:
        return False
    return True


def test_what_we_refuse_and_the_library_accepts_is_listed(tmp_path: Path) -> None:
    """Of all hostile files of this folder."""
    differing = set()
    for case, (content, _) in FILES.items():
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        if _library_accepts(path):
            differing.add(case)
    for case, (header, _) in HEADERS.items():
        if _library_accepts(write_file(tmp_path / "model.safetensors", header, DATA)):
            differing.add(case)
    assert differing == STRICTER.keys()


@pytest.mark.parametrize("case", STRICTER)
def test_every_difference_is_documented_with_its_reason(case: str) -> None:
    assert f"| {case} | {STRICTER[case]} |" in DOCUMENTED


def test_what_we_accept_the_library_accepts(tmp_path: Path) -> None:
    """The kept corpus; mutants of it are in test_fuzz."""
    accepted = 0
    for path in sorted((Path(__file__).parent / "corpus" / "header").iterdir()):
        header = path.read_bytes()
        for size in range(33):
            file = write_file(tmp_path / "model.safetensors", header, bytes(size))
            if _we_accept(file):
                accepted += 1
                assert _library_accepts(file)
    assert accepted >= 9
