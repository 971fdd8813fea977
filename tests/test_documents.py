"""What the documents say that a program can hold: where links lead, which modules there are, what is printed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import streamrepair
from streamrepair.checkpoint import beside
from streamrepair.decompose.speed import Rates
from streamrepair.engine import address_space
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


FORMATS = (ROOT / "docs" / "formats.md").read_text()
FREE = ("tensors", "sidecar_digests", "headers", "utilisation[].waiting_s", "machine.versions")
"""Objects whose members have names of files, tensors and the like; only those of `tensors` are objects themselves."""


def _section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", FORMATS, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def _documented(title: str) -> set[str]:
    """The fields in a section's tables, with the objects they are members of, which the headings name."""
    found: set[str] = set()
    within = [""]
    for line in _section(title).splitlines():
        if line.startswith("### "):
            within = [f"{path}." for path in re.findall(r"`([^`]+)`", line)]
        elif row := re.match(r"\| `([^`]+)` \|", line):
            found |= {path + row[1] for path in within}
    return found


def _found(value: object, within: str = "") -> Iterator[str]:
    """The same of a document: its fields, those of objects in it as well."""
    if isinstance(value, dict):
        free = within.removesuffix(".") in FREE
        for name, member in value.items():
            if not free:
                yield within + name
            yield from _found(member, f"{within}{'*' if free else name}.")
    elif isinstance(value, list):
        for member in value:
            yield from _found(member, f"{within.removesuffix('.')}[].")


def _written(*documents: str) -> set[str]:
    return {field for text in documents for field in _found(json.loads(text))}


def test_formats_has_every_field_of_report_trace_and_verification(tmp_path: Path) -> None:
    out, trace = tmp_path / "out", tmp_path / "trace.json"
    report = run("repair", *PAIR, out, "--trace", trace, "--json", cwd=ROOT)
    assert report.out == (out / "streamrepair.json").read_text()
    assert _written(report.out) == _documented("Report")
    assert _written(trace.read_text()) == _documented("Trace")
    deep = run("verify", out, "--deep", "--sample", "1", "--json")
    (out / "config.json").write_text("{}")
    damaged, mended = run("verify", out, "--json"), run("verify", out, "--repair", "--json")
    assert (deep.status, damaged.status, mended.status) == (0, 4, 0)
    assert _written(deep.out, damaged.out, mended.out) == _documented("Verification")


def test_formats_has_every_field_of_a_plan() -> None:
    on_gpu = run("plan", *PAIR, "--device", "cuda", "--vram", "24GB", "--json", cwd=ROOT)
    assert _written(run("plan", *PAIR, "--json", cwd=ROOT).out, on_gpu.out) == _documented("Plan")


def test_formats_has_every_field_of_a_benchmark() -> None:
    quick = ("--shape", "64x64", "--spectrum", "gapped", "--backend", "gram", "--repeats", "1")
    assert _written(run("bench", *quick, "--json").out) == _documented("Benchmark")
    assert {field.name for field in fields(Rates)} == _documented("Speeds")


def test_formats_has_every_backend_that_decides() -> None:
    found: set[str] = set()
    for module in (PACKAGE / "decompose").rglob("*.py"):
        for name in re.findall(r'backend=f?"([^"]+)"', module.read_text()):
            stem, braces, _ = name.partition("{")
            found |= {f"{stem}float32", f"{stem}float64"} if braces else {name}
    table = _section("Report").partition("### Values of backend")[2]
    assert set(re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)) == found


def test_formats_has_every_name_that_comes_along_and_every_variable() -> None:
    copied = _section("What comes along from FT")
    for name in (*beside._SUFFIXES, *beside._NAMES):
        assert f"`{name}`" in copied
    read = set(address_space._THREADS)
    for module in PACKAGE.rglob("*.py"):
        read |= set(re.findall(r'environ(?:\.get\(|\[)"(\w+)"', module.read_text()))
    for name in read:
        assert f"`{name}`" in _section("Environment variables"), name


def test_a_failure_prints_nothing_but_its_line(tmp_path: Path) -> None:
    for words in (("plan", *PAIR, "--ram", "1MB", "--json"), ("verify", tmp_path, "--json")):
        failed = run(*words, cwd=ROOT)
        assert (failed.status != 0, failed.out, failed.err.count("\n")) == (True, "", 1)
