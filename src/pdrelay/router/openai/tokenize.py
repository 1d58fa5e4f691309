"""/tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

import msgspec
from aiohttp import web

from pdrelay.errors import InvalidRequestError
from pdrelay.model.chat_template import ChatTemplate
from pdrelay.router.config import ModelInfo, RouterConfig
from pdrelay.router.openai.body import check_model, encode, read_body
from pdrelay.router.openai.protocol import DetokenizeRequest, TokenizeRequest, decode_body
from pdrelay.router.openai.validate import render_chat


class Tokenized(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct):
    prompt: str


class TokenizeEndpoints:
    def __init__(
        self, config: RouterConfig, model: ModelInfo, template: ChatTemplate | None
    ) -> None:
        self._config = config
        self._model = model
        self._template = template

    async def tokenize(self, request: web.Request) -> web.Response:
        body = decode_body(await read_body(request, self._config), TokenizeRequest)
        check_model(body.model, self._model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("give either prompt or messages", "prompt")
        chat = body.prompt is None
        text = self._render(body) if body.prompt is None else body.prompt
        special = not chat if body.add_special_tokens is None else body.add_special_tokens
        encoded = await encode(text, self._model, add_special_tokens=special, param="prompt")
        tokens = encoded.tolist()
        strings = None
        if body.return_token_strs:
            strings = [self._model.tokenizer.token_text(token_id) for token_id in tokens]
        return _json(Tokenized(len(tokens), self._model.max_model_len, tokens, strings))

    def _render(self, body: TokenizeRequest) -> str:
        return render_chat(
            self._template,
            body.messages or [],
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            variables=body.chat_template_kwargs,
        )

    async def detokenize(self, request: web.Request) -> web.Response:
        body = decode_body(await read_body(request, self._config), DetokenizeRequest)
        check_model(body.model, self._model)
        for token_id in body.tokens:
            if token_id >= self._model.vocab_size:
                raise InvalidRequestError(
                    f"token id {token_id} is outside the vocabulary of {self._model.vocab_size}",
                    "tokens",
                )
        text = self._model.tokenizer.decode(body.tokens, skip_special_tokens=False)
        return _json(Detokenized(text))


def _json(body: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")
