"""One choice of a response: an engine request's tokens made into text and logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from pdrelay.core.messages import FinishReason, Output, TokenLogprobs
from pdrelay.core.sampling_params import SamplingParams
from pdrelay.core.token_ids import TokenIds
from pdrelay.errors import RequestError
from pdrelay.model.tokenizer import Tokenizer
from pdrelay.router.openai.detokenizer import Detokenizer


class Delta(msgspec.Struct):
    """What one output adds to a choice. `logprobs` and `offsets` have an entry a token shown."""

    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs | None] | None = None
    offsets: list[int] = []  # where each of them begins in the choice's text, in characters
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the client's stop id or string that ended it


@dataclass(frozen=True)
class TextOptions:
    """How tokens become text; the same for all choices of a request."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    echo: bool = False  # the prompt comes first
    echo_only: bool = False  # and nothing else does


class Owner(Protocol):
    """The response that a choice belongs to."""

    def on_delta(self, choice: Choice, delta: Delta) -> None: ...

    def on_failed(self, error: RequestError) -> None: ...

    def flush(self) -> None: ...


class Choice:
    """A sink of the flow (`flow.Sink`)."""

    def __init__(
        self,
        owner: Owner,
        index: int,
        *,
        request_id: str,
        prompt_token_ids: TokenIds,
        prompt: str | None,
        params: SamplingParams,
        options: TextOptions,
        tokenizer: Tokenizer,
    ) -> None:
        """`prompt` is the text that the client sent; None when it sent token ids."""
        self.index = index
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.num_tokens = 0
        self.num_cached_tokens: int | None = None
        self.started = False  # something of it was given out
        self.finished = False
        self._owner = owner
        self._params = params
        self._options = options
        decoder = tokenizer.decoder(
            skip_special_tokens=options.skip_special_tokens,
            context=() if options.echo else prompt_token_ids,
        )
        self._prompt_offsets: list[int] = []
        self._echo = ""
        if options.echo:
            pieces = [decoder.push(token_id) for token_id in prompt_token_ids]
            self._prompt_offsets = _starts(pieces)
            self._echo = "".join(pieces) if prompt is None else prompt
        self._detokenizer = Detokenizer(
            decoder,
            stop=options.stop,
            include_stop=options.include_stop,
            min_tokens=params.min_tokens,
        )

    def on_output(self, output: Output) -> FinishReason | None:
        if output.num_cached_tokens is not None:
            self.num_cached_tokens = output.num_cached_tokens
        if not output.token_ids and output.finish_reason is None:
            return None
        delta = Delta(token_ids=[])
        if not self.started:
            self._open(delta, output)
        if self._options.echo_only:
            delta.finish_reason = "length"
        else:
            self._add_tokens(delta, output)
        self.finished = delta.finish_reason is not None
        self._owner.on_delta(self, delta)
        self.started = True
        return delta.finish_reason

    def on_failed(self, error: RequestError) -> None:
        self.finished = True
        self._owner.on_failed(error)

    def flush(self) -> None:
        self._owner.flush()

    def _open(self, delta: Delta, output: Output) -> None:
        """The echoed prompt, with its logprobs when they were asked for."""
        delta.text = self._echo
        if output.prompt_logprobs is not None and self._options.echo:
            delta.logprobs = list(output.prompt_logprobs)
            delta.offsets = list(self._prompt_offsets)

    def _add_tokens(self, delta: Delta, output: Output) -> None:
        token_ids, detokenizer = output.token_ids, self._detokenizer
        last = len(token_ids) - 1
        for i, token_id in enumerate(token_ids):
            offset = len(self._echo) + detokenizer.num_chars
            if i == last and self._hides(output):
                delta.offsets.append(offset)
                self.num_tokens += 1
                break
            delta.text += detokenizer.push(token_id)
            delta.offsets.append(offset)
            self.num_tokens += 1
            if detokenizer.stopped_by is not None:
                delta.finish_reason = "stop"
                delta.stop_reason = detokenizer.stopped_by
                last = i
                break
        delta.token_ids = token_ids[: last + 1]
        if output.logprobs is not None:
            delta.logprobs = [*(delta.logprobs or []), *output.logprobs[: last + 1]]
        if delta.finish_reason is None and output.finish_reason is not None:
            delta.finish_reason = output.finish_reason
            delta.text += detokenizer.finish()
            if output.stop_token_id in self._params.stop_token_ids:
                delta.stop_reason = output.stop_token_id

    def _hides(self, output: Output) -> bool:
        """Whether the last token is the one that ended the request, and not part of its text."""
        return output.stop_token_id is not None and not self._options.include_stop


def _starts(pieces: Sequence[str]) -> list[int]:
    starts, position = [], 0
    for piece in pieces:
        starts.append(position)
        position += len(piece)
    return starts
