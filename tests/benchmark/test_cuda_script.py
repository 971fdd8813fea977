"""bench/cuda.py on torch's CPU: what it writes where there is a GPU is written by the same lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from streamrepair.engine.memory import MatrixShape, device_bytes

SCRIPT = Path(__file__).parent.parent.parent / "bench" / "cuda.py"
ABSENT = ("msgspec", "cyclopts", "xxhash", "tqdm", "huggingface_hub", "tokenizers", "transformers", "safetensors")


def _run_changed(folder: Path, changes: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script's `main` after some lines of Python that follow its import; results go into `folder`."""
    script = folder / "changed.py"
    script.write_text("\n".join(["import cuda, sys", *changes, "sys.exit(cuda.main())"]))
    path = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parent.parent)])}
    command = [sys.executable, str(script), *arguments, "--results", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=path)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=one_thread)


def test_small_shapes_are_measured_and_held_against_float64(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--shapes", "160x96,64x200", "--batches", "3:80x40", "--repeats", "1"]
    arguments += ["--model", "tiny"]
    done = _run(*arguments, "--results", str(tmp_path), "--name", "small")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "small.json").read_text())
    assert record["gpu"] is None
    assert record["machine"]["torch"]
    assert [(case["shape"], case["spectrum"]) for case in record["cases"]] == [
        ([160, 96], "gapped"),
        ([160, 96], "heavy"),
        ([64, 200], "gapped"),
        ([64, 200], "heavy"),
    ]
    for case in record["cases"]:
        m, n = max(case["shape"]), min(case["shape"])
        assert case["projected_device_bytes"] == device_bytes(MatrixShape(m, n, 2, 2, 2), "gram")
        assert {run["name"] for run in case["runs"]} == {"streamrepair", "eigh-float64", "svd-default"}
        assert 0 < case["stages"]["residual_units"] < 8
        assert 0 < case["stages"]["formed_units"] < 2
        for run in case["runs"]:
            assert run["seconds"] > 0
            assert run["check"]["passed"]
            assert run["check"]["delta_error"] < 1e-5
        ours = case["runs"][0]["check"]
        assert ours["rank"] == ours["rank_exact"] > 0
        assert ours["rank"] > 0.1 * n or case["spectrum"] == "gapped"
    (batch,) = record["batches"]
    assert [run["name"] for run in batch["runs"]] == ["batched 3:80x40", "one by one 3:80x40"]
    assert all(run["seconds"] > 0 and run["check"] == {"decided": 3, "why": []} for run in batch["runs"])
    whole = record["whole"]
    assert whole["batches"] == [6, 4, 4]
    assert [run["name"] for run in whole["runs"]] == ["in batches", "one by one"]
    assert all(run["seconds"] > 0 for run in whole["runs"])
    assert whole["runs"][0]["predicted_s"] < whole["runs"][1]["predicted_s"]
    assert whole["other_rank"] == 0


def test_it_runs_where_there_is_little_but_torch(tmp_path: Path) -> None:
    """As on a machine that is lent with a GPU: a package that is missing there must not cost its minutes."""
    script = tmp_path / "lacking.py"
    lines = ["import sys", f"sys.modules |= dict.fromkeys({ABSENT})", "import cuda", "sys.exit(cuda.main())"]
    script.write_text("\n".join(lines))
    path = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parent.parent)])}
    arguments = ["--device", "cpu", "--shapes", "96x64", "--spectra", "heavy", "--batches", "2:64x32", "--model", ""]
    command = [sys.executable, str(script), *arguments, "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=path)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads((tmp_path / "cuda.json").read_text())["cases"]
    assert all(run["check"]["passed"] for run in case["runs"])


def test_what_would_take_too_long_is_left_out_and_said_to_be(tmp_path: Path) -> None:
    """Nothing is quick enough for a billionth of a second, except what was never measured before."""
    arguments = ["--device", "cpu", "--shapes", "96x64,128x64", "--spectra", "gapped", "--batches", "", "--no-check"]
    arguments += ["--model", ""]
    done = _run(*arguments, "--limit", "1e-9", "--results", str(tmp_path))
    assert done.returncode == 1  # ours among them: no answer is no success
    first, second = json.loads((tmp_path / "cuda.json").read_text())["cases"]
    assert all(len(run["samples"]) == 1 for run in first["runs"])  # the long first run stands for all
    assert all("expected to take" in run["left_out"] for run in second["runs"])


def test_what_the_device_has_no_memory_for_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    """The truth takes more than anything else; without it there are times, and no success."""
    changes = [
        "import torch",
        "def no_memory(*_):",
        "    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has …')",
        "cuda.contenders.answer = no_memory",
    ]
    arguments = ["--device", "cpu", "--shapes", "96x64", "--spectra", "gapped", "--batches", "", "--model", ""]
    done = _run_changed(tmp_path, changes, *arguments)
    assert done.returncode == 1
    (case,) = json.loads((tmp_path / "cuda.json").read_text())["cases"]
    assert case["answer"] == {"failed": "CUDA out of memory. Tried to allocate 9 GiB."}
    assert all(run["seconds"] > 0 and "check" not in run for run in case["runs"])


def test_what_there_is_no_time_for_is_left_out_and_said_to_be(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--shapes", "96x64", "--spectra", "heavy", "--batches", "2:64x32"]
    done = _run(*arguments, "--minutes", "0", "--results", str(tmp_path / "new"))
    record = json.loads((tmp_path / "new" / "cuda.json").read_text())
    assert done.returncode == 0, done.stderr
    assert record["cases"] == [{"spectrum": "heavy", "shape": [96, 64], "left_out": "no time is left"}]
    assert record["batches"][0]["left_out"] == record["whole"]["left_out"] == "no time is left"


def test_a_step_that_fails_leaves_all_others_what_they_had(tmp_path: Path) -> None:
    """Whatever is wrong with it, and the stages before the one that failed too."""
    changes = [
        "pair, check = cuda.pairs.pair, cuda.contenders.certify.check_vectors",
        "def one_shape(shape, *rest, **knobs):",
        "    if shape == (128, 64):",
        "        raise KeyError('a mistake')",
        "    return pair(shape, *rest, **knobs)",
        "def no_vectors(*_):",
        "    cuda.contenders.certify.check_vectors = check",
        "    raise ArithmeticError('not orthonormal')",
        "cuda.pairs.pair, cuda.contenders.certify.check_vectors = one_shape, no_vectors",
    ]
    arguments = ["--device", "cpu", "--shapes", "128x64,96x64", "--spectra", "gapped", "--batches", ""]
    arguments += ["--model", "none", "--contenders", "streamrepair,eigh-float64"]
    done = _run_changed(tmp_path, changes, *arguments)
    record = json.loads((tmp_path / "cuda.json").read_text())
    assert done.returncode == 1
    assert "KeyError: 'a mistake'" in done.stderr
    assert record["whole"] == {"failed": "'none'"}
    assert record["cases"][0]["failed"] == "'a mistake'"
    sound = record["cases"][1]
    assert [run["name"] for run in sound["runs"]] == ["streamrepair", "eigh-float64"]
    assert all(run["check"]["passed"] for run in sound["runs"])
    assert sound["stages"]["failed"] == "not orthonormal"
    assert {"eigh_s", "count_s", "residual_units", "formed_units"} <= sound["stages"].keys()
    assert "vectors_s" not in sound["stages"]
