"""A front door over fake engines on a real loopback port, and small clients for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import openai
from aiohttp import web

from pdrelay.core.messages import Role, ToWorker
from pdrelay.model.generation_config import GenerationConfig
from pdrelay.model.tokenizer import Tokenizer, byte_level_tokenizer
from pdrelay.router.app import FLOW, build_app
from pdrelay.router.cluster import Cluster
from pdrelay.router.config import ModelInfo, RouterConfig
from pdrelay.router.event_log import EventLog
from pdrelay.router.fakes.native import (
    FakeEngine,
    FakeEngineClient,
    TokenOf,
    fake_cluster,
    fake_token,
)
from pdrelay.router.flow import Flow
from pdrelay.router.server import make_runner

WAIT_S = 10.0
PD = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}
REPLICA = {"replica-0": Role.BOTH}
EOS = 257


def spell(text: str) -> TokenOf:
    """An engine that says `text` in bytes, then end-of-sequence."""
    data = text.encode()
    return lambda request, position: data[position] if position < len(data) else EOS


def model_info(tokenizer: Tokenizer | None = None, **changes: Any) -> ModelInfo:
    fields: dict[str, Any] = {
        "served_model_name": "tiny",
        "root": "tiny",
        "max_model_len": 512,
        "tokenizer": tokenizer or byte_level_tokenizer(),
        "generation": GenerationConfig(eos_token_ids=(EOS,)),
    }
    return ModelInfo(**{**fields, **changes})


async def until(condition: Callable[[], Any]) -> None:
    """Let the loop turn until `condition` holds; fails at a deadline."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 (any condition, whoever makes it true)
            await asyncio.sleep(0.001)


class FrontDoor:
    def __init__(
        self,
        clients: list[FakeEngineClient],
        flow: Flow,
        port: int,
        session: aiohttp.ClientSession,
        log_path: Path | None,
        event_log: EventLog,
    ) -> None:
        self.clients = {client.instance: client for client in clients}
        self.flow = flow
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.session = session
        self._log_path = log_path
        self._event_log = event_log

    def engine(self, instance: str) -> FakeEngine:
        return self.clients[instance].engine

    def step(self, *instances: str) -> None:
        for instance in instances:
            self.engine(instance).step()

    def sent(self, instance: str, kind: type[ToWorker]) -> list[Any]:
        return [each for each in self.clients[instance].sent if isinstance(each, kind)]

    def records(self) -> list[dict[str, Any]]:
        assert self._log_path is not None
        self._event_log.flush()
        return [json.loads(line) for line in self._log_path.read_text().splitlines()]

    def openai(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=self.url + "/v1", **{"api_key": "none", "max_retries": 0, **options}
        )

    async def post(
        self, path: str, body: Any, **options: Any
    ) -> tuple[int, Any, Mapping[str, str]]:
        """(status, decoded body, headers); `body` is sent as it is when it is bytes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.session.post(self.url + path, data=data, **options) as response:
            return response.status, await _decoded(response), response.headers

    async def get(self, path: str, **options: Any) -> tuple[int, Any]:
        async with self.session.get(self.url + path, **options) as response:
            return response.status, await _decoded(response)

    async def events(self, path: str, body: Any) -> list[Any]:
        """Server-sent events of a streaming request, decoded; "[DONE]" as it is."""
        async with self.session.post(self.url + path, json={**body, "stream": True}) as response:
            assert response.status == 200, await response.text()
            return parse_sse(await response.text())

    def assert_idle(self) -> None:
        """Nothing is held anywhere, no load is booked."""
        assert self.flow.num_requests == 0 and self.flow.waiting_tokens == 0
        for client in self.clients.values():
            assert client.engine.request_ids == []
            load = self.flow._cluster.load_of(client.instance)
            assert (load.tokens, load.requests) == (0, 0)


def parse_sse(text: str) -> list[Any]:
    lines = [line[len("data: ") :] for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def _decoded(response: aiohttp.ClientResponse) -> Any:
    text = await response.text()
    return json.loads(text) if response.content_type == "application/json" else text


@contextlib.asynccontextmanager
async def front_door(
    instances: Mapping[str, Role] | Sequence[str] = ("replica-0",),
    *,
    config: RouterConfig | None = None,
    model: ModelInfo | None = None,
    token_of: TokenOf = fake_token,
    auto: bool = True,
    meets: bool = True,
    meet_timeout_s: float = WAIT_S,
    tokens_per_step: int = 1,
    log_path: Path | None = None,
    down: Callable[[], dict[str, str]] | None = None,
) -> AsyncIterator[FrontDoor]:
    config = config or RouterConfig(drain_timeout_s=0.1)
    clients = fake_cluster(
        instances, auto=auto, meets=meets, token_of=token_of, tokens_per_step=tokens_per_step
    )
    event_log = EventLog(log_path)
    cluster = Cluster(clients, meet_timeout_s=meet_timeout_s)
    app = build_app(config, model or model_info(), cluster, event_log, down)
    runner = make_runner(app, config)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        async with aiohttp.ClientSession() as session:
            yield FrontDoor(clients, app[FLOW], port, session, log_path, event_log)
    finally:
        await runner.cleanup()
        for client in clients:
            client.engine.kill()
        event_log.close()
