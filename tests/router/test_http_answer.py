"""Responses cut anywhere, whole ones and broken ones."""

from __future__ import annotations

import random

import pytest

from pdrelay.router.engines.http_answer import AnswerParser

BODY = b'data: {"a": 1}\n\n' * 9
LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
TO_THE_END = b"HTTP/1.1 500 Internal Server Error\r\nX-Y: z\r\n\r\n" + BODY


def chunked(*sizes: int, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    out, start = [b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n"], 0
    for size in (*sizes, len(BODY) - sum(sizes)):
        out.append(b"%X%b\r\n%b\r\n" % (size, extension, BODY[start : start + size]))
        start += size
    return b"".join([*out, b"0\r\n", trailer, b"\r\n"])


def parse(data: bytes, rng: random.Random | None = None) -> tuple[AnswerParser, bytes]:
    parser, body = AnswerParser(), b""
    while data:
        cut = len(data) if rng is None else rng.randrange(1, min(len(data), 40) + 1)
        body += b"".join(parser.feed(data[:cut]))
        data = data[cut:]
    return parser, body


@pytest.mark.parametrize(
    "answer",
    [
        LENGTH,
        chunked(1, 7, 20),
        chunked(extension=b' ;q="1"', trailer=b"X-Sum: 5\r\nY: 6\r\n"),
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + LENGTH,
        LENGTH.replace(b"1.1", b"1.0").replace(b"\r\n\r\n", b"\r\nConnection: Keep-Alive\r\n\r\n"),
    ],
)
def test_any_cut_gives_the_same_body(answer: bytes) -> None:
    rng = random.Random(1)
    for _ in range(50):
        parser, body = parse(answer, rng)
        assert body == BODY and parser.status == 200
        assert parser.complete and parser.keep_alive
        parser.end()  # no harm any more


@pytest.mark.parametrize("answer", [LENGTH, chunked(5)])
def test_an_answer_that_is_cut_off_is_not_complete(answer: bytes) -> None:
    for stop in range(len(answer)):
        parser, body = parse(answer[:stop])
        assert not parser.complete and BODY.startswith(body)
        with pytest.raises(ConnectionError):
            parser.end()


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    parser, body = parse(TO_THE_END, random.Random(2))
    assert body == BODY and parser.status == 500 and not parser.complete
    parser.end()
    assert parser.complete and not parser.keep_alive


@pytest.mark.parametrize(
    "answer",
    [
        LENGTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1),
        LENGTH.replace(b"HTTP/1.1", b"HTTP/1.0"),
        LENGTH + b"HTTP/1.1 200 OK\r\n",  # that nobody asked for
    ],
)
def test_such_connections_are_not_used_again(answer: bytes) -> None:
    parser, body = parse(answer)
    assert body == BODY and parser.complete and not parser.keep_alive


def test_answers_without_a_body() -> None:
    for head in (b"204 No Content\r\n", b"304 Not Modified\r\nContent-Length: 7\r\n"):
        parser, body = parse(b"HTTP/1.1 " + head + b"\r\n")
        assert parser.complete and parser.keep_alive and body == b""
    parser, body = parse(b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n")
    assert parser.complete and parser.status == 200


@pytest.mark.parametrize(
    "answer",
    [
        b"\x16\x03\x01\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 999 No\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1_0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000,
        chunked()[:50].replace(b"90\r\n", b"-1\r\n") + b"-1\r\n",
        chunked(3).replace(b"\r\n3\r\n", b"\r\n2\r\n"),
        chunked(3).replace(b"\r\n3\r\n", b"\r\n0x3\r\n"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 5000,
    ],
)
def test_what_is_not_http_is_refused(answer: bytes) -> None:
    with pytest.raises(ValueError, match=r"answer|protocols"):
        parse(answer)
