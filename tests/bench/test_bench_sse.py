from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdrelay.bench import sse
from pdrelay.bench.sse import SseParser
from pdrelay.errors import ProtocolError

LINES = st.lists(
    st.sampled_from(["data: x", "data: é€", "data:y", "data: ", ": ping", "event: e", "id: 1", ""]),
    max_size=12,
)


def slow_events(text: str) -> list[bytes]:
    """The standard, line by line, over the whole text."""
    events, data = [], []
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")[:-1]:
        if line == "":
            if data:
                events.append("\n".join(data).encode())
            data = []
            continue
        name, _, value = line.partition(":")
        if name == "data":
            data.append(value[1:] if value.startswith(" ") else value)
    return events


@given(LINES, st.sampled_from(["\n", "\r\n", "\r"]), st.lists(st.integers(0, 200), max_size=30))
def test_any_split_gives_the_same_events(lines: list[str], end: str, cuts: list[int]) -> None:
    text = "".join(line + end for line in [*lines, "data: last", ""])
    raw = text.encode()
    expected = slow_events(text)
    parser = SseParser()
    got = []
    edges = [0, *sorted(c for c in cuts if c < len(raw)), len(raw)]
    for a, b in pairwise(edges):
        got += parser.feed(raw[a:b])
    got += parser.finish()
    assert got == expected


def test_byte_by_byte_with_multibyte_characters() -> None:
    raw = 'data: {"text":"日本 é"}\r\n\r\ndata: [DONE]\r\n\r\n'.encode()
    parser = SseParser()
    got = [e for i in range(len(raw)) for e in parser.feed(raw[i : i + 1])] + parser.finish()
    assert got == ['{"text":"日本 é"}'.encode(), b"[DONE]"]


def test_events_come_as_soon_as_they_are_complete() -> None:
    parser = SseParser()
    assert parser.feed(b"data: 1\n") == []
    assert parser.feed(b"\ndata: 2\n\ndata: 3") == [b"1", b"2"]
    assert parser.finish() == [b"3"]


def test_error_events_are_told_apart() -> None:
    parser = SseParser()
    parser.feed(b"event: message\ndata: 1\n\n")
    assert parser.error is None
    parser.feed(b'event: error\ndata: {"message": "boom"}\n\n')
    assert parser.error == b'{"message": "boom"}'


def test_an_endless_event_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 100)
    parser = SseParser()
    parser.feed(b"data: " + b"x" * 90)
    with pytest.raises(ProtocolError, match="longer than 100"):
        parser.feed(b"x" * 90)
