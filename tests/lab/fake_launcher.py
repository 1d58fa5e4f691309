"""A launcher whose servers are in-process OpenAI endpoints that write real event logs."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from aiohttp import web
from synthetic import LAYOUT

from pdrelay.core.events import Event, EventKind, RequestRecord
from pdrelay.errors import LaunchError
from pdrelay.lab.rundir import WorkerInfo


@dataclass
class FakeServer:
    """Streams one token a `step_s`; prefill takes `token_s` a prompt token."""

    topology: object
    event_log: Path
    argv: list[str]
    step_s: float = 0.0005
    token_s: float = 0.000002
    startup_s: float = 0.01
    url: str = ""
    stopped: int = 0
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    refuse: bool = False
    pids: list[int] = field(default_factory=list)

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._complete)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        self.stopped += 1
        if self.stopped == 1:
            await self._runner.cleanup()

    def workers(self) -> list[WorkerInfo]:
        return [
            WorkerInfo(instance=name, layout=LAYOUT, peak_rss_bytes=123_456_789)
            for name in self._instances()
        ]

    def _instances(self) -> list[str]:
        if self.topology.kind == "pd":
            return ["prefill-0", "decode-0"]
        return [f"{self.topology.kind}-0"]

    async def _models(self, request: web.Request) -> web.Response:
        model = {"id": "tiny", "root": "tiny", "max_model_len": 16384, "vocab_size": 264}
        return web.json_response({"data": [model]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read())
        if self.refuse:
            return web.json_response({"error": {"message": "out of order"}}, status=503)
        prompt, count = tuple(body["prompt"]), body["max_tokens"]
        self.prompts.append(prompt)
        names = self._instances()
        events = [Event(EventKind.ARRIVED, time.monotonic_ns(), "router")]
        events.append(Event(EventKind.ROUTED, time.monotonic_ns(), "router"))
        events.append(Event(EventKind.PREFILL_START, time.monotonic_ns(), names[0]))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(self.token_s * len(prompt))
        events.append(Event(EventKind.PREFILL_END, time.monotonic_ns(), names[0]))
        if len(names) == 2:
            moved = -(-len(prompt) // LAYOUT.block_size) * LAYOUT.block_bytes
            now = time.monotonic_ns()
            events.append(Event(EventKind.TRANSFER_START, now - 20_000, names[0]))
            end = Event(EventKind.TRANSFER_END, now, names[1], num_bytes=moved, num_pieces=4)
            end.busy_ns, end.transport = 500, "fake"
            events.append(end)
            events.append(Event(EventKind.DECODE_ADMITTED, time.monotonic_ns(), names[1]))
        for index in range(count):
            kind = EventKind.TOKEN if index else EventKind.FIRST_TOKEN
            events.append(Event(kind, time.monotonic_ns(), names[-1 if index else 0]))
            choice = {"index": 0, "text": "x", "finish_reason": None}
            if index == count - 1:
                choice["finish_reason"] = "length"
            await self._send(response, {"choices": [choice]})
            await asyncio.sleep(self.step_s)
        usage = {"prompt_tokens": len(prompt), "completion_tokens": count}
        await self._send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        self._log(request, prompt, count, names, events)
        return response

    async def _send(self, response: web.StreamResponse, payload: object) -> None:
        try:
            await response.write(b"data: " + msgspec.json.encode(payload) + b"\n\n")
        except ConnectionResetError:  # the client left
            raise asyncio.CancelledError from None

    def _log(self, request, prompt, count, names, events) -> None:
        record = RequestRecord(
            request_id=f"r{len(self.prompts)}",
            client_request_id=request.headers["X-Request-Id"],
            num_prompt_tokens=len(prompt),
            num_output_tokens=count,
            instances=names,
            finish_reason="length",
            events=events,
        )
        with self.event_log.open("ab") as log:
            log.write(msgspec.json.encode(record) + b"\n")


@dataclass
class FakeLauncher:
    """Remembers what it started. `broken` topologies do not start; `refusing` ones answer 503."""

    broken: tuple[str, ...] = ()
    refusing: tuple[str, ...] = ()
    servers: list[FakeServer] = field(default_factory=list)

    async def start(self, topology, *, model, event_log_path, log_path, extra_args=()):
        if topology.name in self.broken:
            raise LaunchError(f"{topology.name} is broken: mend it")
        log_path.touch()
        argv = ["pdrelay", "serve", model, *topology.serve_args, *extra_args]
        server = FakeServer(topology, event_log_path, argv)
        server.refuse = topology.name in self.refusing
        await server.start()
        self.servers.append(server)
        return server
