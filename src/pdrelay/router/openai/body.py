"""Reading a request: its body within a deadline, its model, its prompt's tokens."""

from __future__ import annotations

import asyncio

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from pdrelay.core.token_ids import TokenIds, pack_ids
from pdrelay.errors import InvalidRequestError
from pdrelay.router.config import ModelInfo, RouterConfig
from pdrelay.router.openai.errors import BodyTooLargeError, ModelNotFoundError, SlowBodyError

_LONG_BODY = 1 << 14


async def read_body(request: web.Request, config: RouterConfig) -> bytes:
    """Raises BodyTooLargeError, SlowBodyError, or InvalidRequestError for broken framing."""
    too_large = BodyTooLargeError(
        f"the body is larger than {config.max_request_bytes} bytes: send less"
    )
    if (request.content_length or 0) > config.max_request_bytes:
        raise too_large
    try:
        async with asyncio.timeout(config.body_timeout_s):
            return await request.read()
    except TimeoutError:
        raise SlowBodyError(
            f"the body did not arrive within {config.body_timeout_s:g} s: send it faster"
        ) from None
    except web.HTTPRequestEntityTooLarge:
        raise too_large from None
    except (web.RequestPayloadError, HttpProcessingError) as error:
        raise InvalidRequestError(f"the body cannot be read: {error}") from None


def check_model(name: str | None, model: ModelInfo) -> None:
    """Raises ModelNotFoundError. A request without a name means the one model there is."""
    if name is not None and name != model.served_model_name:
        raise ModelNotFoundError(
            f"no model {name[:200]!r}; this server has {model.served_model_name!r}", "model"
        )


async def give_way(raw: bytes) -> None:
    """Let the tokens of other requests pass before going on with a long body."""
    if len(raw) >= _LONG_BODY:
        await asyncio.sleep(0)


async def encode(text: str, model: ModelInfo, *, add_special_tokens: bool, param: str) -> TokenIds:
    """Token ids of `text`; a long one does not hold up other requests.

    Raises InvalidRequestError for text that cannot fit the context, however it is cut.
    """
    tokenizer = model.tokenizer
    longest = tokenizer.max_token_bytes
    if longest is not None and len(text) > longest * model.max_model_len:
        raise InvalidRequestError(
            f"the prompt has {len(text)} characters, over {len(text) // longest} tokens, the "
            f"model's context is {model.max_model_len}: shorten the prompt",
            param,
        )

    def packed() -> TokenIds:
        return pack_ids(tokenizer.encode(text, add_special_tokens=add_special_tokens))

    if len(text) <= tokenizer.short_text:
        return packed()
    return await asyncio.to_thread(packed)
