"""Whether transformers loads what a repair of a real architecture's pair wrote, without a word of complaint.

    python bench/loads.py [--arch llama-135m] [--name loads-llama-135m]

FT is sharded, BASE is not. Recorded are the keys that transformers finds missing, unexpected or mismatched, all that it
and Python say at the level of warnings while loading, and whether a forward pass is finite.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import ARCHITECTURES, architecture
from machine import REPOSITORY, machine_record
from make_pair import make_pair

import streamrepair


class Listener(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one message."""
        self.said.append(record.getMessage())


def load(folder: Path) -> dict[str, Any]:
    """What there is to say about loading a folder."""
    listener = Listener()
    transformers.utils.logging.get_logger("transformers").addHandler(listener)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, dtype="auto"
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        logits = model(torch.tensor([tokenizer.encode("hello world")])).logits
    return {
        "keys": {key: sorted(map(str, found)) for key, found in loading.items() if found},
        "logged": listener.said,
        "warned": [str(warning.message) for warning in caught],
        "dtype": str(model.dtype),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "forward_finite": bool(torch.isfinite(logits).all()),
    }


def main() -> int:
    """Make a pair, repair it, load it, and write bench/results/NAME.json; 1 if anything was said."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="llama-135m")
    parser.add_argument("--name")
    arguments = parser.parse_args()
    name = arguments.name or f"loads-{arguments.arch}"
    with tempfile.TemporaryDirectory() as text:
        work = Path(text)
        make_pair(
            architecture(arguments.arch), work, spectrum="heavy", dtype="bf16",
            max_shard_bytes=10**10, ft_max_shard_bytes=10**8,
        )  # fmt: skip
        report = streamrepair.repair(work / "base", work / "ft", work / "out")
        record = {
            "name": name,
            "machine": machine_record(),
            "shards": len(report.headers),
            "tensors": len(report.tensors),
            "transformers": transformers.__version__,
            "loaded": load(work / "out"),
        }
    path = REPOSITORY / "bench" / "results" / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["loaded"], indent=1))
    loaded = record["loaded"]
    return 0 if not (loaded["keys"] or loaded["logged"] or loaded["warned"]) and loaded["forward_finite"] else 1


if __name__ == "__main__":
    sys.exit(main())
