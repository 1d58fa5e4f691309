"""From a decoded body to engine requests: a `Job`, which is valid by construction."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from pdrelay.core.sampling_params import SamplingParams
from pdrelay.core.token_ids import TokenIds
from pdrelay.errors import InvalidRequestError
from pdrelay.model.chat_template import ChatTemplate
from pdrelay.router.config import ModelInfo, RouterConfig
from pdrelay.router.openai.choice import TextOptions
from pdrelay.router.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerateRequest,
    decode_field,
)
from pdrelay.router.openai.token_list import TokenLists

_MAX_STOP_STRINGS = 64
_MAX_STOP_CHARS = 1024
_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
_UNSUPPORTED = (
    "tools",
    "functions",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "prompt_embeds",
    "chat_template",
)
_EMPTY_JSON = (b"null", b"[]", b"{}", b"false")
_UINT64 = 2**64


@dataclass(frozen=True)
class Prompt:
    """`text` is what the client sent, None for token ids."""

    token_ids: TokenIds
    text: str | None = None


@dataclass(frozen=True)
class Job:
    """One HTTP request, checked. Choice i belongs to prompt i // n."""

    prompts: list[Prompt]
    params: list[SamplingParams]  # one a prompt; choices differ in their seed only
    n: int
    options: TextOptions
    stream: bool
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    tokens_as_ids: bool = False
    num_top_logprobs: int | None = None  # shown a token; None: no logprobs
    cache_salt: str = ""

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.n

    def params_of(self, choice: int) -> SamplingParams:
        prompt, sibling = divmod(choice, self.n)
        params = self.params[prompt]
        if sibling == 0:
            return params
        return msgspec.structs.replace(params, seed=(params.seed + sibling) % _UINT64)


@dataclass(frozen=True)
class Limits:
    """What requests are checked against."""

    model: ModelInfo
    config: RouterConfig = field(default_factory=RouterConfig)


# ---- prompts


async def completion_prompts(
    body: CompletionRequest, token_lists: TokenLists
) -> list[str] | list[TokenIds]:
    """The four forms of `prompt`, as a list. Raises InvalidRequestError."""
    raw = b"null" if isinstance(body.prompt, UnsetType) else bytes(body.prompt).strip()
    if raw == b"null":
        raise InvalidRequestError("prompt is missing", "prompt")
    if raw[:1] == b'"':
        return [decode_field(raw, str, "prompt")]
    if raw[:1] != b"[":
        raise InvalidRequestError(
            "prompt must be text, a list of texts, token ids, or a list of lists of token ids",
            "prompt",
        )
    inner = raw[1:64].lstrip()[:1] or raw[1:].lstrip()[:1]
    if inner == b"]":
        raise InvalidRequestError("prompt is empty", "prompt")
    if inner == b'"':
        texts: list[str] = decode_field(raw, list[str], "prompt")
        return texts
    try:
        if inner == b"[":
            return token_lists.read_lists(raw, "prompt")
        return [await token_lists.read(raw, "prompt")]
    except InvalidRequestError as error:
        raise InvalidRequestError(
            f"{error} (the vocabulary has {token_lists.vocab_size} token ids)", "prompt"
        ) from None


def check_prompt_count(count: int, config: RouterConfig) -> None:
    """Before any of them is tokenized. Raises InvalidRequestError."""
    if count > config.max_num_requests:
        raise InvalidRequestError(
            f"{count} prompts are more than the {config.max_num_requests} requests that the "
            "server takes at once: send fewer",
            "prompt",
        )


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages with plain text as content, as chat templates expect. Raises InvalidRequestError."""
    if not messages:
        raise InvalidRequestError("messages is empty", "messages")
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _check_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequestError(f"{where}.role must be a text such as 'user'", "messages")
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_part_text(part, f"{where}.content") for part in content)
    if content is not None and not isinstance(content, str):
        raise InvalidRequestError(f"{where}.content must be text", "messages")
    if content is None and role == "user":
        raise InvalidRequestError(f"{where}.content is missing", "messages")
    return {**message, "content": content}


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise InvalidRequestError(
        f"{where} has a part of type {kind!r}: this model takes text only", "messages"
    )


def render_chat(
    template: ChatTemplate | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    variables: Mapping[str, Any] | None,
) -> str:
    """Prompt text of a chat. Raises InvalidRequestError."""
    if template is None:
        raise InvalidRequestError("the model has no chat template: use /v1/completions", "messages")
    go_on = bool(continue_final_message)
    if go_on and add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt exclude each other",
            "continue_final_message",
        )
    return template.render(
        check_messages(messages),
        add_generation_prompt=not go_on if add_generation_prompt is None else add_generation_prompt,
        continue_final_message=go_on,
        variables=variables,
    )


def check_prompt(prompt: Prompt, model: ModelInfo, param: str) -> None:
    """Raises InvalidRequestError unless the prompt leaves room for a token."""
    token_ids = prompt.token_ids
    if not token_ids:
        raise InvalidRequestError("the prompt has no tokens", param)
    if len(token_ids) >= model.max_model_len:
        raise InvalidRequestError(
            f"the prompt has {len(token_ids)} tokens, the model's context is "
            f"{model.max_model_len}, output included: shorten the prompt",
            param,
        )


# ---- sampling


def completion_job(body: CompletionRequest, prompts: list[Prompt], limits: Limits) -> Job:
    """Raises InvalidRequestError."""
    if body.suffix:
        raise InvalidRequestError("suffix is not supported", "suffix")
    echo = bool(body.echo)
    max_tokens = _DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not echo:
        raise InvalidRequestError("max_tokens must be at least 1 without echo", "max_tokens")
    _check_logprobs(body.logprobs, "logprobs", limits)
    return _job(
        body,
        prompts,
        limits,
        max_tokens=max(max_tokens, 1),
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if echo else None,
        echo=echo,
        echo_only=max_tokens == 0,
    )


def chat_job(body: ChatCompletionRequest, prompt: Prompt, limits: Limits) -> Job:
    """Raises InvalidRequestError."""
    max_tokens, param = body.max_completion_tokens, "max_completion_tokens"
    if max_tokens is None:
        max_tokens, param = body.max_tokens, "max_tokens"
    if max_tokens == 0:
        raise InvalidRequestError(f"{param} must be at least 1", param)
    top = body.top_logprobs or 0
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs=true", "top_logprobs")
    _check_logprobs(top, "top_logprobs", limits)
    return _job(
        body, [prompt], limits, max_tokens=max_tokens, logprobs=top if body.logprobs else None
    )


def _check_logprobs(count: int | None, param: str, limits: Limits) -> None:
    most = limits.config.max_logprobs
    if count is not None and count > most:
        raise InvalidRequestError(f"{param} is {count}, at most {most} are given", param)


def _job(
    body: GenerateRequest,
    prompts: list[Prompt],
    limits: Limits,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    echo: bool = False,
    echo_only: bool = False,
) -> Job:
    _check_unsupported(body)
    n = _check_n(body, len(prompts), limits.config)
    stream = bool(body.stream)
    if body.stream_options is not None and not stream:
        raise InvalidRequestError("stream_options needs stream=true", "stream_options")
    stream_options = body.stream_options
    _check_min_tokens(body, max_tokens)
    base = _sampling_params(body, limits.model, logprobs, prompt_logprobs)
    return Job(
        prompts=prompts,
        params=[_fit(base, len(p.token_ids), max_tokens, limits.model) for p in prompts],
        n=n,
        options=TextOptions(
            stop=_stop_strings(body.stop),
            include_stop=bool(body.include_stop_str_in_output),
            skip_special_tokens=body.skip_special_tokens is not False,
            echo=echo,
            echo_only=echo_only,
        ),
        stream=stream,
        include_usage=bool(stream_options and stream_options.include_usage),
        continuous_usage=bool(
            stream_options
            and stream_options.include_usage
            and stream_options.continuous_usage_stats
        ),
        return_token_ids=bool(body.return_token_ids),
        tokens_as_ids=bool(body.return_tokens_as_token_ids),
        num_top_logprobs=logprobs,
        cache_salt=body.cache_salt or "",
    )


def _check_unsupported(body: GenerateRequest) -> None:
    for name in _UNSUPPORTED:
        value = getattr(body, name, UNSET)
        if value is not UNSET and bytes(value).strip() not in _EMPTY_JSON:
            raise InvalidRequestError(f"{name} is not supported; leave it out", name)
    if body.response_format is not None and body.response_format.type != "text":
        raise InvalidRequestError(
            f"response_format {body.response_format.type!r} is not supported; only 'text' is",
            "response_format",
        )
    if body.use_beam_search:
        raise InvalidRequestError("use_beam_search is not supported", "use_beam_search")


def _check_n(body: GenerateRequest, num_prompts: int, config: RouterConfig) -> int:
    n = 1 if body.n is None else body.n
    if body.best_of is not None and body.best_of != n:
        raise InvalidRequestError(
            f"best_of is {body.best_of}, n is {n}: only equal values are supported", "best_of"
        )
    if n > config.max_choices:
        raise InvalidRequestError(f"n is {n}, at most {config.max_choices} are given", "n")
    if n * num_prompts > config.max_num_requests:
        raise InvalidRequestError(
            f"{num_prompts} prompts times n={n} are more than the {config.max_num_requests} "
            "requests that the server takes at once: send fewer",
            "n",
        )
    return n


def _check_min_tokens(body: GenerateRequest, max_tokens: int | None) -> None:
    if body.min_tokens and max_tokens is not None and body.min_tokens > max_tokens:
        raise InvalidRequestError(
            f"min_tokens is {body.min_tokens}, more than max_tokens, {max_tokens}", "min_tokens"
        )


def _stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    strings = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if len(strings) > _MAX_STOP_STRINGS:
        raise InvalidRequestError(f"stop has more than {_MAX_STOP_STRINGS} strings", "stop")
    for string in strings:
        if not 1 <= len(string) <= _MAX_STOP_CHARS:
            raise InvalidRequestError(
                f"a stop string must have 1 to {_MAX_STOP_CHARS} characters", "stop"
            )
    return tuple(dict.fromkeys(strings))


def _sampling_params(
    body: GenerateRequest, model: ModelInfo, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    """All but the lengths. What is left out comes from generation_config, then from the API."""
    defaults = model.generation
    stop_token_ids = tuple(dict.fromkeys(body.stop_token_ids or ()))
    _check_ids(stop_token_ids, "stop_token_ids", model)
    logit_bias = body.logit_bias or {}
    _check_ids(logit_bias, "logit_bias", model)
    return SamplingParams(
        max_tokens=1,
        seed=secrets.randbits(63) if body.seed is None else body.seed % _UINT64,
        client_seed=body.seed is not None,
        min_tokens=body.min_tokens or 0,
        temperature=_first(body.temperature, defaults.temperature, 1.0),
        top_k=max(int(_first(body.top_k, defaults.top_k, 0)), 0),
        top_p=_first(body.top_p, defaults.top_p, 1.0),
        min_p=_first(body.min_p, defaults.min_p, 0.0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=_first(body.repetition_penalty, defaults.repetition_penalty, 1.0),
        logit_bias=logit_bias,
        stop_token_ids=stop_token_ids,
        eos_token_ids=defaults.eos_token_ids,
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _check_ids(
    token_ids: Sequence[int] | Mapping[int, float], param: str, model: ModelInfo
) -> None:
    for token_id in token_ids:
        if token_id >= model.vocab_size:
            raise InvalidRequestError(
                f"{param} has token id {token_id}, outside the vocabulary of {model.vocab_size}",
                param,
            )


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _fit(
    base: SamplingParams, num_prompt_tokens: int, max_tokens: int | None, model: ModelInfo
) -> SamplingParams:
    """`max_tokens` capped to what the context leaves."""
    room = model.max_model_len - num_prompt_tokens
    most = room if max_tokens is None else min(max_tokens, room)
    return msgspec.structs.replace(base, max_tokens=most, min_tokens=min(base.min_tokens, most))
