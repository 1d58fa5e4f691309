"""vLLM's /v1/completions as the front door uses it: token ids in, token ids out.

Every sampling parameter is sent, so that no default of the server's decides; stop strings are not,
because the front door owns the text. Nothing that a client sent reaches the body but what
validation has made of it.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from pdrelay.core.messages import EngineRequest, FinishReason, TokenLogprobs, TopLogprob
from pdrelay.router.engines.engine_errors import EngineError
from pdrelay.router.engines.piece import Leg, Piece, prompt_json

COMPLETIONS = "/v1/completions"
_INT63 = (1 << 63) - 1
_SEED_STEP = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: neighbours' seeds stay apart
_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


class _Logprobs(msgspec.Struct):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []


class _PromptLogprob(msgspec.Struct):
    logprob: float
    rank: int | None = None


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: _Logprobs | None = None
    prompt_logprobs: list[dict[str, _PromptLogprob] | None] | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens_details: _Details | None = None


class _Body(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: EngineError | None = None
    kv_transfer_params: dict[str, Any] | None = None


_DECODER = msgspec.json.Decoder(_Body)


def body(model: str, request: EngineRequest, leg: Leg) -> bytes:
    """The JSON body of one leg of a request."""
    params = request.params
    fields: dict[str, Any] = {
        **envelope(model, request, leg),
        "prompt": prompt(request, leg),
        "return_token_ids": True,
        **sampling(request, leg),
    }
    if params.logprobs is not None:
        fields["logprobs"] = params.logprobs
        fields["return_tokens_as_token_ids"] = True
    if params.prompt_logprobs is not None and leg.wants_prompt_logprobs:
        fields["prompt_logprobs"] = params.prompt_logprobs
    if leg.kv_transfer_params is not None:
        fields["kv_transfer_params"] = leg.kv_transfer_params
    return msgspec.json.encode(fields)


def envelope(model: str, request: EngineRequest, leg: Leg) -> dict[str, Any]:
    """What vLLM's APIs take alike, beside prompt and sampling parameters."""
    fields: dict[str, Any] = {"model": model, "stream": leg.stream}
    if leg.stream and leg.wants_usage:
        fields["stream_options"] = {"include_usage": True}
    if request.cache_salt:
        fields["cache_salt"] = request.cache_salt
    return fields


def prompt(request: EngineRequest, leg: Leg) -> msgspec.Raw:
    """Its ids, and those that another instance has given already, as a JSON list."""
    ids = leg.prompt_json or prompt_json(request)
    if leg.more_prompt:
        ids = b"%b,%b" % (ids[:-1], msgspec.json.encode(leg.more_prompt)[1:])
    return msgspec.Raw(ids)


def sampling(request: EngineRequest, leg: Leg) -> dict[str, Any]:
    """vLLM's sampling parameters of a leg, log-probabilities aside."""
    params = request.params
    fields: dict[str, Any] = {
        "max_tokens": leg.max_tokens,
        "min_tokens": leg.min_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        # The front door says which ids end a request, the model's own included.
        "ignore_eos": True,
        "stop_token_ids": params.terminal_token_ids,
        "skip_special_tokens": False,
    }
    if params.presence_penalty:
        fields["presence_penalty"] = params.presence_penalty
    if params.frequency_penalty:
        fields["frequency_penalty"] = params.frequency_penalty
    if params.logit_bias:
        fields["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
    if not params.greedy and (params.client_seed or leg.needs_seed):
        fields["seed"] = seed(params.seed, leg)
    return fields


def seed(seed: int, leg: Leg) -> int:
    """Of a leg. One that continues after token 1 must not draw token 1's noise again."""
    return (seed + (_SEED_STEP if leg.more_prompt else 0)) & _INT63


def read_piece(data: bytes) -> Piece:
    """One chunk of a stream, or a whole response. Raises ValueError when it is neither."""
    message = _DECODER.decode(data)
    if message.error is not None:
        return Piece(error=message.error.message or "the engine reported an error")
    piece = Piece(kv_transfer_params=message.kv_transfer_params)
    if message.usage is not None and message.usage.prompt_tokens_details is not None:
        piece.num_cached_tokens = message.usage.prompt_tokens_details.cached_tokens
    if not message.choices:
        return piece
    choice = message.choices[0]
    if choice.token_ids is None:
        raise ValueError("it carries no token ids (vLLM 0.11 and later give them)")
    piece.token_ids = choice.token_ids
    if choice.finish_reason is not None:
        piece.finish_reason = _FINISH.get(choice.finish_reason)
        if piece.finish_reason is None:
            return Piece(error=f"the engine ended the request: {choice.finish_reason}")
        if piece.finish_reason == "stop":
            ended_by = choice.stop_reason
            piece.stop_token_id = ended_by if isinstance(ended_by, int) else None
    if choice.logprobs is not None:
        piece.logprobs = _logprobs(choice.logprobs)
    if choice.prompt_logprobs is not None:
        piece.prompt_logprobs = [_prompt_logprobs(each) for each in choice.prompt_logprobs]
    return piece


def _logprobs(given: _Logprobs) -> list[TokenLogprobs]:
    tops = given.top_logprobs or [None] * len(given.tokens)
    return [
        _entry(_token_id(token), -math.inf if logprob is None else logprob, top)
        for token, logprob, top in zip(given.tokens, given.token_logprobs, tops, strict=True)
    ]


def _entry(token_id: int, logprob: float, given: dict[str, float] | None) -> TokenLogprobs:
    """vLLM gives no ranks here: the alternatives are the likeliest, in order."""
    pairs = sorted((given or {}).items(), key=lambda pair: -pair[1])
    top = [TopLogprob(_token_id(token), value, i) for i, (token, value) in enumerate(pairs, 1)]
    rank = next((each.rank for each in top if each.token_id == token_id), len(top) + 1)
    return TokenLogprobs(token_id, logprob, rank, top)


def _token_id(text: str) -> int:
    """Of `token_id:123`."""
    return int(text.removeprefix("token_id:"))


def _prompt_logprobs(given: dict[str, _PromptLogprob] | None) -> TokenLogprobs | None:
    """The prompt's own token is the first of the entry."""
    if not given:
        return None
    entries = [
        TopLogprob(int(token), each.logprob, each.rank or 0) for token, each in given.items()
    ]
    own, *rest = entries
    top = sorted([own, *rest], key=lambda each: each.rank)
    return TokenLogprobs(own.token_id, own.logprob, own.rank, top)
