"""Server-sent events from bytes, as much of them as OpenAI-compatible servers use.

Source: WHATWG HTML, section 9.2.6, "Interpreting an event stream".
"""

from __future__ import annotations

from pdrelay.errors import ProtocolError

MAX_EVENT_BYTES = 16 << 20


class SseParser:
    """Cuts a byte stream into the data of its events, wherever the reads were split.

    `error` holds the data of the last event whose type was "error".
    """

    def __init__(self) -> None:
        self.error: bytes | None = None
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The data of every event that `data` completes, in order.

        Raises:
            ProtocolError: an event of more than MAX_EVENT_BYTES.
        """
        buffer = self._rest + data if self._rest else data
        tail = b""
        if b"\r" in buffer:
            if buffer.endswith(b"\r"):  # the \n of a \r\n may still come
                buffer, tail = buffer[:-1], b"\r"
            buffer = buffer.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        head, separator, rest = buffer.rpartition(b"\n\n")
        self._rest = rest + tail
        if len(self._rest) > MAX_EVENT_BYTES:
            raise ProtocolError(f"a server-sent event is longer than {MAX_EVENT_BYTES} bytes")
        if not separator:
            return []
        events = []
        for block in head.split(b"\n\n"):
            if block.startswith(b"data: ") and b"\n" not in block:
                events.append(block[6:])
            else:
                self._slow_block(block, events)
        return events

    def finish(self) -> list[bytes]:
        """The events that the end of the stream completes: some servers omit the last newline."""
        rest, self._rest = self._rest, b""
        events: list[bytes] = []
        self._slow_block(rest.replace(b"\r", b"\n"), events)
        return events

    def _slow_block(self, block: bytes, events: list[bytes]) -> None:
        data: list[bytes] = []
        kind = b""
        for line in block.split(b"\n"):
            name, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if name == b"data":
                data.append(value)
            elif name == b"event":
                kind = value
        if not data:
            return
        payload = b"\n".join(data)
        if kind == b"error":
            self.error = payload
        events.append(payload)
