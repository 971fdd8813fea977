"""Byte counts and durations as people write them; inside, sizes are ints of bytes and times floats of seconds."""

from __future__ import annotations

import math
import re

from streamrepair.errors import UsageError, shown

_FACTORS = {
    "": 1,
    "B": 1,
    **{f"{p}{b}": 1000**i for i, p in enumerate("KMGTP", 1) for b in ("", "B")},
    **{f"{p}I{b}": 1024**i for i, p in enumerate("KMGTP", 1) for b in ("", "B")},
}
_SIZE = re.compile(r"\s*((?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][0-9]+)?)\s*([A-Za-z]*)\s*\Z")


def parse_bytes(text: str) -> int:
    """Bytes from "24GB" (10⁹), "16GiB" (2³⁰), "500M", "1048576" or "1e9".

    Raises:
        UsageError: the text is no size, it is zero, or no number can hold it.
    """
    match = _SIZE.match(text)
    factor = _FACTORS.get(match[2].upper()) if match else None
    size = float(match[1]) * factor if match and factor else 0.0
    if not 1 <= size < math.inf:
        raise UsageError(
            f"size {shown(repr(text))} is not understood: write it like 24GB (10^9 bytes) or 16GiB (2^30 bytes)"
        )
    return int(size)


def format_bytes(size_bytes: float, *, digits: int = 3) -> str:
    """ "1.23 GB" from 1_230_000_000: decimal units, three significant digits or as many as asked for."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.0f} B" if unit == "B" else f"{value:.{digits}g} {unit}"
        value /= 1000
    return f"{value:.{digits}g} TB"


def whole_mb(size_bytes: float) -> str:
    """ "117MB": rounded up, as --ram and --vram take it."""
    return f"{-(-int(size_bytes) // 1_000_000)}MB"


def format_apart(size_bytes: int, other_bytes: int) -> tuple[str, str]:
    """Two sizes that differ, with as many digits as show it: "117.2 MB" and "117.0 MB" are both 117 MB."""
    for digits in range(3, 17):
        texts = format_bytes(size_bytes, digits=digits), format_bytes(other_bytes, digits=digits)
        if texts[0] != texts[1]:
            break
    return texts


def format_seconds(seconds: float) -> str:
    """ "<0.001 s", "0.42 s", "12.3 s", "4 min 05 s", "2 h 07 min"."""
    if 0 < seconds < 0.001:
        return "<0.001 s"
    if seconds < 60:
        return f"{seconds:.3g} s" if seconds >= 0.0995 else f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def counted(number: int, noun: str) -> str:
    """ "1 shard", "3 shards"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
