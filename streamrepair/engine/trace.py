"""A run's timeline as a trace in Chrome's format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Source: "Trace Event Format" (Google): a JSON object with `traceEvents`; complete events ("X") with microseconds, and
metadata events ("M") that name the tracks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from streamrepair.engine.timeline import LENT, Timeline

_PROCESS = 1


def chrome_trace(timeline: Timeline, lanes: list[str]) -> bytes:
    """The trace as JSON: tracks for each lane, its reader, what it does for others; for commits and reading ahead."""
    tracks = [track for lane in lanes for track in (lane, f"{lane} reader", lane + LENT)]
    tracks += sorted({span.track for span in timeline.spans} - set(tracks))
    number = {track: i for i, track in enumerate(tracks, 1)}
    # One by one: a run of many small tensors has millions of events, and as objects they are several times as large.
    text, encoder = bytearray(b'{"displayTimeUnit":"ms","traceEvents":['), msgspec.json.Encoder()
    for event in _events(timeline, number):
        encoder.encode_into(event, text, -1)
        text += b","
    text[-1:] = b"]}"
    return bytes(text)


def _events(timeline: Timeline, number: Mapping[str, int]) -> Iterator[dict[str, object]]:
    yield _named("process_name", 0, "streamrepair")
    for track, i in number.items():
        yield _named("thread_name", i, track)
        yield {"name": "thread_sort_index", "ph": "M", "pid": _PROCESS, "tid": i, "args": {"sort_index": i}}
    # A span that encloses others comes before them: some readers nest by order where starts are equal.
    for span in sorted(timeline.spans, key=lambda span: (span.start_s, -span.end_s)):
        start_us = round(span.start_s * 1e6, 3)
        yield {
            "name": span.name,
            "cat": span.kind,
            "ph": "X",
            "ts": start_us,
            "dur": max(0.0, round(span.end_s * 1e6 - start_us, 3)),
            "pid": _PROCESS,
            "tid": number[span.track],
        }


def _named(what: str, track: int, name: str) -> dict[str, object]:
    return {"name": what, "ph": "M", "pid": _PROCESS, "tid": track, "args": {"name": name}}
