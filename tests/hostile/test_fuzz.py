"""Mutated headers and indices: refused in one printable line, or read as an independent reader reads them.

A kept corpus is mutated at the level of JSON's tokens, where a byte more or less seldom gets past the first check. The
suite tries 1,200 mutants; `FUZZ_EXAMPLES=200000 pytest tests/hostile/test_fuzz.py` goes on for as long as
wanted. What it finds belongs into the corpus, from where every later run begins.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from streamrepair.checkpoint import layout
from streamrepair.checkpoint.headers import read_header
from streamrepair.errors import InputError

CORPUS = Path(__file__).parent / "corpus"
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "600"))

_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9]+|[A-Za-z]+|\s|.', re.DOTALL)
_WORDS = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b" ", b"\\", b"0", b"1", b"-1", b"1e3", b"0.0", b"4", b"8", b"00",
    b"9223372036854775807", b"9223372036854775808", b"18446744073709551615", b"4294967296", b"true", b"null", b"NaN",
    b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b'"weight_map"', b'"metadata"', b'"F32"', b'"U8"',
    b'"F4"', b'"a"', b'"\\u0061"', b'"\\ud800"', b'"\\ud83d\\ude00"', b'"\\u0000"', b'""', b'"model.safetensors"',
    b'"../x.safetensors"', b"\xff", b"\x00", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"[" * 2000, b'{"a":' * 2000,
]  # fmt: skip

Change = tuple[float, str, int]
Read = TypeVar("Read")


def _mutant(content: bytes, changes: list[Change]) -> bytes:
    """Tokens deleted, doubled, swapped with their next, or replaced by, or preceded by, a word of the dictionary."""
    tokens = _TOKEN.findall(content)
    for place, kind, word in changes:
        if not tokens:
            break
        at = int(place * len(tokens))
        match kind:
            case "delete":
                del tokens[at]
            case "double":
                tokens.insert(at, tokens[at])
            case "swap":
                tokens[at : at + 2] = tokens[at : at + 2][::-1]
            case "replace":
                tokens[at] = _WORDS[word]
            case "insert":
                tokens.insert(at, _WORDS[word])
            case _:  # a stretch copied elsewhere: a member, an entry, a brace too many
                tokens[at:at] = tokens[at // 2 : at // 2 + word]
    return b"".join(tokens)


_CHANGES = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["delete", "double", "swap", "replace", "insert", "copy"]),
        st.integers(0, len(_WORDS) - 1),
    ),
    max_size=4,
)


def _seeds(kind: str) -> list[Path]:
    found = sorted((CORPUS / kind).iterdir())
    assert found
    return found


def _fuzzed(kind: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
        drawn = given(seed=st.sampled_from(_seeds(kind)), changes=_CHANGES, more=st.integers(-2, 9))
        return settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=checks)(drawn(test))

    return decorate


@pytest.mark.timeout(0 if EXAMPLES > 10_000 else 300)
@_fuzzed("header")
def test_headers(tmp_path: Path, seed: Path, changes: list[Change], more: int) -> None:
    """What we accept the safetensors library accepts, with the same tensors; a corpus file is its header's JSON."""
    header = _mutant(seed.read_bytes(), changes)
    numbers = [int(n) for n in re.findall(rb"[0-9]{1,4}(?=\s*\])", header)]
    data_bytes = max(0, max(numbers, default=0) + (more if more < 0 else 0)) % 5000
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(data_bytes))
    found = _read_or_refused(read_header, path)
    if found is None:
        return
    try:
        with safe_open(path, framework="np") as file:
            assert [t.name for t in found.tensors] == file.offset_keys()
            assert [list(t.shape) for t in found.tensors] == [file.get_slice(n).get_shape() for n in file.offset_keys()]
            assert dict(found.metadata) == (file.metadata() or {})
    except SafetensorError as error:
        pytest.fail(f"the library refuses what we accept ({error}): {header[:500]!r}")


@pytest.mark.timeout(0 if EXAMPLES > 10_000 else 300)
@_fuzzed("index")
def test_indices(tmp_path: Path, seed: Path, changes: list[Change], more: int) -> None:
    """An index is accepted if and only if Python's JSON reader and the rules of the format accept it."""
    content = _mutant(seed.read_bytes(), changes)
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content)
    assert _read_or_refused(layout._read_index, path) == _reference(content), content[:500]


def _read_or_refused(read: Callable[[Path], Read], path: Path) -> Read | None:
    """What is read; None where it is refused, in one printable line of bounded length."""
    message = ""
    try:
        return read(path)
    except InputError as error:
        message = str(error)
    assert message.isprintable()
    assert len(message) < 2000
    return None


def _reference(content: bytes) -> tuple[object, object] | None:
    """Metadata and weight map, or None for what is to be refused."""
    try:
        index = json.loads(content.decode("utf-8").strip(" \t\r\n"), parse_constant=_refuse)
        outer = json.loads(content.decode("utf-8"), object_pairs_hook=lambda pairs: pairs)
    except (ValueError, RecursionError):
        return None
    try:
        json.dumps(index, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return None
    # Keys twice are refused in the index itself and in its weight map, which decide; not deep inside metadata.
    if not isinstance(index, dict) or len({key for key, _ in outer}) != len(outer):
        return None
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict | None):
        return None
    pairs = next(value for key, value in outer if key == "weight_map")
    names = [*index, *weight_map, *weight_map.values()]
    if len({key for key, _ in pairs}) != len(pairs) or not all(map(_is_text, names)):
        return None
    return (metadata or {}, weight_map) if all(map(_is_plain, weight_map.values())) else None


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _is_plain(name: str) -> bool:
    return bool(re.fullmatch(r"[^/\\:.][^/\\:]*\.safetensors", name)) and name.isprintable()


def _refuse(constant: str) -> object:
    raise ValueError(constant)
