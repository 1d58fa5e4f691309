"""What the front door asks of an HTTP engine in one call, and what comes back, engine aside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from pdrelay.core.messages import EngineRequest, FinishReason, Output, TokenLogprobs


@dataclass(frozen=True)
class Leg:
    """One call: a whole request, or its part on a producer or consumer."""

    max_tokens: int
    min_tokens: int = 0
    stream: bool = True
    prompt_json: bytes = b""  # `prompt_json` of the request, where several legs share it
    more_prompt: tuple[int, ...] = ()  # output tokens that another instance has given already
    needs_seed: bool = False  # two instances must draw the same token
    wants_prompt_logprobs: bool = True
    wants_usage: bool = False  # streams: the number of cached tokens, with the last piece
    kv_transfer_params: dict[str, Any] | None = None
    bootstrap: tuple[str, int, int] | None = None  # SGLang: host, port, room


def prompt_json(request: EngineRequest) -> bytes:
    """Its token ids as a JSON list: 0.1 ms for 8,192."""
    return msgspec.json.encode(request.prompt_token_ids.tolist())


class Piece(msgspec.Struct):
    """New tokens of one call, in order. `error` ends it."""

    token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    kv_transfer_params: dict[str, Any] | None = None
    error: str = ""

    def output(self, request_id: str) -> Output:
        return Output(
            request_id=request_id,
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            finish_reason=self.finish_reason,
            stop_token_id=self.stop_token_id,
            num_cached_tokens=self.num_cached_tokens,
            prompt_logprobs=self.prompt_logprobs,
        )

    def without_first(self) -> Piece:
        """The same less its first token."""
        return msgspec.structs.replace(
            self,
            token_ids=self.token_ids[1:],
            logprobs=None if self.logprobs is None else self.logprobs[1:],
        )

    def split_first(self) -> tuple[Piece, Piece | None]:
        """Its first token, and the rest if there is one; the end goes with the last token."""
        if len(self.token_ids) < 2:
            return self, None
        first = msgspec.structs.replace(
            self,
            token_ids=self.token_ids[:1],
            logprobs=None if self.logprobs is None else self.logprobs[:1],
            finish_reason=None,
            stop_token_id=None,
        )
        return first, msgspec.structs.replace(self.without_first(), prompt_logprobs=None)


def join(first: Piece, second: Piece) -> Piece:
    """The last piece with tokens, and what follows it without."""
    assert not second.token_ids
    return msgspec.structs.replace(
        first,
        num_cached_tokens=second.num_cached_tokens,
        kv_transfer_params=second.kv_transfer_params or first.kv_transfer_params,
    )
