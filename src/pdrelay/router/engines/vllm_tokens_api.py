"""vLLM's /inference/v1/generate as the front door uses it: token ids in, token ids out, no text.

/v1/completions makes text that nobody reads here. For a prompt of 8,192 tokens its server spells
the prompt out twice before token 1 and sends it back with it, in the event loop that relays every
other stream (benchmarks/vllm_api_stall.py). Versions from 0.23 on have this API, from 0.30 on
behind --enable-scale-out. Log-probabilities differ between versions here: requests for them go to
/v1/completions.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pdrelay.core.messages import EngineRequest
from pdrelay.router.engines import vllm_api
from pdrelay.router.engines.engine_errors import EngineError
from pdrelay.router.engines.piece import Leg, Piece

GENERATE = "/inference/v1/generate"


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Body(msgspec.Struct):
    choices: list[_Choice] = []
    usage: vllm_api.Usage | None = None
    error: EngineError | None = None
    kv_transfer_params: dict[str, Any] | None = None


_DECODER = msgspec.json.Decoder(_Body)


def serves(request: EngineRequest) -> bool:
    """Whether this API answers what is asked."""
    return request.params.logprobs is None and request.params.prompt_logprobs is None


def body(model: str, request: EngineRequest, leg: Leg) -> bytes:
    """The JSON body of one leg of a request that `serves` accepts."""
    sampling = {**vllm_api.sampling(request, leg), "detokenize": False}
    if leg.kv_transfer_params is not None:
        # As /v1/completions hands them to the engine: versions before 0.29 drop the field here.
        sampling["extra_args"] = {"kv_transfer_params": leg.kv_transfer_params}
    fields: dict[str, Any] = {
        "model": model,
        "token_ids": vllm_api.prompt(request, leg),
        "sampling_params": sampling,
        "stream": leg.stream,
    }
    if leg.stream and leg.wants_usage:
        fields["stream_options"] = {"include_usage": True}
    if request.cache_salt:
        fields["cache_salt"] = request.cache_salt
    return msgspec.json.encode(fields)


def read_piece(data: bytes) -> Piece:
    """One chunk of a stream, or a whole response. Raises ValueError when it is neither."""
    message = _DECODER.decode(data)
    if message.error is not None:
        return Piece(error=message.error.message or "the engine reported an error")
    piece = Piece(kv_transfer_params=message.kv_transfer_params)
    if message.usage is not None:
        piece.num_cached_tokens = message.usage.num_cached_tokens
    if not message.choices:
        return piece
    choice = message.choices[0]
    if choice.token_ids is None:
        raise ValueError("it carries no token ids")
    piece.token_ids = choice.token_ids
    if choice.finish_reason is not None:
        piece.finish_reason = vllm_api.FINISH.get(choice.finish_reason)
        if piece.finish_reason is None:
            return Piece(error=f"the engine ended the request: {choice.finish_reason}")
        if piece.finish_reason == "stop":  # by one of our ids: there are no stop strings
            piece.stop_token_id = choice.token_ids[-1] if choice.token_ids else None
    return piece
