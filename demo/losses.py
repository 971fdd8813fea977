"""Measures checkpoints of the demonstration pair on held-out text of both kinds: `losses.py [LABEL=]DIR …`.

The held-out text lies beside this file and does not depend on the Python that runs it. Each kind is cut into windows of
128 tokens by the checkpoint's own tokenizer; the loss is the mean over all predicted tokens, in float32. Given a
checkpoint labelled base and one labelled ft, every further one is summed up in a sentence:

    forgetting = loss(ft) − loss(base) on code       recovered = the share of that which a repair wins back
    gain       = loss(base) − loss(ft) on prose      kept      = the share of that which a repair still has

The exit status is 1 when a checkpoint lacks a tensor of its model or holds one too many. How the pair was trained is in
`make_pair.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

WINDOW_TOKENS = 128
HELD_OUT = Path(__file__).parent / "heldout"
KINDS = ("code", "prose")


@dataclass(frozen=True, slots=True)
class Score:
    """One checkpoint on the held-out text.

    Attributes:
        nats: mean loss in nats per predicted token, for each kind.
        bits_per_byte: the same loss per byte of text, for each kind.
        wrong_keys: tensors missing, unexpected or of another shape than the model's; empty for a sound checkpoint.
    """

    nats: dict[str, float]
    bits_per_byte: dict[str, float]
    wrong_keys: list[str]


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a repair does to a fine-tune, as shares; NaN-free because it exists only where ft forgot and gained."""

    recovered: float
    kept: float


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """The float32 model and tokenizer in `folder`, and the tensors that did not match."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = [
        f"{what.removesuffix('_keys')} {key}"
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for key in sorted(map(str, info[what]))
    ]
    return model.eval(), AutoTokenizer.from_pretrained(folder), wrong


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Mean next-token loss in nats over the whole windows of `ids`, int64 (tokens,); a last part is left out."""
    windows = ids[: len(ids) // WINDOW_TOKENS * WINDOW_TOKENS].view(-1, WINDOW_TOKENS)
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in windows.split(32)]
    return sum(losses) / len(windows)


def score(folder: Path) -> Score:
    """Loads `folder` and measures it on every kind of text."""
    model, tokenizer, wrong = load(folder)
    nats, bits_per_byte = {}, {}
    for kind in KINDS:
        text = (HELD_OUT / f"{kind}.txt").read_text(encoding="utf-8")
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
        nats[kind] = mean_loss(model, ids)
        bits_per_byte[kind] = nats[kind] * len(ids) / len(text.encode()) / math.log(2)
    return Score(nats, bits_per_byte, wrong)


def recovery(base: Score, ft: Score, repaired: Score) -> Recovery | None:
    """What `repaired` wins back and keeps; None unless ft is worse than base on code and better on prose."""
    forgetting = ft.nats["code"] - base.nats["code"]
    gain = base.nats["prose"] - ft.nats["prose"]
    if forgetting <= 0 or gain <= 0:
        return None
    return Recovery(
        recovered=(ft.nats["code"] - repaired.nats["code"]) / forgetting,
        kept=(base.nats["prose"] - repaired.nats["prose"]) / gain,
    )


def table(scores: dict[str, Score]) -> str:
    """The losses, one row a checkpoint."""
    width = max(10, *map(len, scores))
    head = [f"{'':{width}}  {'code':>18}  {'prose':>18}   tensors", f"{'':{width}}" + "  nats/token bits/B" * 2]
    rows = [
        f"{label:{width}}"
        + "".join(f"  {one.nats[kind]:10.4f}  {one.bits_per_byte[kind]:6.3f}" for kind in KINDS)
        + f"   {len(one.wrong_keys)} wrong" * bool(one.wrong_keys)
        + "   all there" * (not one.wrong_keys)
        for label, one in scores.items()
    ]
    return "\n".join([*head, *rows])


def sentences(scores: dict[str, Score], recoveries: dict[str, Recovery | None]) -> list[str]:
    """What the table shows, one sentence for each repaired checkpoint."""
    said = []
    for label, found in recoveries.items():
        if found is None:
            said.append(f"{label}: ft has not forgotten code and gained on prose, so there is nothing to repair.")
            continue
        forgetting = scores["ft"].nats["code"] - scores["base"].nats["code"]
        said.append(
            f"Fine-tuning cost {forgetting:.3f} nats/token on code (forgetting); {label} recovered "
            f"{found.recovered:.0%} of that and kept {found.kept:.0%} of the gain on prose."
        )
    return said


def labelled(text: str) -> tuple[str, Path]:
    """Label and folder from "LABEL=DIR", or from "DIR", whose own name is then the label."""
    label, equals, folder = text.partition("=")
    path = Path(folder if equals else text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"no such folder: {path}")
    return label if equals else path.resolve().name, path


def main() -> int:
    parser = argparse.ArgumentParser(description="Losses of checkpoints on held-out code and prose.")
    parser.add_argument("checkpoints", nargs="+", type=labelled, metavar="[LABEL=]DIR")
    parser.add_argument("--json", action="store_true", help="write one JSON object to standard output instead")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    scores = {label: score(folder) for label, folder in arguments.checkpoints}
    repairs = [label for label in scores if label not in ("base", "ft")] if {"base", "ft"} <= scores.keys() else []
    recoveries = {label: recovery(scores["base"], scores["ft"], scores[label]) for label in repairs}
    if arguments.json:
        found = {label: asdict(one) if one else None for label, one in recoveries.items()}
        print(
            json.dumps({"scores": {label: asdict(one) for label, one in scores.items()}, "recovery": found}, indent=1)
        )
    else:
        print(table(scores), *sentences(scores, recoveries), sep="\n")
    wrong = [f"{label}: {key}" for label, one in scores.items() for key in one.wrong_keys]
    print(*wrong, sep="\n", end="\n" * bool(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
