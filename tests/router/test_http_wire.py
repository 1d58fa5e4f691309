"""Connections to engines, against a server that does what it is told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from pdrelay.router.engines.http_wire import Target, Wires

WAIT_S = 10.0
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
Reply = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Server:
    """`requests`: (connection's number, head, body) of each request; `ended`: of lost clients."""

    def __init__(self, reply: Reply) -> None:
        self.requests: list[tuple[int, bytes, bytes]] = []
        self.ended: list[int] = []
        self.lost = asyncio.Event()
        self.num_connections = 0
        self._reply = reply

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        number = self.num_connections
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                self.requests.append((number, head, await reader.readexactly(length)))
                await self._reply(writer)
        self.ended.append(number)
        self.lost.set()
        writer.close()


@contextlib.asynccontextmanager
async def running(reply: Reply) -> AsyncIterator[tuple[Server, Target, Wires]]:
    server, wires = Server(reply), Wires()
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    target = Target.of(f"http://127.0.0.1:{port}/v1/x?y=1", {"Authorization": "Bearer k"})
    try:
        async with asyncio.timeout(WAIT_S):
            yield server, target, wires
    finally:
        wires.close()
        listener.close()


async def say_ok(writer: asyncio.StreamWriter) -> None:
    writer.write(OK)


async def ask(wires: Wires, target: Target, body: bytes = b"{}") -> tuple[int, bytes]:
    async with wires.post(target, body) as answer:
        return await answer.status(), await answer.read_all()


async def test_requests_in_turn_share_a_connection() -> None:
    async with running(say_ok) as (server, target, wires):
        for i in range(3):
            assert await ask(wires, target, b"%d" % i * 100_000) == (200, b"ok")
    assert [number for number, _, _ in server.requests] == [1, 1, 1]
    assert [body for _, _, body in server.requests] == [b"%d" % i * 100_000 for i in range(3)]
    first = server.requests[0][1]
    assert first.startswith(b"POST /v1/x?y=1 HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nAuthorization: Bearer k\r\n" in first


async def test_requests_at_once_have_connections_of_their_own() -> None:
    async with running(say_ok) as (server, target, wires):
        await asyncio.gather(*(ask(wires, target) for _ in range(5)))
        assert server.num_connections == 5
        await asyncio.gather(*(ask(wires, target) for _ in range(5)))
        assert server.num_connections == 5


async def test_no_connection_that_was_idle_for_long_is_used(monkeypatch: Any) -> None:
    async with running(say_ok) as (server, target, wires):
        await ask(wires, target)
        monkeypatch.setattr("pdrelay.router.engines.http_wire.IDLE_S", 0.0)
        await ask(wires, target)
        assert [number for number, _, _ in server.requests] == [1, 2]
        await server.lost.wait()
        assert server.ended == [1]


async def test_a_connection_that_the_server_closed_is_not_used() -> None:
    async def close(writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        writer.close()

    async with running(close) as (server, target, wires):
        for _ in range(2):
            async with wires.post(target, b"") as answer:
                assert await answer.read_all() == b"ok"
            while answer.usable:  # noqa: ASYNC110 (until the end has arrived here)
                await asyncio.sleep(0)
        assert server.num_connections == 2


async def test_leaving_before_the_end_tells_the_server() -> None:
    async def begin(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"2\r\nab\r\n")

    async with running(begin) as (server, target, wires):
        async with wires.post(target, b"") as answer:
            assert await answer.read() == b"ab"
        await server.lost.wait()
        task = asyncio.create_task(ask(wires, target))
        while len(server.requests) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        server.lost.clear()
        task.cancel()
        await server.lost.wait()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200", HEAD, HEAD + b"9\r\nabc"])
async def test_a_connection_that_breaks_is_an_error(sent: bytes) -> None:
    async def break_off(writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        writer.close()

    async with running(break_off) as (_, target, wires):
        with pytest.raises(ConnectionResetError, match="mid-answer"):
            await ask(wires, target)


async def test_what_is_not_http_is_an_error_and_ends_the_connection() -> None:
    async def babble(writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n\r\n")

    async with running(babble) as (server, target, wires):
        with pytest.raises(ValueError, match="not HTTP"):
            await ask(wires, target)
        await server.lost.wait()


async def test_nobody_listens() -> None:
    async with running(say_ok) as (_, target, _):
        pass
    wires = Wires()
    with pytest.raises(ConnectionRefusedError):
        await ask(wires, Target.of(f"http://127.0.0.1:{target.port}/", {}))


async def test_an_answer_that_nobody_reads_is_not_taken_in() -> None:
    size, taken = 64 << 20, 0

    async def flood(writer: asyncio.StreamWriter) -> None:
        nonlocal taken
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(64):
            writer.write(bytes(1 << 20))
            await writer.drain()
            taken += 1

    async with running(flood) as (_, target, wires), wires.post(target, b"") as answer:
        await answer.status()
        for _ in range(1000):
            await asyncio.sleep(0)
        assert taken < 32
        assert len(await answer.read_all()) == size


def test_targets() -> None:
    target = Target.of("https://[::1]/a", {"X": "y"})
    assert (target.host, target.port, target.tls) == ("::1", 443, True)
    want = b"POST /a HTTP/1.1\r\nHost: [::1]\r\nAccept-Encoding: identity\r\nX: y\r\n"
    assert target.head == want + b"Content-Length: "
    assert b"Authorization: Basic dTpw\r\n" in Target.of("http://u:p@h:1/", {}).head
    with pytest.raises(ValueError, match="line break"):
        Target.of("http://h/", {"X": "y\r\nZ: w"})
    with pytest.raises(ValueError, match="no URL"):
        Target.of("/v1", {})
