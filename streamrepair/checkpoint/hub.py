"""Checkpoints of the Hugging Face Hub: which names mean one, and its snapshot in the local cache."""

from __future__ import annotations

import re
from pathlib import Path

from streamrepair.checkpoint.beside import hub_patterns
from streamrepair.errors import InputError, shown

# No part begins with a dot: "../model" is a path that does not exist, not a question for the Hub.
_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_LONGEST_WHY = 600  # the client says first what it did, then what was wrong


def is_id(given: str) -> bool:
    """Whether a name that is no local path may be a repository: name/repo or name/repo@revision."""
    return _ID.fullmatch(given) is not None


def fetched(given: str) -> Path:
    """The snapshot of a repository, safetensors and sidecars only, from the local cache where it is complete.

    Raises:
        InputError: it cannot be fetched.
    """
    parts = _ID.fullmatch(given)
    assert parts is not None
    try:
        from huggingface_hub import snapshot_download

        # fnmatch's * crosses "/": the second list keeps the shards of subfolders (original/, onnx/) out.
        patterns, unwanted = ["*.safetensors", *hub_patterns()], ["*/*.safetensors"]
        return Path(
            snapshot_download(
                parts["repo"], revision=parts["revision"], allow_patterns=patterns, ignore_patterns=unwanted
            )
        )
    except Exception as error:  # the client's tree of errors is open-ended: HTTP, validation, offline, disk
        why = shown(" ".join(f"{type(error).__name__}: {error}".split()), longest=_LONGEST_WHY)
        raise InputError(
            f"{given} is neither a local path nor a Hub model that can be fetched ({why}): check its spelling, the "
            "network, and for a private or gated model your login (hf auth login); or download it and name the folder"
        ) from error
