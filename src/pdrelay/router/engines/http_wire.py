"""Connections to engines: a POST each at a time, its answer as it comes, kept for the next.

aiohttp's client works 0.2 ms on a call before the first byte leaves, and sends it a turn of the
loop later, behind the other leg of a hand-over; here the request is written at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from yarl import URL

from pdrelay.router.engines.http_answer import AnswerParser

CONNECT_S = 5.0
IDLE_S = 2.0  # uvicorn cuts connections that were idle for 5 s: never use one that old
_MAX_UNREAD = 1 << 20  # bytes of an answer before its connection is read no further


@dataclass(frozen=True)
class Target:
    """Where requests go, and the head that they share up to the body's length."""

    host: str
    port: int
    tls: bool
    head: bytes

    @classmethod
    def of(cls, url: str, headers: Mapping[str, str]) -> Target:
        """Raises ValueError for headers that would break the request."""
        parts = URL(url)
        host, port = parts.raw_host, parts.port
        if host is None or port is None:
            raise ValueError(f"{url!r} is no URL of a server")
        default = parts.is_default_port()
        shown = f"[{host}]" if ":" in host else host
        fields = {"Host": shown if default else f"{shown}:{port}", "Accept-Encoding": "identity"}
        fields |= headers
        if parts.user is not None:
            fields.setdefault("Authorization", _basic(parts.user, parts.password or ""))
        lines = [f"POST {parts.raw_path_qs} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in fields.items()]
        if any("\r" in line or "\n" in line for line in lines):
            raise ValueError("a header has a line break")
        head = "\r\n".join([*lines, "Content-Length: "]).encode()
        return cls(host, port, parts.scheme == "https", head)


def _basic(user: str, password: str) -> str:
    import base64

    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


class Wire(asyncio.Protocol):
    """One connection, and the answer to the request that was sent on it last."""

    def __init__(self) -> None:
        self.idle_since = 0.0
        self._transport: asyncio.Transport | None = None
        self._answer = AnswerParser()
        self._pieces: list[bytes] = []
        self._num_unread = 0
        self._paused = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def usable(self) -> bool:
        """For another request: the last one's answer is complete."""
        transport = self._transport
        is_open = transport is not None and not transport.is_closing() and self._error is None
        return is_open and self._answer.complete and self._answer.keep_alive and not self._pieces

    def send(self, head: bytes, body: bytes) -> None:
        if self._transport is None:
            raise ConnectionResetError("the connection ended before it was used")
        self._answer = AnswerParser()
        self._transport.write(b"%b%d\r\n\r\n%b" % (head, len(body), body))

    def abort(self) -> None:
        """The server notices, and gives the request up."""
        if self._transport is not None:
            self._transport.abort()

    async def status(self) -> int:
        """Raises OSError when the connection breaks, ValueError for what is not HTTP."""
        while not self._answer.status:
            await self._more()
        return self._answer.status

    async def read(self) -> bytes:
        """What has come of the body, at least a byte; b"" at its end. Raises as `status`."""
        while not self._pieces:
            if self._answer.complete:
                return b""
            await self._more()
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._num_unread = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    async def read_all(self, limit: int | None = None) -> bytes:
        """The rest of the body, or its first `limit` bytes. Raises as `status`."""
        pieces, size = [], 0
        while (limit is None or size < limit) and (piece := await self.read()):
            pieces.append(piece)
            size += len(piece)
        return b"".join(pieces)[:limit]

    async def _more(self) -> None:
        if self._error is not None:
            raise self._error
        assert self._waiter is None, "one reader at a time"
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            pieces = self._answer.feed(data)
        except ValueError as error:
            self._error = error
            self.abort()
        else:
            self._pieces += pieces
            self._num_unread += sum(map(len, pieces))
            if self._num_unread > _MAX_UNREAD and not self._paused:
                assert self._transport is not None
                self._paused = True
                self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._error is None:
            try:
                self._answer.end()
            except ConnectionError as error:
                self._error = exc or error
        self._wake()


class Wires:
    """Connections by target, without a limit. Needs a running event loop."""

    def __init__(self) -> None:
        self._idle: dict[tuple[str, int, bool], list[Wire]] = {}
        self._tls: ssl.SSLContext | None = None

    @contextlib.asynccontextmanager
    async def post(self, target: Target, body: bytes) -> AsyncIterator[Wire]:
        """The connection that carries the answer. Leaving before its end breaks it off.

        Raises OSError (TimeoutError included) when there is no connection to be had.
        """
        key = (target.host, target.port, target.tls)
        wire = self._take_idle(key) or await self._connect(target)
        try:
            wire.send(target.head, body)
            yield wire
        finally:
            if wire.usable:
                wire.idle_since = asyncio.get_running_loop().time()
                self._idle.setdefault(key, []).append(wire)
            else:
                wire.abort()

    def _take_idle(self, key: tuple[str, int, bool]) -> Wire | None:
        """The one that was used last; none is kept that has been idle for too long."""
        idle = self._idle.get(key, [])
        oldest = asyncio.get_running_loop().time() - IDLE_S
        while idle and not (idle[0].usable and idle[0].idle_since > oldest):
            idle.pop(0).abort()
        while idle:
            wire = idle.pop()
            if wire.usable:
                return wire
        return None

    async def _connect(self, target: Target) -> Wire:
        if target.tls and self._tls is None:
            self._tls = ssl.create_default_context()
        async with asyncio.timeout(CONNECT_S):
            _, wire = await asyncio.get_running_loop().create_connection(
                Wire, target.host, target.port, ssl=self._tls if target.tls else None
            )
        return wire

    def close(self) -> None:
        """Of idle connections; those in use break off with their requests."""
        idle, self._idle = self._idle, {}
        for wires in idle.values():
            for wire in wires:
                wire.abort()
