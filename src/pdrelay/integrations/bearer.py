"""An ASGI middleware for vLLM's `--middleware`: only who has our key may ask for more than health.

vLLM's own `VLLM_API_KEY` says the same, but it is one of the values by which vLLM names its compile
cache, and is written there: a key that is drawn anew makes every start compile anew.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

KEY_VARIABLE = "PDRELAY_ENGINE_KEY"
# Anybody's. vLLM guards /v1 alone, and has generation elsewhere, too: /inference/v1/generate.
_OPEN = ("/health", "/metrics", "/ping", "/version")
_REFUSAL = b'{"error": "Unauthorized"}'

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class RequireKey:
    """401 without `Authorization: Bearer KEY`, but for health, metrics and version.

    Raises KeyError when KEY_VARIABLE is not set: a server without its key must not start open.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ[KEY_VARIABLE]}".encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._guarded(scope) and not self._has_key(scope):
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": _REFUSAL})
        elif scope["type"] == "websocket" and not self._has_key(scope):
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._app(scope, receive, send)

    def _guarded(self, scope: Message) -> bool:
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        return path.rstrip("/") not in _OPEN

    def _has_key(self, scope: Message) -> bool:
        given = (value for name, value in scope["headers"] if name.lower() == b"authorization")
        return hmac.compare_digest(next(given, b""), self._expected)
