"""What responses look like on the wire: whole, and as server-sent events.

    Format
    ├── CompletionFormat   /v1/completions
    └── ChatFormat         /v1/chat/completions

Events are put together from bytes that are the same for every chunk of a stream and the few that
are not: the relay's cost a token is this file's.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import msgspec

from pdrelay.errors import RequestError
from pdrelay.model.tokenizer import Tokenizer
from pdrelay.router.openai.choice import Choice, Delta
from pdrelay.router.openai.errors import error_object
from pdrelay.router.openai.logprobs import chat_logprobs, completion_logprobs, token_text_of
from pdrelay.router.openai.validate import Job

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one response; `cached_tokens` None while no instance has told."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None

    def to_json(self) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
        }
        if self.cached_tokens is not None:
            shown["prompt_tokens_details"] = {"cached_tokens": self.cached_tokens}
        return shown


def usage_of(job: Job, choices: Sequence[Choice]) -> Usage:
    """A prompt counts once, however many choices it has."""
    cached = [choice.num_cached_tokens for choice in choices[:: job.n]]
    known = [count for count in cached if count is not None]
    return Usage(
        prompt_tokens=sum(len(prompt.token_ids) for prompt in job.prompts),
        completion_tokens=0
        if job.options.echo_only
        else sum(choice.num_tokens for choice in choices),
        cached_tokens=sum(known) if known else None,
    )


def error_event(error: RequestError) -> bytes:
    return b"data: " + _encode(error_object(error)) + b"\n\n"


class Format(abc.ABC):
    """Formats one response. `created` is in Unix seconds."""

    id_prefix: str
    object_name: str
    chunk_object_name: str

    def __init__(
        self, job: Job, tokenizer: Tokenizer, *, response_id: str, created: int, model: str
    ) -> None:
        self._job = job
        self._tokenizer = tokenizer
        self._head = {
            "id": self.id_prefix + response_id,
            "object": self.object_name,
            "created": created,
            "model": model,
        }
        common = _encode({**self._head, "object": self.chunk_object_name})
        self._common = b"data: " + common[:-1]  # open: without the closing brace
        self._before_index = self._common + b',"choices":[{"index":'

    def response(self, choices: Sequence[Choice], totals: Sequence[Delta]) -> bytes:
        """The whole response; `totals` holds everything of each choice."""
        body: dict[str, Any] = {
            **self._head,
            "choices": [
                self._whole_choice(choice, total)
                for choice, total in zip(choices, totals, strict=True)
            ],
            "usage": usage_of(self._job, choices).to_json(),
        }
        self._add_prompt(body, choices[0])
        return _encode(body)

    def chunk(self, choice: Choice, delta: Delta, usage: Usage | None = None) -> bytes:
        """The events that one delta of one choice makes."""
        opening = b"" if choice.started else self._opening(choice)
        return b"".join(
            (
                opening,
                self._before_index,
                b"%d" % choice.index,
                self._chunk_fields(choice, delta),
                self._ending(delta),
                b"}]",
                b"" if usage is None else b',"usage":' + _encode(usage.to_json()),
                b"}\n\n",
            )
        )

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._common + b',"choices":[],"usage":' + _encode(usage.to_json()) + b"}\n\n"

    def _ending(self, delta: Delta) -> bytes:
        if delta.finish_reason is None:
            fields = b',"finish_reason":null'
        else:
            fields = b',"finish_reason":"%s","stop_reason":%s' % (
                delta.finish_reason.encode(),
                _encode(delta.stop_reason),
            )
        if self._job.return_token_ids:
            fields += b',"token_ids":' + _encode(delta.token_ids)
        return fields

    def _whole_choice(self, choice: Choice, total: Delta) -> dict[str, Any]:
        shown = {
            "index": choice.index,
            **self._whole_text(total),
            "logprobs": self._logprobs(choice, total),
            "finish_reason": total.finish_reason,
            "stop_reason": total.stop_reason,
        }
        if self._job.return_token_ids:
            shown["token_ids"] = total.token_ids
        return shown

    @abc.abstractmethod
    def _whole_text(self, total: Delta) -> dict[str, Any]: ...

    @abc.abstractmethod
    def _opening(self, choice: Choice) -> bytes: ...

    @abc.abstractmethod
    def _chunk_fields(self, choice: Choice, delta: Delta) -> bytes: ...

    @abc.abstractmethod
    def _logprobs(self, choice: Choice, delta: Delta) -> dict[str, Any] | None: ...

    @abc.abstractmethod
    def _add_prompt(self, body: dict[str, Any], choice: Choice) -> None: ...


class CompletionFormat(Format):
    id_prefix = "cmpl-"
    object_name = "text_completion"
    chunk_object_name = "text_completion"

    def _whole_choice(self, choice: Choice, total: Delta) -> dict[str, Any]:
        shown = super()._whole_choice(choice, total)
        if self._job.return_token_ids:
            shown["prompt_token_ids"] = choice.prompt_token_ids.tolist()
        return shown

    def _whole_text(self, total: Delta) -> dict[str, Any]:
        return {"text": total.text}

    def _opening(self, choice: Choice) -> bytes:
        return b""

    def _chunk_fields(self, choice: Choice, delta: Delta) -> bytes:
        fields = b',"text":' + _encode(delta.text)
        fields += b',"logprobs":' + _encode(self._logprobs(choice, delta))
        if self._job.return_token_ids and not choice.started:
            fields += b',"prompt_token_ids":' + _encode(choice.prompt_token_ids.tolist())
        return fields

    def _logprobs(self, choice: Choice, delta: Delta) -> dict[str, Any] | None:
        num_top = self._job.num_top_logprobs
        if num_top is None:
            return None
        entries = delta.logprobs or []
        return completion_logprobs(
            entries,
            delta.offsets[: len(entries)],
            num_top,
            token_text_of(self._tokenizer, self._job.tokens_as_ids),
            choice.prompt_token_ids,
        )

    def _add_prompt(self, body: dict[str, Any], choice: Choice) -> None:
        """Each choice has its own prompt."""


class ChatFormat(Format):
    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def _whole_text(self, total: Delta) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": total.text, "refusal": None}}

    def _opening(self, choice: Choice) -> bytes:
        fields = (
            b',"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        )
        if self._job.return_token_ids:
            fields += b',"prompt_token_ids":' + _encode(choice.prompt_token_ids.tolist())
        return self._before_index + b"%d" % choice.index + fields + b"}\n\n"

    def _chunk_fields(self, choice: Choice, delta: Delta) -> bytes:
        fields = b',"delta":{"content":' + _encode(delta.text) + b"}"
        return fields + b',"logprobs":' + _encode(self._logprobs(choice, delta))

    def _logprobs(self, choice: Choice, delta: Delta) -> dict[str, Any] | None:
        num_top = self._job.num_top_logprobs
        if num_top is None:
            return None
        return chat_logprobs(
            delta.logprobs or [], num_top, self._tokenizer, self._job.tokens_as_ids
        )

    def _add_prompt(self, body: dict[str, Any], choice: Choice) -> None:
        if self._job.return_token_ids:
            body["prompt_token_ids"] = choice.prompt_token_ids.tolist()
