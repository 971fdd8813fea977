"""The Python API: what the command line does, as typed functions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

from streamrepair.checkpoint.layout import Checkpoint, open_checkpoint
from streamrepair.engine import budget, limits
from streamrepair.engine.fit import gpus_of
from streamrepair.engine.plan import Plan, make_plan
from streamrepair.engine.run import Watcher, execute
from streamrepair.engine.stop import StopRequest
from streamrepair.errors import UsageError
from streamrepair.report import Report, Settings
from streamrepair.units import parse_bytes
from streamrepair.verify import Verified
from streamrepair.verify import verify as verify_folder

Source = str | os.PathLike[str]
Size = int | str


class Silent:
    """A watcher that says nothing."""

    def begin(self, plan: Plan, done_bytes: int) -> None:
        """Say nothing."""

    def advance(self, done_bytes: int) -> None:
        """Say nothing."""

    def warn(self, message: str) -> None:
        """Say nothing; warnings stand in the report."""

    def note(self, message: str) -> None:
        """Say nothing."""

    def end(self) -> None:
        """Say nothing."""


def plan(
    base: Source,
    ft: Source,
    *,
    ram: Size | None = None,
    vram: Size | None = None,
    device: str = "auto",
    workers: int | None = None,
    settings: Settings | None = None,
) -> Plan:
    """Plan a repair from headers alone: reads no weights, writes nothing.

    Args:
        base, ft: a folder, one .safetensors file, an index.json, or a Hub id.
        ram, vram: memory allowed, in bytes or as text such as "16GB"; by default a share of what is free.

    Raises:
        InputError: a checkpoint is malformed, or the two have nothing in common.
        BudgetError: a tensor does not fit the memory even alone.
        UsageError: an option has no meaning.
    """
    settings = settings or Settings()
    _check(settings, workers)
    sides = open_checkpoint(_text(base), side="BASE"), open_checkpoint(_text(ft), side="FT")
    return _planned(*sides, settings, ram=ram, vram=vram, device=device, workers=workers)


def _planned(
    base: Checkpoint,
    ft: Checkpoint,
    settings: Settings,
    *,
    ram: Size | None,
    vram: Size | None,
    device: str,
    workers: int | None,
) -> Plan:
    _check(settings, workers)
    devices = budget.resolve_devices(device)
    ram_bytes = _size(ram) if ram is not None else limits.default_ram_bytes()
    vram_bytes = None
    if gpus := gpus_of(devices):
        vram_bytes = _size(vram) if vram is not None else budget.default_vram_bytes(gpus)
    return make_plan(
        base,
        ft,
        settings,
        devices=devices,
        workers=workers or limits.default_workers(),
        ram_bytes=ram_bytes,
        vram_bytes=vram_bytes,
    )


def repair(
    base: Source,
    ft: Source,
    out: Source,
    *,
    ram: Size | None = None,
    vram: Size | None = None,
    device: str = "auto",
    workers: int | None = None,
    backend: Literal["auto", "full", "gram", "randomized"] = "auto",
    sigma: Literal["median", "tail"] = "median",
    noise_estimate: Literal["exact", "fast"] = "exact",
    scale: float = 1.0,
    include: str | None = None,
    exclude: str | None = None,
    out_dtype: Literal["same", "float32"] = "same",
    on_nonfinite: Literal["refuse", "copy-ft"] = "refuse",
    overwrite: bool = False,
    report: Source | None = None,
    trace: Source | None = None,
    watcher: Watcher | None = None,
    stop: StopRequest | None = None,
) -> Report:
    """Repair a fine-tuned checkpoint against its base and write the result to the folder `out`.

    An interrupted call is continued by the same call. `report` writes a second copy of OUT/streamrepair.json, `trace` a
    timeline that Perfetto opens.

    Raises:
        StreamRepairError: by the tree in `streamrepair.errors`.
    """
    settings = Settings(
        sigma=sigma,
        noise_estimate=noise_estimate,
        scale=scale,
        include=include,
        exclude=exclude,
        out_dtype=out_dtype,
        backend=backend,
        on_nonfinite=on_nonfinite,
    )
    planned = plan(base, ft, ram=ram, vram=vram, device=device, workers=workers, settings=settings)
    return execute(
        planned,
        Path(_text(out)),
        stop=stop or StopRequest(),
        watcher=watcher or Silent(),
        overwrite=overwrite,
        report=None if report is None else Path(_text(report)),
        trace=None if trace is None else Path(_text(trace)),
    )


def verify(
    out: Source,
    *,
    deep: bool = False,
    sample: int = 5,
    repair: bool = False,
    ram: Size | None = None,
    device: str = "auto",
    workers: int | None = None,
    watcher: Watcher | None = None,
    stop: StopRequest | None = None,
) -> Verified:
    """Check that a result is whole: structure, completeness, and the digest of every tensor.

    Args:
        deep: also recompute `sample` tensors in float64 from BASE and FT.
        repair: do damaged tensors again, from BASE and FT, with the settings of the report; what follows is for that.

    Raises:
        DamageError: `out` holds no finished result. Damage to a finished one is returned, not raised.
        UsageError: `sample` is no positive number.
        StreamRepairError: with `repair`, the work failed.
    """
    if sample < 1:
        raise UsageError(f"--sample is {sample}, expected at least 1")
    folder = Path(_text(out))
    found = verify_folder(folder, deep=deep and not repair, sample=sample)
    if not repair:
        return found
    from streamrepair.mend import mend

    def planned(base: Checkpoint, ft: Checkpoint, settings: Settings) -> Plan:
        return _planned(base, ft, settings, ram=ram, vram=None, device=device, workers=workers)

    mended = mend(folder, found, planned, watcher=watcher or Silent(), stop=stop or StopRequest())
    if deep:
        return msgspec.structs.replace(verify_folder(folder, deep=True, sample=sample), mended=mended.mended)
    return mended


def _text(path: Source) -> str:
    return os.fspath(path)


def _size(size: Size) -> int:
    return size if isinstance(size, int) else parse_bytes(size)


def _check(settings: Settings, workers: int | None) -> None:
    if not 0.0 < settings.scale < float("inf"):
        raise UsageError(f"--scale is {settings.scale}, expected a positive number")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers is {workers}, expected at least 1")
