"""Makes the demonstration pair: a tiny Llama trained on Python code (base) and fine-tuned, every weight, on prose (ft).

Every text comes from the Python that runs this: source files of the standard library with docstrings and comments taken
out (code), and docstrings and the `pydoc` help topics (prose). Files that carry a copyright or licence notice of their
own are skipped, so what is left is under the licence of Python itself. One file in sixteen is held out; an excerpt of
the held-out texts is written beside the pair, for `losses.py`, which measures what this file makes.

Training runs on one CPU thread with fixed seeds: the same Python, torch and processor make the same pair. Nothing is
added to the weights to suit the repair; what lies between ft and base is what Adam left there.
"""

from __future__ import annotations

import argparse
import ast
import math
import re
import shutil
import sysconfig
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT_TOKENS = 128
VOCABULARY = 512
END = "<|endoftext|>"
HELD_OUT_CHARACTERS = 40_000
BASE_SHARD_BYTES = 100_000_000
FT_SHARD_BYTES = 800_000
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
NOTICE = re.compile(r"copyright|licen[cs]e", re.IGNORECASE)
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}" + END + "{% endfor %}"


@dataclass(frozen=True, slots=True)
class Phase:
    """One training run.

    Attributes:
        seed: of the batches drawn.
        steps: number of updates.
        batch: windows of CONTEXT_TOKENS tokens per update.
        lr: highest learning rate of AdamW, reached after 50 steps.
        lr_end: learning rate of the last step; a cosine leads there, equal to `lr` it stays constant.
        decay: AdamW's weight decay.
    """

    seed: int
    steps: int
    batch: int
    lr: float
    lr_end: float
    decay: float


@dataclass(frozen=True, slots=True)
class Texts:
    """Documents of one kind, split by the file they come from."""

    train: list[str]
    held_out: list[str]


BASE_PHASE = Phase(seed=1, steps=1200, batch=16, lr=3e-3, lr_end=2e-4, decay=0.1)
FT_PHASE = Phase(seed=2, steps=400, batch=4, lr=1e-3, lr_end=1e-3, decay=0.0)


def stdlib_sources() -> Iterator[tuple[str, ast.Module]]:
    """Name and syntax tree of every standard-library file under Python's own licence, in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.intersection(parts) or parts[0].startswith(SKIPPED_PREFIXES):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        if not NOTICE.search(source):
            yield "/".join(parts), ast.parse(source)


def is_held_out(name: str) -> bool:
    """One name in sixteen, by its checksum and so the same on every machine."""
    return zlib.crc32(name.encode()) % 16 == 0


def take_docstrings(tree: ast.Module) -> list[str]:
    """Cuts the docstrings out of `tree`, in place, and gives them back."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is not None:
            found.append(docstring)
            node.body = node.body[1:] or [ast.Pass()]
    return found


def prose_paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of running English in `text`, each on one line: no examples, grammar, tables or signatures."""
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        letters = sum(c.isalpha() or c == " " for c in paragraph)
        if (
            len(paragraph.split()) >= 8
            and paragraph[0].isupper()
            and paragraph[-1] in ".:"
            and letters >= 0.9 * len(paragraph)
            and ">>>" not in paragraph
        ):
            yield paragraph


def collect() -> tuple[Texts, Texts]:
    """All code and all prose; no paragraph of the held-out prose occurs in the training prose."""
    code, prose = Texts([], []), Texts([], [])
    documents = [(f"topics/{name}", text) for name, text in sorted(topics.items())]
    for name, tree in stdlib_sources():
        documents += [(name, docstring) for docstring in take_docstrings(tree)]
        (code.held_out if is_held_out(name) else code.train).append(ast.unparse(tree))
    for name, text in documents:
        (prose.held_out if is_held_out(name) else prose.train).extend(prose_paragraphs(text))
    train = list(dict.fromkeys(prose.train))
    held_out = [paragraph for paragraph in dict.fromkeys(prose.held_out) if paragraph not in set(train)]
    return code, Texts(train, held_out)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCABULARY entries, with a chat template so that there is one to copy."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=END, eos_token=END, model_max_length=CONTEXT_TOKENS
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tokens(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """All documents, each closed by END, as one int64 vector."""
    encoded = tokenizer([document + END for document in documents], add_special_tokens=False, verbose=False)
    return torch.tensor([token for ids in encoded["input_ids"] for token in ids])


def new_model() -> LlamaForCausalLM:
    """An untrained float32 Llama of 0.92 million parameters: 4 layers, half as many KV heads as heads, untied head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def learning_rate(phase: Phase, step: int) -> float:
    """Linear for 50 steps, then a cosine from `lr` to `lr_end`."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / phase.steps))
    return min(1.0, (step + 1) / 50) * (phase.lr_end + (phase.lr - phase.lr_end) * cosine)


def train(model: LlamaForCausalLM, data: torch.Tensor, phase: Phase, *, label: str) -> None:
    """Next-token training of every weight of `model`, in place and in float32, on random windows of `data`."""
    generator = torch.Generator().manual_seed(phase.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.lr, betas=(0.9, 0.95), weight_decay=phase.decay)
    model.train()
    for step in range(phase.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(phase, step)
        starts = torch.randint(len(data) - CONTEXT_TOKENS, (phase.batch, 1), generator=generator)
        windows = data[starts + torch.arange(CONTEXT_TOKENS)]
        loss = model(input_ids=windows, labels=windows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == phase.steps - 1:
            print(f"{label} step {step:5d}  loss {loss.item():.3f}", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, *, shard_bytes: int) -> None:
    """Writes `model` to `folder` in bfloat16, and leaves in memory the float32 values of what was written."""
    shutil.rmtree(folder, ignore_errors=True)
    model.bfloat16().save_pretrained(folder, max_shard_size=shard_bytes)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"  # transformers 5 writes a class name that 4 does not know
    settings.write_text(settings.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))
    model.float()


def excerpt(documents: list[str]) -> str:
    """The beginnings of `documents`, whole lines of at most 4,000 characters each, to HELD_OUT_CHARACTERS in all."""
    chosen: list[str] = []
    for document in sorted(documents, key=lambda text: zlib.crc32(text.encode())):
        start = document if len(document) <= 4000 else document[:4000].rpartition("\n")[0]
        if sum(map(len, chosen)) + len(start) <= HELD_OUT_CHARACTERS:
            chosen.append(start)
    return "\n\n".join(chosen) + "\n"


def write_held_out(folder: Path, kinds: dict[str, Texts]) -> None:
    """The excerpts of the held-out texts, and the licence they are under."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, texts in kinds.items():
        (folder / f"{kind}.txt").write_text(excerpt(texts.held_out), encoding="utf-8")
    licence = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    if licence.is_file():  # some distributions keep it elsewhere
        shutil.copyfile(licence, folder / "LICENSE-Python.txt")


def make(folder: Path) -> None:
    """Trains, fine-tunes and writes `folder`/pair/{base,ft} and `folder`/heldout."""
    torch.set_num_threads(1)  # another number of threads adds in another order, and makes another pair
    started = time.monotonic()
    code, prose = collect()
    tokenizer = train_tokenizer([*code.train, *prose.train])
    model = new_model()
    train(model, tokens(tokenizer, code.train), BASE_PHASE, label="base")
    save(model, tokenizer, folder / "pair" / "base", shard_bytes=BASE_SHARD_BYTES)
    train(model, tokens(tokenizer, prose.train), FT_PHASE, label="ft")
    save(model, tokenizer, folder / "pair" / "ft", shard_bytes=FT_SHARD_BYTES)
    write_held_out(folder / "heldout", {"code": code, "prose": prose})
    print(f"made in {time.monotonic() - started:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the demonstration pair: about ten minutes on one CPU core.")
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here, help="folder for pair/ and heldout/ (default: %(default)s)")
    make(parser.parse_args().out)


if __name__ == "__main__":
    main()
