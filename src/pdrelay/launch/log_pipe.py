"""Output of one rank: prefixed lines to a sink, and the last ones kept for error messages."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable

_READ_BYTES = 1 << 16
_MAX_LINE_BYTES = 1 << 13
_TAIL_LINES = 400  # an engine prints its cause long before its end
_MAX_CLOSING_READS = 64


class LogPipe:
    """Reads a pipe's non-blocking read end on the event loop until its end or `close`.

    `sink` gets each complete line without its newline, decoded with replacement; longer lines
    than 8 KiB are cut.
    """

    def __init__(self, fd: int, sink: Callable[[str], None]) -> None:
        self._fd: int | None = fd
        self._sink = sink
        self._partial = bytearray()
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        os.set_blocking(fd, False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(fd, self._readable)

    def _readable(self) -> None:
        if self._read_once() == 0:
            self.close()

    def _read_once(self) -> int:
        """Bytes read; 0 at the end of file, -1 when nothing is there now."""
        assert self._fd is not None
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return -1
        self._partial += data
        *lines, rest = self._partial.split(b"\n")
        if len(rest) > _MAX_LINE_BYTES:
            lines.append(rest)
            rest = bytearray()
        self._partial = bytearray(rest)
        for line in lines:
            self._emit(line)
        return len(data)

    def _emit(self, line: bytes | bytearray) -> None:
        text = bytes(line[:_MAX_LINE_BYTES]).decode("utf-8", "replace").rstrip("\r")
        self.tail.append(text)
        self._sink(text)

    def close(self) -> None:
        """Take what is there now, then stop. Idempotent."""
        if self._fd is None:
            return
        for _ in range(_MAX_CLOSING_READS):
            if self._read_once() <= 0:
                break
        if self._partial:
            self._emit(self._partial)
            self._partial = bytearray()
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._fd = None
