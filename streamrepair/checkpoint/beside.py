"""Which files beside the weights loading may need, by their names: what `sidecars` copies and `hub` fetches.

Pure: names in, decisions out. No name that means a pickle is among them.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

_SUFFIXES = (
    ".json",
    ".jinja",
    ".txt",
    ".model",
    ".py",
    ".tiktoken",
    ".spm",
    ".bpe",
    ".codes",
    ".vocab",
    ".merges",
    ".tokenizer",
    ".yaml",
    ".yml",
    ".cpp",
    ".cu",
)
_PATTERNS = (*(f"*{suffix}" for suffix in _SUFFIXES), "*vocab*.tsv", "*.model.v[0-9]*")
"""Other tables are data that models are trained on. The last is Mistral's: tokenizer.model.v3, tokenizer.model.v7m1."""
_NAMES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")  # USE_POLICY.md is a part of Llama's licence
_LEFT_OUT = re.compile(
    r"(\.safetensors\.index(\.[\w-]+)?\.json|(pytorch_model|tf_model|flax_model).*\.index(\.[\w-]+)?\.json"
    r"|streamrepair\.json|dghard_repair\.json|trainer_state\.json|adapter_config\.json|.*results\.json)\Z"
)
_NEVER_NEEDED = re.compile(
    # Weights in other formats and what training keeps; documentation and pictures; logs. Other .bin files are parts of
    # their own (a projector, a language model), and so are those of folders.
    r"(\A/((diffusion_)?pytorch_model|adapter_model|model|optimizer|scheduler|training_args)[^/]*\.bin"
    r"|\A/adapter_model\.safetensors"
    r"|\.(pt|pth|ckpt|h5|msgpack|ot|gguf|ggml|onnx|mlmodel|distcp|md|rst|pdf|png|jpe?g|gif|svg|webp|log|out|err|sh|lock)"
    r"|tfevents\..*|/latest)\Z",
    re.IGNORECASE,
)
_TOKENIZER = re.compile(
    r"(tokenizer\.json|tokenizer_config\.json|tekken\.json|vocab\.\w+|merges\.txt|.*\.(model|tiktoken|spm)(\.v\w+)?)\Z"
)


def is_wanted(name: str) -> bool:
    """Whether a file of this name is carried along."""
    if _LEFT_OUT.search(name):
        return False
    return any(fnmatchcase(name, pattern) for pattern in _PATTERNS) or name.upper().startswith(_NAMES)


def is_missed(path: str) -> bool:
    """Whether a person should be told that a file is not carried along, as nothing says what it is for.

    Args:
        path: relative to the checkpoint's folder. Weights there are the run's own or strays, and told of as such.
    """
    name = path.rpartition("/")[2]
    own = name == path and name.endswith(".safetensors")
    return not (own or is_wanted(name) or _LEFT_OUT.search(name) or _NEVER_NEEDED.search(f"/{path}"))


def hub_patterns() -> list[str]:
    """The same for the Hub's client: patterns of names to fetch."""
    return [*_PATTERNS, *(f"{name}*" for name in _NAMES)]


def kind_of(path: str) -> str | None:
    """What a file of the checkpoint's own folder is without which no model is loaded: its configuration, tokenizer."""
    if path == "config.json":
        return "config.json"
    return "tokenizer" if _TOKENIZER.match(path) and "/" not in path else None
