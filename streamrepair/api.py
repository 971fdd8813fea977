"""The Python API: what the command line does, as typed functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from streamrepair.checkpoint.copies import copies
from streamrepair.checkpoint.layout import Checkpoint, open_checkpoint
from streamrepair.checkpoint.sidecars import check_sidecars, sidecars
from streamrepair.decompose.speed import CPU
from streamrepair.engine import address_fit, budget, limits, rates
from streamrepair.engine.fit import gpus_of
from streamrepair.engine.plan import Plan, make_plan
from streamrepair.engine.run import execute
from streamrepair.engine.stop import StopRequest
from streamrepair.engine.watcher import Watcher
from streamrepair.errors import UsageError, shown
from streamrepair.options import Size, Source, check_count, check_flag, output_path, path_text, plain_number, size_bytes
from streamrepair.report import Report, Settings
from streamrepair.verification import Verified
from streamrepair.verification import verify as verify_folder


class Silent:
    """A watcher that says nothing; warnings stand in the report."""

    def begin(self, plan: Plan, done_bytes: int) -> None: ...
    def advance(self, done_bytes: int) -> None: ...
    def warn(self, message: str) -> None: ...
    def note(self, message: str) -> None: ...
    def end(self) -> None: ...


def plan(
    base: Source,
    ft: Source,
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
    settings: Settings | None = None,
) -> Plan:
    """Plan a repair from headers alone: reads no weights, writes nothing.

    Of a Hub id that is not in the cache all weights are downloaded first, here too.

    Args:
        base, ft: a folder, one .safetensors file, an index.json, or a Hub id.
        ram, vram: memory allowed, in bytes or as text such as "16GB"; by default a share of what is free.
        device: with `vram` given, a GPU that this machine need not have.
        settings: in place of `backend` to `on_nonfinite`, as a report has them.

    Raises:
        InputError: a checkpoint is malformed or cannot be fetched, or the two have nothing in common, or a file beside
            FT cannot be read.
        BudgetError: a tensor does not fit the memory even alone.
        UsageError: an option has no meaning.
    """
    named = Settings(
        sigma=sigma, noise_estimate=noise_estimate, scale=plain_number(scale), include=include, exclude=exclude,
        out_dtype=out_dtype, backend=backend, on_nonfinite=on_nonfinite,
    )  # fmt: skip
    if not isinstance(settings, Settings | None):
        raise UsageError(f"settings are {shown(repr(settings))}, expected streamrepair.Settings")
    if settings is not None and named != Settings():
        raise UsageError("settings are given twice, as an object and by name: give one of them")
    resources = _resources(settings or named, ram=ram, vram=vram, device=device, workers=workers, only_plan=True)
    planned = _planned(*_sides(base, ft), settings or named, resources, only_plan=True)
    check_sidecars(planned.ft, sidecars(planned.ft))
    return planned


@dataclass(frozen=True, slots=True)
class _Resources:
    devices: tuple[str, ...]
    workers: int
    workers_given: bool
    ram_bytes: int
    vram_bytes: int | None
    free_of: str | None
    """Whose free memory `ram_bytes` is a share of; None where it was given."""


def _resources(
    settings: Settings,
    *,
    ram: Size | None,
    vram: Size | None,
    device: str,
    workers: int | None,
    only_plan: bool = False,
) -> _Resources:
    """What a run may use; all options are checked before a checkpoint is opened."""
    settings.check()
    if workers is not None:
        check_count("workers", workers)
    ram_bytes = None if ram is None else size_bytes("ram", ram)
    vram_bytes = None if vram is None else size_bytes("vram", vram)
    devices = budget.resolve_devices(device, absent=only_plan and vram_bytes is not None)
    gpus = gpus_of(devices)
    if gpus and vram_bytes is None:
        vram_bytes = budget.default_vram_bytes(gpus)
    return _Resources(
        devices,
        workers or limits.default_workers(),
        workers is not None,
        limits.default_ram_bytes() if ram_bytes is None else ram_bytes,
        vram_bytes if gpus else None,
        limits.whose_is_free() if ram_bytes is None else None,
    )


def _sides(base: Source, ft: Source) -> tuple[Checkpoint, Checkpoint]:
    texts = path_text("BASE", base), path_text("FT", ft)
    return open_checkpoint(texts[0], side="BASE"), open_checkpoint(texts[1], side="FT")


def _planned(
    base: Checkpoint, ft: Checkpoint, settings: Settings, resources: _Resources, *, only_plan: bool = False
) -> Plan:
    found, speeds = None if only_plan else copies(base, ft), rates.load() or CPU

    def made(workers: int) -> Plan:
        return make_plan(
            base,
            ft,
            settings,
            devices=resources.devices,
            workers=workers,
            ram_bytes=resources.ram_bytes,
            vram_bytes=resources.vram_bytes,
            free_of=resources.free_of,
            rates=speeds,
            copies=found,
        )

    planned = made(resources.workers)
    if resources.workers_given or planned.gpus:
        return planned
    workers = address_fit.workers_with_room(planned)
    return planned if workers == planned.workers else made(workers)


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

    An interrupted call is continued by the same call. Relative paths are of the working folder, which is not to change
    meanwhile. Of a Hub id that is not in the cache all weights are downloaded first.

    Args:
        out: must be new, empty, or hold an unfinished run or a result of this same call.
        overwrite: accept other folders, too, unless they hold weights that streamrepair did not write. An earlier
            result is removed, files with a sidecar's name are replaced, others stay; an unfinished run with the same
            settings and inputs is continued.
        workers: at most so many threads on the CPU; fewer where memory or work does not suffice.
        report: gets a second copy of OUT/streamrepair.json. trace: gets a timeline that Perfetto opens.
        watcher: is told how the run goes on, `advance` by several threads; what it raises ends the run.
        stop: ends the run early, like a signal, where `stop.request(reason)` is called; it serves for one run.

    Raises:
        StreamRepairError: by the tree in `streamrepair.errors`.
    """
    settings = Settings(
        sigma=sigma, noise_estimate=noise_estimate, scale=plain_number(scale), include=include, exclude=exclude,
        out_dtype=out_dtype, backend=backend, on_nonfinite=on_nonfinite,
    )  # fmt: skip
    check_flag("overwrite", overwrite)
    watched, stopped = _listeners(watcher, stop)
    out_path = output_path("OUT", out)
    report_path = None if report is None else output_path("--report", report)
    trace_path = None if trace is None else output_path("--trace", trace)
    resources = _resources(settings, ram=ram, vram=vram, device=device, workers=workers)
    planned = _planned(*_sides(base, ft), settings, resources)
    return execute(
        planned,
        out_path,
        stop=stopped,
        watcher=watched,
        overwrite=overwrite,
        report=report_path,
        trace=trace_path,
    )


def _listeners(watcher: Watcher | None, stop: StopRequest | None) -> tuple[Watcher, StopRequest]:
    """Who is told and who may end a run: nobody by default.

    Raises:
        UsageError: something else was given.
    """
    if not isinstance(watcher, Watcher | None):
        raise UsageError(f"watcher is {shown(repr(watcher))}, expected begin, advance, warn, note and end")
    if not isinstance(stop, StopRequest | None):
        raise UsageError(f"stop is {shown(repr(stop))}, expected streamrepair.StopRequest")
    return watcher or Silent(), stop or StopRequest()


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
        sample: how many, spread evenly over the result; without `deep` it does nothing.
        repair: do damaged tensors again, from BASE and FT, with the settings of the report, and copy sidecars again
            that were edited or are gone.
        ram, device, workers, watcher, stop: for `repair`; without it they do nothing.

    Raises:
        DamageError: `out` holds no finished result, or, with `repair`, nothing tells which inputs it was made from.
            Damage to a finished one is returned, not raised.
        InputError: with `deep` or `repair`, BASE or FT is not where the report has it, or has other headers.
        BudgetError: with `deep` or `repair`, there is too little memory for it.
        UsageError: an option has no meaning.
        StreamRepairError: with `repair`, the work failed in another way.
    """
    for name, flag in (("deep", deep), ("repair", repair)):
        check_flag(name, flag)
    watched, stopped = _listeners(watcher, stop)
    check_count("sample", sample)
    if ram is not None:
        size_bytes("ram", ram)
    if workers is not None:
        check_count("workers", workers)
    if device != "auto":
        budget.resolve_devices(device, absent=True)  # what is checked here reads no weights on a card
    folder = output_path("OUT", out)
    found = verify_folder(folder, deep=deep and not repair, sample=sample)
    if not repair:
        return found
    from streamrepair.mend import mend

    def planned(base: Checkpoint, ft: Checkpoint, settings: Settings) -> Plan:
        return _planned(base, ft, settings, _resources(settings, ram=ram, vram=None, device=device, workers=workers))

    mended = mend(folder, found, planned, watcher=watched, stop=stopped)
    if deep:
        return msgspec.structs.replace(verify_folder(folder, deep=True, sample=sample), mended=mended.mended)
    return mended
