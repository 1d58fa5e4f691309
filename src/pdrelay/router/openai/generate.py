"""/v1/completions and /v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
import uuid

from aiohttp import HttpVersion11, web

from pdrelay.core.clock import monotonic_ns
from pdrelay.core.messages import EngineRequest
from pdrelay.core.token_ids import TokenIds
from pdrelay.errors import OverloadedError
from pdrelay.model.chat_template import ChatTemplate
from pdrelay.router.config import ModelInfo, RouterConfig
from pdrelay.router.flow import Flow
from pdrelay.router.metrics import Metrics
from pdrelay.router.openai.body import check_model, encode, give_way, read_body
from pdrelay.router.openai.choice import Choice
from pdrelay.router.openai.formats import ChatFormat, CompletionFormat, Format
from pdrelay.router.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerateRequest,
    decode_body,
)
from pdrelay.router.openai.response import Response, StreamedResponse, WholeResponse
from pdrelay.router.openai.token_list import TokenLists
from pdrelay.router.openai.validate import (
    Job,
    Limits,
    Prompt,
    chat_job,
    check_prompt,
    check_prompt_count,
    completion_job,
    completion_prompts,
    render_chat,
)

_MAX_CLIENT_ID_CHARS = 256
_SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class Generator:
    """The two endpoints that make text."""

    def __init__(
        self,
        config: RouterConfig,
        model: ModelInfo,
        template: ChatTemplate | None,
        flow: Flow,
        metrics: Metrics,
    ) -> None:
        self._config = config
        self._model = model
        self._template = template
        self._flow = flow
        self._metrics = metrics
        self._limits = Limits(model, config)
        self._token_lists = TokenLists(model.vocab_size)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        raw = await read_body(request, self._config)
        arrived_ns = monotonic_ns()
        body = decode_body(raw, CompletionRequest)
        check_model(body.model, self._model)
        self._refuse_when_full()
        await give_way(raw)
        given = await completion_prompts(body, self._token_lists)
        check_prompt_count(len(given), self._config)
        prompts = [await self._completion_prompt(body, each) for each in given]
        for prompt in prompts:
            check_prompt(prompt, self._model, "prompt")
        job = completion_job(body, prompts, self._limits)
        await give_way(raw)
        return await self._respond(request, job, CompletionFormat, arrived_ns)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        raw = await read_body(request, self._config)
        arrived_ns = monotonic_ns()
        body = decode_body(raw, ChatCompletionRequest)
        check_model(body.model, self._model)
        self._refuse_when_full()
        await give_way(raw)
        text = render_chat(
            self._template,
            body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            variables=body.chat_template_kwargs,
        )
        prompt = await self._text_prompt(body, text, default_special=False, param="messages")
        check_prompt(prompt, self._model, "messages")
        job = chat_job(body, prompt, self._limits)
        await give_way(raw)
        return await self._respond(request, job, ChatFormat, arrived_ns)

    async def _completion_prompt(self, body: CompletionRequest, prompt: str | TokenIds) -> Prompt:
        if isinstance(prompt, str):
            return await self._text_prompt(body, prompt, default_special=True, param="prompt")
        return Prompt(prompt)

    async def _text_prompt(
        self, body: GenerateRequest, text: str, *, default_special: bool, param: str
    ) -> Prompt:
        """A chat template writes its own special tokens; plain text gets the tokenizer's."""
        asked = body.add_special_tokens
        special = default_special if asked is None else asked
        token_ids = await encode(text, self._model, add_special_tokens=special, param=param)
        return Prompt(token_ids, text)

    # ---- admission: at once or not at all

    def _refuse_when_full(self) -> None:
        """Before any tokenizing."""
        if self._flow.num_requests >= self._config.max_num_requests:
            raise OverloadedError(
                f"{self._flow.num_requests} requests are in flight, the most the server takes: "
                "try again later",
                self._config.retry_after_s,
            )

    def _admit(self, job: Job) -> None:
        """Raises OverloadedError. A lone request is always admitted."""
        if self._flow.num_requests + job.num_choices > self._config.max_num_requests:
            raise OverloadedError(
                f"{self._flow.num_requests} requests are in flight and {job.num_choices} more "
                f"would pass the limit of {self._config.max_num_requests}: try again later",
                self._config.retry_after_s,
            )
        waiting = self._flow.waiting_tokens
        new = job.n * sum(len(prompt.token_ids) for prompt in job.prompts)
        if waiting and waiting + new > self._config.max_waiting_tokens:
            raise OverloadedError(
                f"{waiting} prompt tokens are waiting and {new} more would pass the limit of "
                f"{self._config.max_waiting_tokens}: try again later",
                self._config.retry_after_s,
            )

    # ---- the response

    async def _respond(
        self, request: web.Request, job: Job, format_type: type[Format], arrived_ns: int
    ) -> web.StreamResponse:
        self._admit(job)
        response_id = uuid.uuid4().hex
        client_id = _client_request_id(request)
        form = format_type(
            job,
            self._model.tokenizer,
            response_id=response_id,
            created=int(time.time()),
            model=self._model.served_model_name,
        )
        headers = {"X-Request-Id": client_id or response_id}
        if not job.stream:
            whole = WholeResponse(job, form)
            try:
                self._submit(whole, job, response_id, client_id, arrived_ns)
                return await _answer_whole(whole, headers)
            finally:
                self._abort_open(whole)
        streamed = StreamedResponse(job, form, max_buffer=self._config.max_stream_buffer)
        try:
            self._submit(streamed, job, response_id, client_id, arrived_ns)
            return await self._answer_stream(request, streamed, headers)
        finally:
            self._abort_open(streamed)

    def _submit(
        self, response: Response, job: Job, response_id: str, client_id: str, arrived_ns: int
    ) -> None:
        requests = [
            EngineRequest(
                request_id=f"{response_id}-{i}",
                prompt_token_ids=job.prompts[i // job.n].token_ids,
                params=job.params_of(i),
                arrived_ns=arrived_ns,
                cache_salt=job.cache_salt,
            )
            for i in range(job.num_choices)
        ]
        response.choices = [
            Choice(
                response,
                i,
                request_id=each.request_id,
                prompt_token_ids=job.prompts[i // job.n].token_ids,
                prompt=job.prompts[i // job.n].text,
                params=each.params,
                options=job.options,
                tokenizer=self._model.tokenizer,
            )
            for i, each in enumerate(requests)
        ]
        for each, choice in zip(requests, response.choices, strict=True):
            self._flow.submit(each, choice, client_id)

    def _abort_open(self, response: Response) -> None:
        """Nothing to do unless the client left, or one choice of several failed."""
        for choice in response.choices:
            if not choice.finished:
                self._flow.abort(choice.request_id, "the client is gone")

    async def _answer_stream(
        self, request: web.Request, response: StreamedResponse, headers: dict[str, str]
    ) -> web.StreamResponse:
        await response.started.wait()
        if response.refused:
            assert response.error is not None
            raise response.error
        stream = _EventStream(headers={**_SSE_HEADERS, **headers})
        await stream.prepare(request)
        await stream.write(response.take())
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client is gone")
        response.attach(transport, chunked=request.version >= HttpVersion11)
        await response.over.wait()
        if response.error is not None:
            self._metrics.failed(response.error.code)
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                await stream.write_eof()
        except TimeoutError:
            transport.abort()  # the client no longer reads
            raise ConnectionResetError("the client does not read") from None
        return stream


class _EventStream(web.StreamResponse):
    """Its head leaves with the first tokens, in one call of the kernel instead of two.

    aiohttp has no public setting for it; without this attribute (3.12 and later have it) the head
    leaves first.
    """

    _send_headers_immediately = False


async def _answer_whole(response: WholeResponse, headers: dict[str, str]) -> web.Response:
    await response.over.wait()
    if response.error is not None:
        raise response.error
    return web.Response(body=response.body(), content_type="application/json", headers=headers)


def _client_request_id(request: web.Request) -> str:
    """The client's X-Request-Id as far as it can be logged and sent back; "" without one."""
    given = request.headers.get("X-Request-Id", "")[:_MAX_CLIENT_ID_CHARS]
    return given if given.isascii() and given.isprintable() else ""
