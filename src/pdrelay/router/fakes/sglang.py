"""An SGLang server without a model: /generate, and the bootstrap protocol of its P/D.

A producer keeps a request until the consumer with its room has come, as real ones do; a consumer
waits for its producer. As a process, which pairs with nobody:

    python -m pdrelay.router.fakes.sglang --port 8100 [any other argument of SGLang's server]
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import defaultdict
from typing import Any

from aiohttp import web

from pdrelay.core.messages import Role
from pdrelay.router.fakes.server import FakeServer, run_fake


class FakeRooms:
    """Where the two sides of a request meet: (bootstrap port, room) to both arrivals."""

    def __init__(self) -> None:
        self._rooms: dict[tuple[int, int], dict[Role, asyncio.Event]] = defaultdict(
            lambda: {Role.PREFILL: asyncio.Event(), Role.DECODE: asyncio.Event()}
        )

    async def meet(self, port: int, room: int, role: Role) -> None:
        sides = self._rooms[port, room]
        assert not sides[role].is_set(), "a room is for one request"
        sides[role].set()
        await sides[Role.DECODE if role is Role.PREFILL else Role.PREFILL].wait()


class FakeSglang(FakeServer):
    """`incremental`: chunks carry new tokens only, else all so far."""

    def __init__(
        self,
        *,
        role: Role = Role.BOTH,
        model: str = "tiny",
        max_model_len: int = 512,
        version: str = "0.5.16",
        rooms: FakeRooms | None = None,
        incremental: bool = False,
        api_key: str = "",
        step_s: float = 0.0,
    ) -> None:
        super().__init__(
            model=model,
            max_model_len=max_model_len,
            version=version,
            api_key=api_key,
            step_s=step_s,
        )
        self.role = role
        self.rooms = rooms or FakeRooms()
        self.incremental = incremental

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/server_info", self._server_info),
            web.post("/generate", self._generate),
        ]

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response({"version": self.version, "internal_states": []})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        self.authorize(request)
        body = await request.json()
        self.requests.append(body)
        if self.refuse is not None:
            status, message = self.refuse
            return web.json_response({"error": {"message": message}}, status=status)
        self.running += 1
        try:
            await self._go.wait()
            if self.role is not Role.BOTH and not self.alone:
                port, room = body["bootstrap_port"], body["bootstrap_room"]
                assert body["bootstrap_host"]
                await self.rooms.meet(port, room, self.role)
            if body["stream"]:
                return await self._stream(request, body)
            return await self._whole(body)
        except (asyncio.CancelledError, ConnectionError):
            self.aborted.append(body["input_ids"])
            raise
        finally:
            self.running -= 1

    async def _whole(self, body: dict[str, Any]) -> web.Response:
        produces = self.role is Role.PREFILL
        num = 1 if produces else body["sampling_params"]["max_new_tokens"]
        tokens: list[int] = []
        finish = None
        while finish is None:
            await self.step()
            tokens.append(self.token(body["input_ids"], len(tokens)))
            finish = self._finish(body, tokens, num)
        if produces and finish["type"] == "length":
            finish = {"type": "length", "length": 0}  # it counts what it leaves to the consumer
        return web.json_response(self._chunk(body, tokens, 0, finish))

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        tokens: list[int] = []
        finish = None
        while finish is None:
            await self.step()
            if self.fail_at == len(tokens):
                assert request.transport is not None
                request.transport.abort()
                raise ConnectionResetError("told to break off")
            if self.error_at == len(tokens):
                await response.write(_event({"error": {"message": "KV transfer failed"}}))
                return response
            tokens.append(self.token(body["input_ids"], len(tokens)))
            finish = self._finish(body, tokens, body["sampling_params"]["max_new_tokens"])
            start = len(tokens) - 1 if self.incremental else 0
            await response.write(_event(self._chunk(body, tokens, start, finish)))
        await response.write(b"data: [DONE]\n\n")
        return response

    def _finish(self, body: dict[str, Any], tokens: list[int], num: int) -> dict[str, Any] | None:
        sampling = body["sampling_params"]
        ends = tokens[-1] in sampling["stop_token_ids"] and not sampling["ignore_eos"]
        if ends and len(tokens) > sampling["min_new_tokens"]:
            return {"type": "stop", "matched": tokens[-1]}
        return {"type": "length", "length": num} if len(tokens) >= num else None

    def _chunk(
        self, body: dict[str, Any], tokens: list[int], start: int, finish: dict[str, Any] | None
    ) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "id": "x",
            "finish_reason": finish,
            "prompt_tokens": len(body["input_ids"]),
            "completion_tokens": len(tokens),
            "cached_tokens": 3,
        }
        if body.get("return_logprob"):
            shown = tokens[start:]
            num_top = body["top_logprobs_num"]
            meta["output_token_logprobs"] = [_entry(token, 0) for token in shown]
            meta["output_top_logprobs"] = [
                [_entry(token + i, i) for i in range(num_top)] for token in shown
            ]
            if self.role is Role.DECODE:  # it computes nothing of the prompt
                meta["input_token_logprobs"] = meta["input_top_logprobs"] = []
            elif body["logprob_start_len"] == 0:
                prompt = body["input_ids"]
                meta["input_token_logprobs"] = [
                    [None, prompt[0], None],
                    *(_entry(token, 1) for token in prompt[1:]),
                ]
                meta["input_top_logprobs"] = [
                    None,
                    *([_entry(token + 1, 0)] for token in prompt[1:]),
                ]
        chunk: dict[str, Any] = {"text": "", "meta_info": meta}
        if not self.without_ids:
            chunk["output_ids"] = tokens[start:]
        return chunk


def _entry(token: int, rank: int) -> list[Any]:
    return [-0.5 - rank, token, None]


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


if __name__ == "__main__":
    sys.exit(run_fake(FakeSglang))
