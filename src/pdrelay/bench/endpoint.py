"""Where requests go and what their bodies look like."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import msgspec

from pdrelay.bench.request import BenchRequest
from pdrelay.errors import ConfigError

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
ENDPOINTS = {"completions": COMPLETIONS, "chat": CHAT}


def join_url(url: str, path: str) -> str:
    """`path` (beginning with /v1 or /) under a server's base URL, given with or without /v1.

    Raises:
        ConfigError: not an http(s) URL with a host.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        raise ConfigError(f"{url[:200]!r} is no server URL: write http://HOST:PORT")
    return url.rstrip("/").removesuffix("/v1") + path


class BodyEncoder:
    """Turns a BenchRequest into the JSON body of a streaming request."""

    def __init__(
        self,
        endpoint: str,
        model: str,
        *,
        ignore_eos: bool = True,
        temperature: float | None = 0.0,
        return_token_ids: bool = False,
    ) -> None:
        self._chat = endpoint.endswith("/chat/completions")
        self._encode = msgspec.json.Encoder().encode
        self._common: dict[str, Any] = {
            "model": model,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if temperature is not None:
            self._common["temperature"] = temperature
        if ignore_eos:
            self._common["ignore_eos"] = True
        if return_token_ids:
            self._common["return_token_ids"] = True

    def check(self, request: BenchRequest) -> None:
        """Raises ConfigError when this endpoint cannot take the request's prompt."""
        if (request.prompt is None) == (request.prompt_token_ids is None):
            raise ConfigError(
                f"request {request.index} has neither or both of prompt and prompt_token_ids: "
                "set exactly one"
            )
        if self._chat and request.prompt is None:
            raise ConfigError(
                "the chat endpoint takes text, not token ids: give prompts as text or use "
                f"{COMPLETIONS}"
            )

    def __call__(self, request: BenchRequest) -> bytes:
        body: dict[str, Any] = dict(self._common)
        if self._chat:
            body["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            body["prompt"] = (
                request.prompt if request.prompt is not None else request.prompt_token_ids
            )
        body["max_tokens"] = request.max_tokens
        if request.extra_body:
            body.update(request.extra_body)
        return self._encode(body)


def make_headers(headers: dict[str, str] | None, api_key: str | None) -> dict[str, str]:
    """Headers of every request; `api_key` becomes a bearer token."""
    result = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    result.update(headers or {})
    if api_key is not None:
        result["Authorization"] = f"Bearer {api_key}"
    return result
