"""The plain way to repair a checkpoint: everything in memory, one full SVD per matrix; streamrepair is held against it.

    python bench/in_memory.py BASE FT OUT

Works as published implementations do: both checkpoints and all results are held at once, deltas are float32, every
2-D tensor of at least 1024 values goes through torch.linalg.svd. Unlike them it uses the exact Marchenko–Pastur median
and rounds W_base + Δ* once, so that its results can be compared with streamrepair's value by value.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from streamrepair.spectral import marchenko_pastur
from streamrepair.spectral.threshold import omega

MIN_VALUES = 1024
REPORT_NAME = "in_memory.json"


def sigma_and_tau(s: torch.Tensor, m: int, n: int) -> tuple[float, float]:
    """σ̂ and τ from all singular values of an m × n matrix, with the lower median."""
    beta = min(m, n) / max(m, n)
    s_median = float(torch.median(s))  # torch takes the lower one of the two in the middle
    sigma_hat = s_median / math.sqrt(marchenko_pastur.median(beta))
    return sigma_hat, omega(beta) * sigma_hat


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no .safetensors file")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def repair(W_base: torch.Tensor, W_ft: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """The repaired tensor and its record; FT's own tensor where there is nothing to repair."""
    if W_base.shape != W_ft.shape or W_ft.ndim != 2 or W_ft.numel() < MIN_VALUES:
        return W_ft, {"action": "kept_ft"}
    start = time.perf_counter()
    delta = W_ft.float() - W_base.float()
    if not delta.any():
        return W_ft, {"action": "copied"}
    m, n = delta.shape
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    sigma_hat, tau = sigma_and_tau(s, m, n)
    kept = torch.where(s > tau, s, torch.zeros_like(s))
    delta_out = (u * kept) @ vh
    record = {
        "action": "repaired",
        "shape": [m, n],
        "rank_total": len(s),
        "rank_kept": int((s > tau).sum()),
        "sigma_hat": sigma_hat,
        "threshold": tau,
        "frob_delta_in": float(delta.norm()),
        "frob_delta_out": float(delta_out.norm()),
    }
    W_out = (W_base.float() + delta_out).to(W_ft.dtype)
    return W_out, record | {"seconds": time.perf_counter() - start}


def repair_checkpoint(base: Path, ft: Path, out: Path) -> dict[str, Any]:
    """Repairs FT against BASE into the folder OUT and returns the report, which is written there too."""
    start = time.perf_counter()
    base_tensors, ft_tensors = load(base), load(ft)
    loaded = time.perf_counter()
    results: dict[str, torch.Tensor] = {}
    records: dict[str, dict[str, Any]] = {}
    for name, W_ft in ft_tensors.items():
        results[name], records[name] = repair(base_tensors.get(name, W_ft), W_ft)
    repaired = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    save_file(results, out / "model.safetensors", metadata={"format": "pt"})
    for file in ft.iterdir():
        if file.suffix in (".json", ".jinja", ".txt", ".model") and not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)
    written = time.perf_counter()
    timings = {"load_s": loaded - start, "repair_s": repaired - loaded, "write_s": written - repaired}
    report = {"timings": timings | {"wall_s": written - start}, "tensors": records}
    (out / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n")
    return report


def main() -> int:
    """Repairs and prints the rank and time of every matrix."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("base", "ft", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--threads", type=int, help="of torch; its own choice if not given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here too")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    report = repair_checkpoint(arguments.base, arguments.ft, arguments.out)
    for name, record in report["tensors"].items():
        if record["action"] == "repaired":
            ranks = f"{record['rank_kept']:>6} of {record['rank_total']:<6}"
            print(f"{ranks} tau {record['threshold']:<10.4g} {record['seconds']:8.2f} s  {name}")
    print("  ".join(f"{key} {value:.2f}" for key, value in report["timings"].items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
