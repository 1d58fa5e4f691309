"""Request bodies as clients send them: OpenAI's fields, and vLLM's on top.

Types and ranges are checked while the JSON is decoded; unknown fields are ignored. Only a
`validate` module turns one of these into engine requests.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, Raw, UnsetType

from pdrelay.errors import InvalidRequestError

_INT64_MAX = 2**63 - 1
_MAX_COUNT = 2**31 - 1

Count = Annotated[int, Meta(ge=0, le=_MAX_COUNT)]
TokenId = Annotated[int, Meta(ge=0, le=_MAX_COUNT)]
Seed = Annotated[int, Meta(ge=-_INT64_MAX - 1, le=_INT64_MAX)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Text = Annotated[str, Meta(min_length=1)]


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM: usage in every chunk


class ResponseFormat(msgspec.Struct, frozen=True):
    type: str = "text"


class GenerateRequest(msgspec.Struct, kw_only=True):
    """What both endpoints share. None is the same as left out."""

    model: str | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    n: Annotated[int, Meta(ge=1, le=_MAX_COUNT)] | None = None
    best_of: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    seed: Seed | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=_MAX_COUNT)] | None = None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=100.0)] | None = None
    logit_bias: dict[TokenId, Annotated[float, Meta(ge=-100.0, le=100.0)]] | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: Text | None = None
    response_format: ResponseFormat | None = None
    # Named so that they are refused and not ignored: they would change the answer.
    tools: Raw | UnsetType = UNSET
    functions: Raw | UnsetType = UNSET
    use_beam_search: bool | None = None
    guided_json: Raw | UnsetType = UNSET
    guided_regex: Raw | UnsetType = UNSET
    guided_choice: Raw | UnsetType = UNSET
    guided_grammar: Raw | UnsetType = UNSET
    structured_outputs: Raw | UnsetType = UNSET


class CompletionRequest(GenerateRequest, kw_only=True):
    """/v1/completions. `prompt`: text, texts, token ids, or lists of token ids."""

    prompt: Raw | UnsetType = UNSET
    prompt_embeds: Raw | UnsetType = UNSET
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Count | None = None


class ChatCompletionRequest(GenerateRequest, kw_only=True):
    """/v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: Raw | UnsetType = UNSET


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """/tokenize: either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """/detokenize."""

    model: str | None = None
    tokens: list[TokenId]


Body = TypeVar("Body", bound=msgspec.Struct)

_PATH = re.compile(r"(?: - at `(?P<path>.*)`)$")
_FIELD = re.compile(r"(?:key` in `)?\$\.?(?P<field>\w*)")


def decode_body(body: bytes, body_type: type[Body]) -> Body:
    """Raises InvalidRequestError, with `param` where a field is to blame."""
    try:
        return msgspec.json.decode(body, type=body_type)
    except msgspec.ValidationError as error:
        raise validation_error(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise InvalidRequestError("the body is not valid JSON: it is nested too deeply") from None


def decode_field(raw: bytes, field_type: Any, name: str) -> Any:
    """Decode one field that was kept raw. Raises InvalidRequestError."""
    try:
        return msgspec.json.decode(raw, type=field_type)
    except msgspec.ValidationError as error:
        raise validation_error(error, name) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{name} is not valid JSON: {error}", name) from None
    except RecursionError:
        raise InvalidRequestError(f"{name} is nested too deeply", name) from None


def validation_error(error: msgspec.ValidationError, name: str = "") -> InvalidRequestError:
    """msgspec's words, with the field that they are about as `param`."""
    text = str(error)
    at = _PATH.search(text)
    if at is None:
        missing = re.search(r"missing required field `(\w+)`", text)
        return InvalidRequestError(
            f"{name}: {text}" if name else text, missing[1] if missing else name or None
        )
    field = _FIELD.search(at["path"])
    param = name or (field["field"] if field else "")
    where = at["path"].replace("$.", "", 1) if not name else at["path"].replace("$", name, 1)
    return InvalidRequestError(f"{where}: {text[: at.start()]}".replace("`", ""), param or None)
