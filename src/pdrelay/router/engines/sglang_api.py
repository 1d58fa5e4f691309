"""SGLang's /generate as the front door uses it: token ids in, token ids out.

In a stream, `output_ids` holds all tokens so far, or with incremental output only the new ones; the
list may even be ahead of `completion_tokens`, because it is serialized late. `StreamReader` tells
the two apart by the count.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pdrelay.core.messages import EngineRequest, FinishReason, TokenLogprobs, TopLogprob
from pdrelay.errors import InvalidRequestError
from pdrelay.router.engines.engine_errors import EngineError
from pdrelay.router.engines.piece import Leg, Piece, prompt_json

GENERATE = "/generate"
_INT31 = (1 << 31) - 1
_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length"}

_Entry = tuple[float | None, int, str | None]  # log-probability, token id, text


class _Finish(msgspec.Struct):
    type: str
    matched: int | str | list[int] | None = None
    message: str = ""


class _Meta(msgspec.Struct):
    finish_reason: _Finish | None = None
    completion_tokens: int = 0
    cached_tokens: int | None = None
    input_token_logprobs: list[_Entry] | None = None
    input_top_logprobs: list[list[_Entry] | None] | None = None
    output_token_logprobs: list[_Entry] | None = None
    output_top_logprobs: list[list[_Entry] | None] | None = None


class _Body(msgspec.Struct):
    output_ids: list[int] | None = None
    meta_info: _Meta | None = None
    error: EngineError | None = None
    message: str = ""


_DECODER = msgspec.json.Decoder(_Body)


def body(request: EngineRequest, leg: Leg) -> bytes:
    """The JSON body of one leg. Raises InvalidRequestError for what SGLang cannot do."""
    params = request.params
    if params.ignore_eos and params.stop_token_ids:
        raise InvalidRequestError(
            "SGLang knows no stop_token_ids together with ignore_eos: leave one out", "ignore_eos"
        )
    sampling: dict[str, Any] = {
        "max_new_tokens": leg.max_tokens,
        "min_new_tokens": leg.min_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k or -1,
        "min_p": params.min_p,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": params.repetition_penalty,
        "ignore_eos": params.ignore_eos,
        "stop_token_ids": params.terminal_token_ids,
        "skip_special_tokens": False,
    }
    if params.logit_bias:
        sampling["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
    if params.client_seed and not params.greedy:
        sampling["sampling_seed"] = params.seed & _INT31
    fields: dict[str, Any] = {
        "input_ids": msgspec.Raw(leg.prompt_json or prompt_json(request)),
        "sampling_params": sampling,
        "stream": leg.stream,
    }
    if params.logprobs is not None or params.prompt_logprobs is not None:
        fields["return_logprob"] = True
        fields["top_logprobs_num"] = max(params.logprobs or 0, params.prompt_logprobs or 0)
        fields["logprob_start_len"] = -1 if params.prompt_logprobs is None else 0
    if request.cache_salt:
        fields["extra_key"] = request.cache_salt
    if leg.bootstrap is not None:
        host, port, room = leg.bootstrap
        fields |= {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": room}
    return msgspec.json.encode(fields)


class StreamReader:
    """Reads the chunks of one call, in order; or its whole response, as one chunk."""

    def __init__(self) -> None:
        self._num_seen = 0

    def __call__(self, data: bytes) -> Piece:
        """Raises ValueError when it is no chunk."""
        message = _DECODER.decode(data)
        if message.error is not None:
            return Piece(error=message.error.message or "the engine reported an error")
        meta = message.meta_info
        if meta is None:
            return Piece(error=message.message or "the engine sent no meta_info")
        if message.output_ids is None:
            raise ValueError("it carries no output_ids (SGLang 0.5 and later give them)")
        first = not self._num_seen
        start = self._num_seen if len(message.output_ids) >= meta.completion_tokens else 0
        piece = Piece(token_ids=message.output_ids[start:], num_cached_tokens=meta.cached_tokens)
        self._num_seen += len(piece.token_ids)
        if meta.output_token_logprobs:
            num = len(piece.token_ids)
            tops = (meta.output_top_logprobs or [])[-num:] if num else []
            piece.logprobs = _entries(meta.output_token_logprobs[-num:] if num else [], tops)
        if first and meta.input_token_logprobs:
            piece.prompt_logprobs = [
                None,
                *_entries(meta.input_token_logprobs[1:], (meta.input_top_logprobs or [None])[1:]),
            ]
        if meta.finish_reason is not None:
            self._finish(piece, meta.finish_reason)
        return piece

    def _finish(self, piece: Piece, finish: _Finish) -> None:
        piece.finish_reason = _FINISH.get(finish.type)
        if piece.finish_reason is None:
            piece.error = finish.message or f"the engine ended the request: {finish.type}"
        elif piece.finish_reason == "stop" and piece.token_ids[-1:] == [finish.matched]:
            piece.stop_token_id = piece.token_ids[-1]


def _entries(chosen: list[_Entry], tops: list[list[_Entry] | None]) -> list[TokenLogprobs]:
    padded = [*tops, *[None] * (len(chosen) - len(tops))]
    return [_logprobs(entry, top) for entry, top in zip(chosen, padded, strict=True)]


def _logprobs(entry: _Entry, given: list[_Entry] | None) -> TokenLogprobs:
    logprob, token_id, _ = entry
    top = [
        TopLogprob(other, value if value is not None else -float("inf"), rank)
        for rank, (value, other, _) in enumerate(given or (), 1)
    ]
    rank = next((each.rank for each in top if each.token_id == token_id), len(top) + 1)
    return TokenLogprobs(token_id, -float("inf") if logprob is None else logprob, rank, top)
