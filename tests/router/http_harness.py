"""A front door over fake vLLM or SGLang servers, each on its own loopback port."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from aiohttp import web
from router_harness import model_info, parse_sse, until

from pdrelay.core.endpoint import HttpEndpoint
from pdrelay.core.kv_layout import KVLayout
from pdrelay.core.messages import Ready, Role
from pdrelay.router.app import FLOW, build_app
from pdrelay.router.cluster import Cluster
from pdrelay.router.config import RouterConfig
from pdrelay.router.engines.http_client import HttpEngineClient
from pdrelay.router.engines.http_pd import HandOvers, NixlStyle, PdrelayStyle, SglangStyle, Style
from pdrelay.router.engines.http_session import HttpSession
from pdrelay.router.event_log import EventLog
from pdrelay.router.fakes.server import FakeServer
from pdrelay.router.fakes.sglang import FakeRooms, FakeSglang
from pdrelay.router.fakes.vllm import FakeVllm, FakeWorld
from pdrelay.router.server import make_runner

LAYOUT = KVLayout(
    num_layers=1, num_blocks=0, block_size=16, num_kv_heads=1, head_dim=2, dtype="float32"
)


class HttpFrontDoor:
    """The server under test, its fakes by instance id, and a small client."""

    def __init__(self, fakes, clients, app, port, session, log_path, event_log) -> None:
        self.fakes: dict[str, Any] = fakes
        self.clients: dict[str, HttpEngineClient] = clients
        self.flow = app[FLOW]
        self.url = f"http://127.0.0.1:{port}"
        self.session: aiohttp.ClientSession = session
        self._log_path = log_path
        self._event_log = event_log

    def records(self) -> list[dict[str, Any]]:
        self._event_log.flush()
        return [json.loads(line) for line in self._log_path.read_text().splitlines()]

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        async with self.session.post(self.url + path, json=body) as response:
            return response.status, await response.json()

    async def complete(self, prompt: Any, **fields: Any) -> Any:
        """The first choice of a completion, with its token ids."""
        body = {"prompt": prompt, "return_token_ids": True, **fields}
        status, answer = await self.post("/v1/completions", body)
        assert status == 200, answer
        return answer["choices"][0]

    async def events(self, path: str, body: Any) -> list[Any]:
        async with self.session.post(self.url + path, json={**body, "stream": True}) as response:
            assert response.status == 200, await response.text()
            return parse_sse(await response.text())

    async def health(self) -> tuple[int, Any]:
        async with self.session.get(self.url + "/health") as response:
            return response.status, await response.json()

    async def idle(self) -> None:
        """Nothing runs or is held anywhere, no load is booked."""
        assert self.flow.num_requests == 0 and self.flow.waiting_tokens == 0
        for name, client in self.clients.items():
            await until(lambda client=client: not client._calls)
            load = self.flow._cluster.load_of(name)
            assert (load.tokens, load.requests) == (0, 0)
        await until(lambda: not any(fake.running for fake in self.fakes.values()))

    def endpoint(self, name: str) -> HttpEndpoint:
        return self.clients[name].endpoint


def endpoint_of(name: str, role: Role, fake: FakeServer, **fields: Any) -> HttpEndpoint:
    ready = Ready(instance=name, role=role, pid=0, layout=LAYOUT, max_model_len=fake.max_model_len)
    return HttpEndpoint(engine="vllm", url=fake.url, ready=ready, api_key=fake.api_key, **fields)


@contextlib.asynccontextmanager
async def vllm_front_door(
    roles: Mapping[str, Role] | Sequence[str] = ("replica-0",),
    *,
    connector: str = "",
    dispatch: str = "auto",
    announced: bool = True,
    log_path: Path | None = None,
    config: RouterConfig | None = None,
    **options: Any,
) -> AsyncIterator[HttpFrontDoor]:
    """`announced`: the router knows where PdrelayConnector's producers are."""
    roles = roles if isinstance(roles, Mapping) else dict.fromkeys(roles, Role.BOTH)
    world = FakeWorld()
    style: Style = NixlStyle() if connector == "nixl" else PdrelayStyle(dispatch)
    fakes = {name: FakeVllm(connector=connector, world=world, **options) for name in roles}
    for fake in fakes.values():
        await fake.start()
    address = "/run/producer.sock" if announced else ""
    endpoints = {
        name: endpoint_of(
            name, role, fakes[name], producer_address=address if role is Role.PREFILL else ""
        )
        for name, role in roles.items()
    }
    async with http_front_door(fakes, endpoints, style, log_path, config) as door:
        yield door


@contextlib.asynccontextmanager
async def http_front_door(
    fakes: Mapping[str, Any],
    endpoints: Mapping[str, HttpEndpoint],
    style: Style,
    log_path: Path | None = None,
    config: RouterConfig | None = None,
) -> AsyncIterator[HttpFrontDoor]:
    config = config or RouterConfig(drain_timeout_s=0.1)
    http, hand_overs = HttpSession(), HandOvers(style)
    clients = {
        name: HttpEngineClient(
            name,
            endpoint.ready.role,
            session=http,
            hand_overs=hand_overs,
            ping_interval_s=0.02,
            answer_timeout_s=5.0,
        )
        for name, endpoint in endpoints.items()
    }
    event_log = EventLog(log_path)
    app = build_app(config, model_info(), Cluster(list(clients.values())), event_log, None)
    runner = make_runner(app, config)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    for name, client in clients.items():
        client.connect(endpoints[name])
    await until(lambda: all(client.alive for client in clients.values()))
    try:
        async with aiohttp.ClientSession() as session:
            port = runner.addresses[0][1]
            yield HttpFrontDoor(dict(fakes), clients, app, port, session, log_path, event_log)
    finally:
        await runner.cleanup()
        for client in clients.values():
            client.close()
        await http.close()
        for fake in fakes.values():
            await fake.stop()
        event_log.close()
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def sglang_front_door(
    roles: Mapping[str, Role] | Sequence[str] = ("replica-0",),
    *,
    log_path: Path | None = None,
    **options: Any,
) -> AsyncIterator[HttpFrontDoor]:
    roles = roles if isinstance(roles, Mapping) else dict.fromkeys(roles, Role.BOTH)
    rooms = FakeRooms()
    fakes = {name: FakeSglang(role=role, rooms=rooms, **options) for name, role in roles.items()}
    endpoints = {}
    for i, (name, role) in enumerate(roles.items()):
        await fakes[name].start()
        produces = role is Role.PREFILL
        endpoints[name] = msgspec.structs.replace(
            endpoint_of(name, role, fakes[name]),
            engine="sglang",
            bootstrap_host="127.0.0.1" if produces else "",
            bootstrap_port=9000 + i if produces else 0,
        )
    async with http_front_door(fakes, endpoints, SglangStyle(), log_path) as door:
        yield door
