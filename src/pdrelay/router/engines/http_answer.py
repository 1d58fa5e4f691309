"""An HTTP/1.1 response from bytes, wherever the reads were split.

As much of RFC 9112 as engines' servers use: a length, chunks, or all until the connection ends; no
compression, which is never asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_MAX_HEAD = 1 << 16  # bytes, of a status line with its fields, and of trailers
_MAX_SIZE_LINE = 1 << 12  # of a chunk, extensions included
_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-5]\d\d)(?: |$)")
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;|$)")
_LENGTH = re.compile(rb"\d{1,18}")


class AnswerParser:
    """Of one response. `status` is 0 until its head is there; `complete` is set at its end."""

    def __init__(self) -> None:
        self.status = 0
        self.complete = False
        self.keep_alive = False  # the connection may carry another request once this is complete
        self._rest = b""
        self._at = 0  # what is before it in `_rest` is done with
        self._left = 0  # bytes of the body or of the chunk
        self._step: Callable[[list[bytes]], bool] = self._head

    def feed(self, data: bytes) -> list[bytes]:
        """The pieces of the body that `data` holds. Raises ValueError for what is not HTTP."""
        self._rest = self._rest[self._at :] + data
        self._at = 0
        pieces: list[bytes] = []
        while not self.complete and self._step(pieces):
            pass
        if self.complete and self._at < len(self._rest):
            self.keep_alive = False  # nothing was asked that this could answer
        return pieces

    def end(self) -> None:
        """The connection ended. Raises ConnectionError where that cuts the response off."""
        if self._step == self._until_end:
            self.complete = True
        if not self.complete:
            raise ConnectionResetError("the connection ended in mid-answer")

    # ---- steps: each consumes what it can and tells whether there is more to do at once

    def _line(self, longest: int) -> bytes | None:
        end = self._rest.find(b"\r\n", self._at)
        if (len(self._rest) if end < 0 else end) - self._at > longest:
            raise ValueError("a line of its answer is too long")
        if end < 0:
            return None
        line = self._rest[self._at : end]
        self._at = end + 2
        return line

    def _head(self, pieces: list[bytes]) -> bool:
        end = self._rest.find(b"\r\n\r\n", self._at)
        if (len(self._rest) if end < 0 else end) - self._at > _MAX_HEAD:
            raise ValueError("the head of its answer is too long")
        if end < 0:
            return False
        first, *lines = self._rest[self._at : end].split(b"\r\n")
        self._at = end + 4
        found = _STATUS.match(first)
        if found is None:
            raise ValueError("its answer is not HTTP/1.1")
        status = int(found[2])
        if status == 101:
            raise ValueError("it switched protocols unasked")
        if status < 200:
            return True  # the real one follows
        fields: dict[bytes, bytes] = {}
        for line in lines:
            name, _, value = line.partition(b":")
            fields[name.lower()] = value.strip()
        self._open(status, fields, is_old=found[1] == b"0")
        return not self.complete

    def _open(self, status: int, fields: dict[bytes, bytes], *, is_old: bool) -> None:
        connection = fields.get(b"connection", b"").lower()
        self.keep_alive = connection == b"keep-alive" if is_old else connection != b"close"
        if fields.get(b"content-encoding", b"identity").lower() != b"identity":
            raise ValueError("its answer is compressed, which was not asked for")
        coding = fields.get(b"transfer-encoding")
        if coding is not None:
            if coding.lower() != b"chunked":
                raise ValueError("its answer has an unknown transfer coding")
            self._step = self._size
        elif status in (204, 304):
            self.complete = True
        elif b"content-length" in fields:
            if not _LENGTH.fullmatch(fields[b"content-length"]):
                raise ValueError("its answer has no valid length")
            self._left = int(fields[b"content-length"])
            self._step, self.complete = self._body, not self._left
        else:
            self._step, self.keep_alive = self._until_end, False
        self.status = status

    def _take(self, pieces: list[bytes]) -> None:
        piece = self._rest[self._at : self._at + self._left]
        if piece:
            pieces.append(piece)
            self._at += len(piece)
            self._left -= len(piece)

    def _body(self, pieces: list[bytes]) -> bool:
        self._take(pieces)
        self.complete = not self._left
        return False

    def _until_end(self, pieces: list[bytes]) -> bool:
        self._left = len(self._rest) - self._at
        self._take(pieces)
        return False

    def _size(self, pieces: list[bytes]) -> bool:
        line = self._line(_MAX_SIZE_LINE)
        if line is None:
            return False
        found = _SIZE.match(line)
        if found is None:
            raise ValueError("a chunk of its answer has no valid size")
        self._left = int(found[1], 16)
        self._step = self._chunk if self._left else self._trailer
        return True

    def _chunk(self, pieces: list[bytes]) -> bool:
        self._take(pieces)
        if self._left or len(self._rest) - self._at < 2:
            return False
        if self._rest[self._at : self._at + 2] != b"\r\n":
            raise ValueError("a chunk of its answer is longer than its size")
        self._at += 2
        self._step = self._size
        return True

    def _trailer(self, pieces: list[bytes]) -> bool:
        line = self._line(_MAX_HEAD)
        self.complete = line == b""
        return bool(line)
