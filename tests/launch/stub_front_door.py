"""The least HTTP side and control-socket reader that the launcher can be tested with.

Run as a program it is `pdrelay serve` over stub workers: arguments as for `serve`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import sys
from pathlib import Path

from aiohttp import web

from pdrelay.core.framing import FrameCodec
from pdrelay.core.messages import (
    Drain,
    EngineRequest,
    Fatal,
    FromWorker,
    Ping,
    Pong,
    Ready,
    StepResult,
    Submit,
)
from pdrelay.core.sampling_params import SamplingParams
from pdrelay.core.token_ids import pack_ids
from pdrelay.launch.instance import Instance

STUB_COMMAND = (sys.executable, str(Path(__file__).with_name("stub_worker.py")))
PING_S = 0.05


class Link:
    """Reads one instance's control socket with plain loop callbacks."""

    def __init__(self, instance: Instance, sock: socket.socket, on_step=lambda step: None) -> None:
        self.instance = instance
        self._sock = sock
        self._on_step = on_step
        self._codec = FrameCodec(FromWorker)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self._readable)
        self._ping()

    def _ping(self) -> None:
        self.send(Ping(0))
        self._timer = self._loop.call_later(PING_S, self._ping)

    def send(self, message) -> None:
        with contextlib.suppress(OSError):
            self._sock.send(self._codec.encode(message))

    def _readable(self) -> None:
        try:
            data = self._sock.recv(1 << 16)
        except ConnectionError:
            data = b""
        if not data:
            self.close()
            self.instance.report_closed()
            return
        for message in self._codec.feed(data):
            match message:
                case Ready():
                    self.instance.report_ready(message)
                case Pong():
                    self._loop.call_soon(self.instance.report_alive)  # as late as a stream reader
                case Fatal(message=text):
                    self.instance.report_fatal(text)
                case StepResult():
                    self._on_step(message)

    def close(self) -> None:
        if self._sock.fileno() < 0:
            return
        self._timer.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()


class StubListener:
    """Records what the supervisor tells."""

    def __init__(self) -> None:
        self.links: dict[str, Link] = {}
        self.log: list[tuple[str, str, int]] = []
        self.reasons: list[str] = []
        self.changed = asyncio.Event()
        self.waiting: dict[str, asyncio.Future] = {}

    def on_started(self, instance: Instance, sock: socket.socket) -> None:
        self.links[instance.instance] = Link(instance, sock, self._step)
        self._note("started", instance)

    def on_exited(self, instance: Instance, reason: str) -> None:
        self.reasons.append(reason)
        for future in self.waiting.values():
            if not future.done():
                future.set_exception(web.HTTPServiceUnavailable(text=reason))
        self._note("exited", instance)

    def _note(self, what: str, instance: Instance) -> None:
        self.log.append((what, instance.instance, instance.incarnation))
        self.changed.set()

    def _step(self, step: StepResult) -> None:
        for output in step.outputs:
            future = self.waiting.pop(output.request_id, None)
            if future is not None and not future.done():
                future.set_result(output.token_ids)

    async def seen(self, what: str, instance: str, incarnation: int, timeout_s: float = 10) -> None:
        """Wait until the supervisor told it."""
        async with asyncio.timeout(timeout_s):
            while (what, instance, incarnation) not in self.log:
                self.changed.clear()
                await self.changed.wait()


class StubFrontDoor(StubListener):
    def __init__(self, plan, down) -> None:
        super().__init__()
        self._down = down
        self._ids = itertools.count()
        app = web.Application()
        app.add_routes([web.get("/health", self.health), web.post("/echo", self.echo)])
        self.runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=plan.config.drain_timeout_s,
        )

    async def health(self, request: web.Request) -> web.Response:
        down = self._down()
        return web.json_response(down, status=503 if down else 200)

    async def echo(self, request: web.Request) -> web.Response:
        tokens = await request.json()
        request_id = str(next(self._ids))
        self.waiting[request_id] = asyncio.get_running_loop().create_future()
        params = SamplingParams(max_tokens=1, seed=0)
        message = Submit(
            EngineRequest(
                request_id=request_id,
                prompt_token_ids=pack_ids(tokens),
                params=params,
                arrived_ns=0,
            )
        )
        next(iter(self.links.values())).send(message)
        return web.json_response(await self.waiting[request_id])

    def busy(self) -> bool:
        """Says that it was asked, where STUB_ASKED names a file."""
        if path := os.environ.get("STUB_ASKED"):
            Path(path).touch()
        return False

    async def all_met(self) -> None:
        pass

    def drain_workers(self) -> None:
        for link in self.links.values():
            link.send(Drain())

    async def close(self) -> None:
        for link in self.links.values():
            link.close()


def main() -> int:
    from pdrelay import cli, serve
    from pdrelay.cli import serve_options

    def run(args) -> int:
        config = serve_options.serve_config(args)
        return serve.run_server(config, command=STUB_COMMAND, make_front_door=StubFrontDoor)

    from pdrelay.cli import serve as serve_command

    serve_command.run = run
    return cli.main(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
