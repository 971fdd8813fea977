"""What the documents say that a program can hold: where links lead, which modules there are, what is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import streamrepair
from tests.command import run

PACKAGE = Path(streamrepair.__file__).parent
ROOT = PACKAGE.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "demo" / "README.md"]
PAIR = ("demo/pair/base", "demo/pair/ft")


def _headings(document: Path) -> set[str]:
    """As GitHub names them."""
    found = re.findall(r"^#+ (.*)", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if not link.startswith("https://"):
            name, _, heading = link.partition("#")
            target = document.parent / name if name else document
            assert target.exists(), link
            assert not heading or heading in _headings(target), link


def test_the_table_of_modules_has_all_of_them() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text()
    named: set[str] = set()
    for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
        folder = ""
        for word in re.findall(r"`([^`]+)`", row):
            folder = word[: word.rindex("/") + 1] if "/" in word.rstrip("/") else folder
            named.add(folder + word.rpartition("/")[2] if not word.endswith("/") else folder + word)
    modules = {str(path.relative_to(PACKAGE).with_suffix("")) for path in PACKAGE.rglob("*.py")}
    modules = {name for name in modules if name.rpartition("/")[2] not in ("__init__", "__main__", "version")}
    folders = tuple(name for name in named if name.endswith("/"))
    assert {name for name in modules if not name.startswith(folders)} == named - set(folders)


@pytest.fixture
def shipped_speeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.usefixtures("shipped_speeds")
def test_the_readme_quotes_what_is_printed() -> None:
    quoted = re.findall(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    on_two = ("--device", "cpu", "--workers", "2")
    assert run("plan", *PAIR, "--ram", "500MB", *on_two, cwd=ROOT).out in quoted
    refused = run("plan", *PAIR, "--ram", "100MB", *on_two, cwd=ROOT)
    assert refused.status == 5
    assert refused.err in quoted
