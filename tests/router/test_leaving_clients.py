"""Clients that leave, in every phase: nothing stays behind on either side."""

from __future__ import annotations

import asyncio
import json

import pytest
from router_harness import PD, REPLICA, FrontDoor, front_door, until

from pdrelay.core.messages import Abort
from pdrelay.router.config import RouterConfig

STREAMED = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
BODY = {"prompt": "hello", "max_tokens": 50}


class RawClient:
    """One request over a socket that can be cut at any moment."""

    def __init__(self, front: FrontDoor, body: dict) -> None:
        self._front = front
        self._body = json.dumps(body).encode()

    async def __aenter__(self) -> RawClient:
        self.reader, self._writer = await asyncio.open_connection("127.0.0.1", self._front.port)
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        self._writer.write((head % len(self._body)).encode() + self._body)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.cut()

    def cut(self) -> None:
        self._writer.transport.abort()


def aborted(front: FrontDoor, instance: str) -> list[str]:
    return [message.request_id for message in front.sent(instance, Abort)]


@STREAMED
@pytest.mark.parametrize("phase", ["before prefill", "after the first token", "while decoding"])
async def test_leaving_in_pd(stream, phase) -> None:
    async with front_door(PD, auto=False) as front:
        async with RawClient(front, {**BODY, "stream": stream}) as client:
            await until(lambda: front.engine("decode-0").request_ids)
            request_ids = front.engine("decode-0").request_ids
            if phase != "before prefill":
                front.step("prefill-0")
            if phase == "while decoding":
                front.step("decode-0", "decode-0")
            client.cut()
            await until(lambda: not front.flow.num_requests)
        assert aborted(front, "decode-0") == request_ids
        assert aborted(front, "prefill-0") == ([] if phase == "while decoding" else request_ids)
        front.assert_idle()


@STREAMED
async def test_leaving_a_replica_frees_every_choice(stream) -> None:
    async with front_door(REPLICA, auto=False) as front:
        async with RawClient(front, {**BODY, "stream": stream, "n": 3}) as client:
            await until(lambda: len(front.engine("replica-0").request_ids) == 3)
            front.step("replica-0")
            client.cut()
            await until(lambda: not front.flow.num_requests)
        assert len(aborted(front, "replica-0")) == 3
        front.assert_idle()


async def test_leaving_politely_counts_too() -> None:
    """An end of file instead of a reset."""
    async with front_door(PD, auto=False) as front:
        async with RawClient(front, BODY) as client:
            await until(lambda: front.engine("decode-0").request_ids)
            client._writer.close()
            await until(lambda: not front.flow.num_requests)
        front.assert_idle()


async def test_leaving_while_the_body_is_on_its_way() -> None:
    async with front_door(REPLICA) as front:
        _, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        await writer.drain()
        writer.transport.abort()
        assert (await front.post("/v1/completions", BODY))[0] == 200
        front.assert_idle()


async def test_a_client_that_does_not_read_is_cut_off() -> None:
    config = RouterConfig(max_stream_buffer=50_000)
    async with front_door(REPLICA, auto=False, config=config) as front:
        async with RawClient(
            front, {**BODY, "stream": True, "max_tokens": 500, "n": 100}
        ) as client:
            client.reader._transport.pause_reading()
            await until(lambda: len(front.engine("replica-0").request_ids) == 100)
            for _ in range(400):
                if not front.flow.num_requests:
                    break
                front.step("replica-0")
                await asyncio.sleep(0)
            await until(lambda: not front.flow.num_requests)
        front.assert_idle()


async def test_the_next_request_succeeds_after_many_left() -> None:
    async with front_door(PD) as front:
        for _ in range(30):
            async with RawClient(front, {**BODY, "stream": True, "max_tokens": 400}) as client:
                await client.reader.read(100)
        await until(lambda: not front.flow.num_requests)
        await until(lambda: not any(e.engine.request_ids for e in front.clients.values()))
        assert (await front.post("/v1/completions", BODY))[0] == 200
        front.assert_idle()
