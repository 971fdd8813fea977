"""The table, the chart, and the command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from streamrepair.benchmark.plot import check_target, save, svg
from streamrepair.benchmark.records import Benchmark, CaseRecord, Check, Machine, Run
from streamrepair.benchmark.table import render
from streamrepair.errors import UsageError

SVG = "{http://www.w3.org/2000/svg}"
FLOPS = 24_000_000


def _run(name: str, seconds: float, **more: object) -> Run:
    values: dict[str, object] = {
        "name": name, "decided_by": name, "threads": 1, "samples": (seconds,), "seconds": seconds,
        "gflops": FLOPS / seconds / 1e9, "rank_kept": 12,
    }  # fmt: skip
    return Run(**(values | more))  # type: ignore[arg-type]


def _check(error: float = 1e-7, rank: int = 12) -> Check:
    return Check(rank_exact=rank, rank_agrees=rank == 12, delta_error=error)


@pytest.fixture
def benchmark_record() -> Benchmark:
    machine = Machine(
        cpu="A <fast> & cheap CPU", cores=4, ram_bytes=8_000_000_000, gpu=None, python="3.11",
        versions={"numpy": "2.0", "torch": None}, blas=("openblas 0.3",),
    )  # fmt: skip
    runs = (
        _run("gram", 0.5, decided_by="gram-float64", speedup=8.0, pair_seconds=0.8, pair_speedup=10.0, check=_check(),
             peak_array_bytes=3_000_000, climbed=("gram-float32: too little precision",)),
        _run("full", 5.0, speedup=0.8, check=_check(2e-3, rank=13), peak_array_bytes=9_000_000),
    )  # fmt: skip
    case = CaseRecord(
        shape=(400, 100), spectrum="heavy", count=3, flops=FLOPS,
        reference=_run("torch.linalg.svd", 4.0, threads=4, check=_check()), runs=runs,
    )  # fmt: skip
    return Benchmark(
        date="2026-01-01T00:00:00+00:00", machine=machine, device="cpu", dtype="BF16", threads=4, load_before=0.1,
        repeats=1, cases=(case,),
    )  # fmt: skip


def _unreferenced(record: Benchmark) -> Benchmark:
    (case,) = record.cases
    runs = tuple(msgspec.structs.replace(run, speedup=None, pair_speedup=None) for run in case.runs)
    bare = msgspec.structs.replace(case, reference=None, reference_absent="torch is not installed", runs=runs)
    return msgspec.structs.replace(record, cases=(bare,))


def test_table_has_a_row_for_each_contender_in_columns(benchmark_record: Benchmark) -> None:
    lines = render(benchmark_record).splitlines()
    head, reference, gram, full = lines[:4]
    assert "3 of 400 × 100" in reference
    assert "12%" in reference
    assert head.index("by") == reference.index("torch.linalg.svd") == gram.index("gram-float64") == full.index("full")
    assert "8×" in gram
    assert "10×" in gram
    assert "12 = float64" in gram
    assert "12 ≠ 13" in full
    assert full.split()[-3] == "WRONG"
    assert "one BLAS thread per matrix" in render(benchmark_record)
    assert lines[-1] == "400x100 heavy: gram-float32: too little precision"
    assert len(benchmark_record.faults) == 1


def test_table_says_that_there_is_no_reference(benchmark_record: Benchmark) -> None:
    text = render(_unreferenced(benchmark_record))
    assert "no reference: torch is not installed" in text
    assert "0.4 s each" in text
    assert "speed-up: over" not in text


def test_table_says_that_the_machine_was_busy(benchmark_record: Benchmark) -> None:
    assert "busy" not in render(benchmark_record)
    assert "busy" in render(msgspec.structs.replace(benchmark_record, load_before=3.0))


@pytest.mark.parametrize("compared", [True, False])
def test_chart_is_well_formed_and_its_bars_are_as_long_as_their_values(
    benchmark_record: Benchmark, compared: bool
) -> None:
    root = ElementTree.fromstring(svg(benchmark_record if compared else _unreferenced(benchmark_record)))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    bars = [float(e.attrib["width"]) for e in root.iter(f"{SVG}rect") if e.attrib["height"] == "14.0"]
    assert len(bars) == 3
    ratios = (10.0 / 8.0, 0.8 / 8.0) if compared else (1.25, 0.1)
    assert bars[1] / bars[0] == pytest.approx(ratios[0], rel=0.01)
    assert bars[2] / bars[0] == pytest.approx(ratios[1], rel=0.01)
    for element in root.iter():
        assert 0 <= float(element.get("x", "0")) + float(element.get("width", "0")) <= width
        assert 0 <= float(element.get("y", "0")) <= height
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert "400x100 heavy" in texts
    assert any(text is not None and "A <fast> & cheap CPU" in text for text in texts)
    assert ("8×" in texts) == compared


def test_html_wraps_the_chart(benchmark_record: Benchmark, tmp_path: Path) -> None:
    save(benchmark_record, tmp_path / "chart.html")
    page = (tmp_path / "chart.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    found = re.search(r"<svg.*</svg>\n", page, re.DOTALL)
    assert found is not None
    assert found[0] == svg(benchmark_record)


def test_a_chart_that_could_not_be_written_is_refused_first(tmp_path: Path) -> None:
    check_target(tmp_path / "a.SVG")
    for path in (tmp_path / "a.png", tmp_path / "none" / "a.svg"):
        with pytest.raises(UsageError, match="--plot"):
            check_target(path)


def _bench(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "streamrepair", "bench", *arguments]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, check=False, env=env)


def test_the_command_prints_json_and_draws(tmp_path: Path) -> None:
    done = _bench("--shape", "96x64", "--spectrum", "heavy", "--threads", "1", "--repeats", "1", "--backend", "gram",
                  "--json", "--plot", "chart.svg", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = msgspec.convert(json.loads(done.stdout), Benchmark)
    assert found.format == "streamrepair.bench/1"
    assert [case.label for case in found.cases] == ["96x64 heavy"]
    assert found.cases[0].runs[0].check is not None
    assert found.cases[0].runs[0].check.passed
    assert done.stderr.splitlines() == ["1 of 1: 96x64 heavy"]
    ElementTree.parse(tmp_path / "chart.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["chart.svg"]


def test_speeds_that_cannot_be_kept_are_shown_all_the_same(tmp_path: Path) -> None:
    cache = tmp_path / "one; two"
    cache.mkdir()
    (cache / "streamrepair").write_text("a file")
    done = _bench("--calibrate", "--json", cwd=tmp_path, XDG_CACHE_HOME=str(cache))
    assert done.returncode == 1
    assert json.loads(done.stdout)["float64_flops_per_s"] > 1e8
    (line,) = done.stderr.splitlines()
    assert f"{cache}/streamrepair: could not be " in line
    assert "); the speeds are not kept: let XDG_CACHE_HOME name a folder" in line


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--shape", "96by64"], "96by64"),
        (["--backend", "quick"], "quick"),
        (["--plot", "c.png"], "c.png"),
        (["--shape", "96x64", "--repeats", "1.5"], "--repeats: expected a whole number, not '1.5'"),
        (["--shape", "96x64", "--threads", "1.5"], "--threads: expected a whole number, not '1.5'"),
        (["--calibrate", "--plot", "c.svg"], "--plot means nothing with --calibrate"),
        (["--calibrate", "base"], "BASE means nothing with --calibrate"),
        (["--calibrate", "--threads", "1"], "--threads means nothing with --calibrate"),
        (["--calibrate", "--repeats", "1"], "--repeats means nothing with --calibrate"),
        (["--calibrate", "--dtype", "f32"], "--dtype means nothing with --calibrate"),
        (["--calibrate", "--device", "cpu"], "--device means nothing with --calibrate"),
        (["--calibrate", "--no-check"], "--no-check means nothing with --calibrate"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(arguments: list[str], word: str, tmp_path: Path) -> None:
    done = _bench(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert word in line
