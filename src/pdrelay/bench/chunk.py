"""One streamed chunk of /v1/completions or /v1/chat/completions, as far as a client measures it."""

from __future__ import annotations

from typing import Any

import msgspec


class Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: PromptTokensDetails | None = None


class Chunk(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None  # a failure in mid-stream
    object: str = ""
    message: str = ""  # of {"object": "error"}, an older form of it


decode_chunk = msgspec.json.Decoder(Chunk).decode


def carries_tokens(choice: Choice) -> bool:
    """Whether this chunk holds at least one token.

    Token ids decide where the server sends them. Otherwise text does; an empty text before the
    end is a token too, whose bytes the server still holds back (an incomplete UTF-8 character).
    The role chunk that opens a chat and the empty chunk that only names the finish reason are not.
    """
    if choice.token_ids is not None:
        return bool(choice.token_ids)
    delta = choice.delta
    if delta is None:
        return bool(choice.text) or choice.finish_reason is None
    if delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls:
        return True
    return delta.content == "" and delta.role is None and choice.finish_reason is None


def error_text(error: Any) -> str:
    """The message of an OpenAI-shaped error object, or of whatever came instead; one line."""
    if isinstance(error, dict):
        inner = error.get("error", error)
        error = inner.get("message", inner) if isinstance(inner, dict) else inner
    return " ".join(str(error).split())[:500]


def error_text_of_body(body: bytes) -> str:
    """The message in an HTTP error's body, JSON or not; one line."""
    try:
        return error_text(msgspec.json.decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return " ".join(body.decode("utf-8", "replace").split())[:500]
