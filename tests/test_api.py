"""The Python API: what it exports, and that a wrong value is refused before anything is read or written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_info

import streamrepair
from streamrepair import BudgetError, Plan, Report, Settings, UsageError, api
from tests.pairs import Pair, write_pair


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return write_pair(tmp_path, {"w": (64, 48), "v": (48,)})


WRONG = [
    ({"out_dtype": "bf16"}, "--out-dtype is 'bf16', expected same or float32"),
    ({"backend": "foo"}, "--backend is 'foo', expected auto or full or gram"),
    ({"on_nonfinite": "foo"}, "--on-nonfinite is 'foo', expected refuse or copy-ft"),
    ({"sigma": None}, "--sigma is None, expected median or tail"),
    ({"scale": "1"}, "--scale is '1', expected a positive number"),
    ({"scale": float("nan")}, "--scale is nan, expected a positive number"),
    ({"scale": True}, "--scale is True"),
    ({"include": b"x"}, "--include is b'x', expected a regular expression as text"),
    ({"exclude": "("}, r"--exclude '\(' is not a regular expression"),
    ({"ram": -5}, "--ram is -5, expected a positive number of bytes"),
    ({"ram": 1e9}, "--ram is 1000000000.0, expected a positive number of bytes"),
    ({"vram": "foo", "device": "cpu"}, "--vram: size 'foo' is not understood"),
    ({"ram": "9" * 400}, "--ram: size '9+… .* is not understood"),
    ({"ram": "1e400"}, "--ram: size '1e400' is not understood"),
    ({"scale": 1e101}, "--scale is 1e\\+101, expected a positive number of at most 1e\\+100"),
    ({"vram": 0}, "--vram is 0"),
    ({"workers": 1.5}, "--workers is 1.5, expected a whole number"),
    ({"workers": 0}, "--workers is 0"),
    ({"include": ""}, "--include is empty, which every name matches"),
    ({"exclude": "a{99999999999}"}, "--exclude '.*' is not a regular expression: the repetition"),
    ({"device": 0}, "--device 0 is not understood"),
    ({"device": "cuda:"}, "--device 'cuda:' is not understood"),
    ({"exclude": np.str_("w")}, r"--exclude is np.str_\('w'\), expected a plain str"),
    ({"sigma": np.str_("tail")}, r"--sigma is np.str_\('tail'\), expected a plain str"),
]


@pytest.mark.parametrize(("options", "said"), WRONG, ids=lambda value: str(value)[:30])
def test_a_wrong_value_is_a_usage_error_and_nothing_is_written(
    pair: Pair, tmp_path: Path, options: dict[str, object], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        api.repair(pair.base, pair.ft, tmp_path / "out", **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=said):
        api.plan(pair.base, pair.ft, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["no", 0, None])
def test_a_flag_is_true_or_false(pair: Pair, tmp_path: Path, flag: object) -> None:
    """`overwrite="no"` would replace a result."""
    out = tmp_path / "out"
    before = api.repair(pair.base, pair.ft, out)
    with pytest.raises(UsageError, match=r"--overwrite is .*, expected True or False"):
        api.repair(pair.base, pair.ft, out, scale=1.5, overwrite=flag)  # type: ignore[arg-type]
    for name in ("deep", "repair"):
        with pytest.raises(UsageError, match=rf"--{name} is .*, expected True or False"):
            api.verify(out, **{name: flag})  # type: ignore[arg-type]
    assert api.repair(pair.base, pair.ft, out) == before


@pytest.mark.parametrize("number", [np.float64(1.5), np.float32(1.5)])
def test_a_scale_may_be_a_number_of_numpys(pair: Pair, tmp_path: Path, number: float) -> None:
    """Of `np.linspace`, say; the journal and the report are JSON, which knows none."""
    assert api.repair(pair.base, pair.ft, tmp_path / "out", scale=number).settings == Settings(scale=1.5)
    assert api.repair(pair.base, pair.ft, tmp_path / "out", scale=1.5).sessions == 1


@pytest.mark.parametrize("path", [None, 3, ["a"]])
def test_what_is_no_path_is_a_usage_error(pair: Pair, tmp_path: Path, path: object) -> None:
    for words in ((path, pair.ft, tmp_path / "out"), (pair.base, path, tmp_path / "out"), (pair.base, pair.ft, path)):
        with pytest.raises(UsageError, match="expected a path"):
            api.repair(*words)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--report is"):
        api.repair(pair.base, pair.ft, tmp_path / "out", report=path or 0)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["", "a\0b", "a\ud800b"])
def test_an_out_without_a_name_is_not_the_current_folder(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for call in (lambda: api.repair(pair.base, pair.ft, path), lambda: api.verify(path)):
        with pytest.raises(UsageError, match=r"OUT is '.*', expected a path"):
            call()
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("options", [{"ram": "nan"}, {"workers": 0}, {"device": "tpu"}])
def test_verify_refuses_what_means_nothing_where_it_would_not_use_it(
    pair: Pair, tmp_path: Path, options: dict[str, object]
) -> None:
    api.repair(pair.base, pair.ft, tmp_path / "out")
    with pytest.raises(UsageError, match=f"--{next(iter(options))}"):
        api.verify(tmp_path / "out", **options)  # type: ignore[arg-type]


def test_sizes_may_have_an_exponent(pair: Pair) -> None:
    assert api.plan(pair.base, pair.ft, ram="1e9").ram_allowed_bytes == 10**9
    assert api.plan(pair.base, pair.ft, ram="2.5E2 MB").ram_allowed_bytes == 250_000_000


def test_plan_takes_what_repair_takes(pair: Pair) -> None:
    named = api.plan(pair.base, pair.ft, ram=np.int64(10**9), out_dtype="float32", scale=2, exclude="v")  # type: ignore[arg-type]
    assert named.settings == Settings(out_dtype="float32", scale=2.0, exclude="v")
    assert named.ram_allowed_bytes == 10**9
    assert {layout.entries["w"].dtype for layout in named.layouts if "w" in layout.entries} == {"F32"}
    assert api.plan(pair.base, pair.ft, settings=named.settings, ram=10**9) == named
    with pytest.raises(UsageError, match=r"settings are \{.*\}, expected streamrepair.Settings"):
        api.plan(pair.base, pair.ft, settings={"scale": 2.0})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="given twice"):
        api.plan(pair.base, pair.ft, settings=Settings(), scale=2.0)


def test_a_gpu_is_planned_for_where_there_is_none(pair: Pair, tmp_path: Path) -> None:
    """With --vram stated nothing of the card is asked; a repair needs it all the same."""
    planned = api.plan(pair.base, pair.ft, device="cuda", vram="24GB", ram="16GB")
    assert (planned.device, planned.vram_allowed_bytes) == ("cuda:0", 24_000_000_000)
    assert planned.vram_projected_bytes is not None
    assert api.plan(pair.base, pair.ft, device="cuda:3", vram="24GB", ram="16GB").device == "cuda:3"
    with pytest.raises(BudgetError, match="--vram"):
        api.plan(pair.base, pair.ft, device="cuda", vram="1MB", ram="16GB")
    with pytest.raises(UsageError, match="this machine has"):
        api.repair(pair.base, pair.ft, tmp_path / "out", device="cuda:99", vram="24GB", ram="16GB")


NO_TORCH = """
import importlib.metadata, os, sys
sys.modules["torch"] = None
from streamrepair import api
import streamrepair.engine.budget as budget
budget._driver_present = lambda: True
for options in ({"device": "cpu"}, {"device": "cuda", "vram": "24GB"}, {"device": "cuda:1", "vram": 24 * 10**9},
                {"device": "cpu, cpu"}):
    print(api.plan(*sys.argv[1:], ram="16GB", **options).device)
for hidden in ("", "-1"):
    os.environ["CUDA_VISIBLE_DEVICES"] = hidden
    print(api.plan(*sys.argv[1:], ram="16GB").device)
os.environ["CUDA_VISIBLE_DEVICES"] = "0"
importlib.metadata.version = lambda name: "2.13.0+cpu"
print(api.plan(*sys.argv[1:], ram="16GB").device)
"""


def test_a_plan_whose_budgets_are_stated_loads_no_torch(pair: Pair) -> None:
    """Nor one for the CPU beside a driver, where no card can be used: 200 MB would not have been projected."""
    words = [sys.executable, "-c", NO_TORCH, str(pair.base), str(pair.ft)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.split(), done.stderr) == (["cpu", "cuda:0", "cuda:1", *["cpu"] * 4], "")


def test_every_exported_name_is_there_and_the_functions_are_the_apis() -> None:
    """`streamrepair.verify` must be the function whichever module was imported first."""
    for name in streamrepair.__all__:
        assert getattr(streamrepair, name) is not None
    assert {"Report", "Settings", "Plan", "UsageError", "InputError", "TensorRecord"} <= set(streamrepair.__all__)
    of_fields = {"Budget", "CheckpointSummary", "ResourceUse", "Settings", "TensorRecord", "Timings"}
    assert of_fields <= set(streamrepair.__all__), "the types of a report's fields"
    assert (streamrepair.plan, streamrepair.repair, streamrepair.verify) == (api.plan, api.repair, api.verify)
    assert Report.__module__ == "streamrepair.report"
    assert Plan.__module__ == "streamrepair.engine.plan"
    with pytest.raises(AttributeError, match="nothing"):
        _ = streamrepair.nothing


def test_importing_the_package_imports_nothing_that_takes_time() -> None:
    code = "import sys, streamrepair.entry; print(sorted({'numpy', 'msgspec', 'cyclopts'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


FEW_FILES = """
import resource, sys, streamrepair
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
print(len(streamrepair.repair(*sys.argv[1:]).tensors))
"""


def test_more_shards_than_files_may_be_open_at_first(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, {f"w{i}": (32, 32) for i in range(40)}, shards=(40, 40))
    words = [sys.executable, "-c", FEW_FILES, str(pair.base), str(pair.ft), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("40\n", "")


class Failing(api.Silent):
    """A watcher that cannot be told of the end."""

    def end(self) -> None:
        raise BrokenPipeError("nobody listens")


def test_a_watcher_that_fails_at_the_end_leaves_nothing_held(pair: Pair, tmp_path: Path) -> None:
    before = {library["filepath"]: library["num_threads"] for library in threadpool_info()}
    opened = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with pytest.raises(BrokenPipeError):
        api.repair(pair.base, pair.ft, tmp_path / "out", watcher=Failing())
    after = {library["filepath"]: library["num_threads"] for library in threadpool_info()}
    assert before.items() <= after.items()
    assert len(os.listdir("/proc/self/fd")) == opened  # noqa: PTH208
    assert api.repair(pair.base, pair.ft, tmp_path / "out").sessions == 1


@pytest.mark.parametrize("listener", [{"watcher": 3}, {"stop": True}])
def test_what_cannot_be_told_or_asked_is_refused_at_once(
    pair: Pair, tmp_path: Path, listener: dict[str, object]
) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(listener))} is .*, expected"):
        api.repair(pair.base, pair.ft, tmp_path / "out", **listener)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
