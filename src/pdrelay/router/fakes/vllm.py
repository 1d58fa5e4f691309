"""A vLLM server without a model: its HTTP surface, its P/D handshakes, made-up tokens.

It runs in the process of a test, or as one:

    python -m pdrelay.router.fakes.vllm --port 8100 [any other argument of vLLM's server]
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from pdrelay.router.fakes.server import FakeServer, run_fake


@dataclass
class FakeWorld:
    """What the fakes of one test share: KV that producers hold, by transfer id or remote handle."""

    held: dict[str, FakeVllm] = field(default_factory=dict)
    prompts: dict[str, list[int]] = field(default_factory=dict)  # of each hold: what its KV is of
    arrivals: dict[str, asyncio.Event] = field(default_factory=dict)
    handles: Iterator[int] = field(default_factory=itertools.count)

    def hold(self, key: str, producer: FakeVllm, prompt: list[int]) -> None:
        self.held[key] = producer
        self.prompts[key] = prompt
        self.arrival(key).set()

    def arrival(self, key: str) -> asyncio.Event:
        return self.arrivals.setdefault(key, asyncio.Event())

    def take(self, key: str) -> list[int]:
        """The consumer has read it: the producer frees its blocks."""
        self.held.pop(key)
        return self.prompts.pop(key)


class FakeVllm(FakeServer):
    """One instance; instances that share a `world` hand over to each other."""

    def __init__(
        self,
        *,
        model: str = "tiny",
        max_model_len: int = 512,
        version: str = "0.32.0",
        connector: str = "",  # "nixl" or "pdrelay"
        api_key: str = "",
        world: FakeWorld | None = None,
        step_s: float = 0.0,
        scale_out: bool = True,  # --enable-scale-out: /inference/v1/generate is there
    ) -> None:
        super().__init__(
            model=model,
            max_model_len=max_model_len,
            version=version,
            api_key=api_key,
            step_s=step_s,
        )
        self.connector = connector
        self.world = world or FakeWorld()
        self.scale_out = scale_out

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/version", self._version),
            web.get("/metrics", self._metrics),
            web.post("/v1/completions", self._completions),
            web.post("/inference/v1/generate", self._generate),
        ]

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": self.version})

    async def _metrics(self, request: web.Request) -> web.Response:
        label = f'{{engine="0",model_name="{self.model}"}}'
        prompt_tokens = float(sum(len(body["prompt"]) for body in self.requests))
        lines = [
            "# TYPE vllm:num_requests_running gauge",
            f"vllm:num_requests_running{label} {float(self.running)}",
            f"vllm:prompt_tokens_total{label} {prompt_tokens}",
            f"vllm:prompt_tokens_created{label} 1.7e+09",
        ]
        return web.Response(text="\n".join(lines) + "\n")

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        self.authorize(request)
        return await self._answer(request, await request.json())

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        """Its request becomes one of completions, in `requests` too; its choices are less."""
        self.authorize(request)
        body = await request.json()
        if not self.scale_out:
            return _error(403, "Scale-out endpoints are disabled.")
        if not {"token_ids", "sampling_params"} <= body.keys():
            return _error(400, "Field required")
        sampling = body.pop("sampling_params")
        assert sampling.pop("detokenize") is False
        extra = sampling.pop("extra_args", {})
        prompt = body.pop("token_ids")
        return await self._answer(
            request, {**body, **sampling, **extra, "prompt": prompt, "tokens_only": True}
        )

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        self.requests.append(body)
        if self.refuse is not None:
            return _error(*self.refuse)
        self.running += 1
        try:
            prompt = await self._load(body)
            if body["stream"]:
                return await self._stream(request, body, prompt)
            return await self._whole(body, prompt)
        except (asyncio.CancelledError, ConnectionError):
            self.aborted.append(body["prompt"])
            raise
        finally:
            self.running -= 1

    async def _load(self, body: dict[str, Any]) -> list[int]:
        """The prompt whose KV this instance works on; raises when a hand-over does not fit."""
        prompt: list[int] = body["prompt"]
        params = body.get("kv_transfer_params")
        if self.alone or params is None or not params.get("do_remote_prefill"):
            return prompt
        if self.connector == "pdrelay":
            key = params["pdrelay_transfer_id"]
            assert params["pdrelay_producer"]
            await self.world.arrival(key).wait()
        else:
            key = params["remote_engine_id"]
        of = self.world.take(key)
        assert prompt[: len(of)] == of and len(prompt) - len(of) in (0, 1)
        return prompt

    def _hold(self, body: dict[str, Any]) -> dict[str, Any] | None:
        params = body.get("kv_transfer_params")
        if params is None or not params.get("do_remote_decode"):
            return None
        if self.alone:
            return {"do_remote_prefill": True, "pdrelay_producer": "fake"}
        if self.connector == "pdrelay":
            self.world.hold(params["pdrelay_transfer_id"], self, body["prompt"])
            return {"pdrelay_producer": "fake"}
        handle = f"engine-{next(self.world.handles)}"
        self.world.hold(handle, self, body["prompt"])
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": handle,
            "remote_block_ids": [1, 2],
            "remote_host": "127.0.0.1",
            "remote_port": 5600,
        }

    async def _whole(self, body: dict[str, Any], prompt: list[int]) -> web.Response:
        tokens, choice = [], {}
        for i in range(body["max_tokens"]):
            await self.step()
            tokens.append(self.token(prompt, i))
            choice = self._choice(body, prompt, tokens, i)
            if choice["finish_reason"]:
                break
        if body.get("prompt_logprobs") is not None:
            rest = [self._prompt_logprob(token) for token in prompt[1:]]
            choice["prompt_logprobs"] = [None, *rest]
        if body.get("logprobs") is not None:
            choice["logprobs"] = self._logprobs(body["logprobs"], tokens)
        answer: dict[str, Any] = {
            "choices": [choice],
            "usage": {
                "prompt_tokens": len(prompt),
                "completion_tokens": len(tokens),
                "prompt_tokens_details": {"cached_tokens": 3},
            },
        }
        if choice["finish_reason"] == "length":
            answer["kv_transfer_params"] = self._hold(body)
        return web.json_response(answer)

    async def _stream(
        self, request: web.Request, body: dict[str, Any], prompt: list[int]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        tokens: list[int] = []
        for i in range(body["max_tokens"]):
            await self.step()
            if self.fail_at == i:
                assert request.transport is not None
                request.transport.abort()
                raise ConnectionResetError("told to break off")
            if self.error_at == i:
                error = {"error": {"message": "EngineCore encountered an issue", "code": 500}}
                await response.write(_event(error))
                return response
            tokens.append(self.token(prompt, i))
            choice = self._choice(body, prompt, [tokens[-1]], i)
            if i == 0 and "tokens_only" not in body:
                choice["prompt_token_ids"] = prompt
            if body.get("logprobs") is not None:
                choice["logprobs"] = self._logprobs(body["logprobs"], [tokens[-1]])
            await response.write(_event({"choices": [choice]}))
            if choice["finish_reason"]:
                break
        if body.get("stream_options", {}).get("include_usage"):
            details = {"cached_tokens": 3}
            usage = {"prompt_tokens": len(prompt), "prompt_tokens_details": details}
            await response.write(_event({"choices": [], "usage": usage}))
        await response.write(b"data: [DONE]\n\n")
        return response

    def _choice(
        self, body: dict[str, Any], prompt: list[int], new: list[int], i: int
    ) -> dict[str, Any]:
        stops = i + 1 > body.get("min_tokens", 0) and new[-1] in body.get("stop_token_ids", ())
        ended = "stop" if stops else "length" if i + 1 == body["max_tokens"] else None
        choice: dict[str, Any] = {"index": 0, "finish_reason": ended}
        if "tokens_only" not in body:
            choice["text"] = "".join(map(chr, new))
            choice["stop_reason"] = new[-1] if stops else None
        if not self.without_ids:
            choice["token_ids"] = list(new)
        return choice

    def _logprobs(self, num_top: int, tokens: Sequence[int]) -> dict[str, Any]:
        top = [{f"token_id:{t + i}": -0.5 - i for i in range(max(num_top, 1))} for t in tokens]
        return {
            "tokens": [f"token_id:{token}" for token in tokens],
            "token_logprobs": [-0.5] * len(tokens),
            "top_logprobs": top,
            "text_offset": list(range(len(tokens))),
        }

    def _prompt_logprob(self, token: int) -> dict[str, Any]:
        own = {"logprob": -1.5, "rank": 2, "decoded_token": chr(token)}
        best = {"logprob": -0.5, "rank": 1, "decoded_token": "!"}
        return {str(token): own, str(token + 1): best}


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "code": status}}, status=status)


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


if __name__ == "__main__":
    sys.exit(run_fake(FakeVllm))
