"""The front door's HTTP side: routes, and what surrounds every request."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from pdrelay import __version__
from pdrelay.errors import RequestError
from pdrelay.model.chat_template import load_chat_template
from pdrelay.router.cluster import Cluster
from pdrelay.router.config import ModelInfo, RouterConfig
from pdrelay.router.event_log import EventLog
from pdrelay.router.flow import Flow
from pdrelay.router.metrics import CONTENT_TYPE, Metrics
from pdrelay.router.openai.errors import (
    ModelNotFoundError,
    UnauthorizedError,
    error_response,
    from_http_exception,
)
from pdrelay.router.openai.generate import Generator
from pdrelay.router.openai.tokenize import TokenizeEndpoints

FLOW: web.AppKey[Flow] = web.AppKey("flow", Flow)
METRICS: web.AppKey[Metrics] = web.AppKey("metrics", Metrics)
_log = logging.getLogger(__name__)


def build_app(
    config: RouterConfig,
    model: ModelInfo,
    cluster: Cluster,
    event_log: EventLog,
    down: Callable[[], dict[str, str]] | None = None,
) -> web.Application:
    """The application of one front door; it listens to the cluster from now on.

    `down`: a supervisor's word on which instances are not ready, and why. Serve it with
    `handler_cancellation=True`, which is how a client's leaving is noticed (`server.make_runner`).
    Raises ModelError for a broken chat template.
    """
    metrics = Metrics(model.served_model_name, cluster)
    flow = Flow(
        cluster,
        metrics,
        event_log,
        request_timeout_s=config.request_timeout_s,
        first_token_timeout_s=config.first_token_timeout_s,
    )
    app = web.Application(
        client_max_size=config.max_request_bytes,
        middlewares=[_errors(config, metrics), *_auth(config)],
    )
    app[FLOW] = flow
    app[METRICS] = metrics
    template = load_chat_template(model.tokenizer)
    generator = Generator(config, model, template, flow, metrics)
    tokenize = TokenizeEndpoints(config, model, template)
    info = _Info(model, cluster, metrics, down)
    app.add_routes(
        [
            web.post("/v1/completions", generator.completions),
            web.post("/v1/chat/completions", generator.chat_completions),
            web.get("/v1/models", info.models),
            web.get("/v1/models/{model:.+}", info.model),
            web.post("/tokenize", tokenize.tokenize),
            web.post("/detokenize", tokenize.detokenize),
            web.get("/health", info.health),
            web.get("/ping", info.health),
            web.get("/version", info.version),
            web.get("/metrics", info.metrics),
        ]
    )
    return app


def json_response(body: Any, status: int = 200) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode(body), content_type="application/json"
    )


def _errors(config: RouterConfig, metrics: Metrics) -> Middleware:
    """Every failure becomes OpenAI's error object; none ends the server."""

    @web.middleware
    async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
        headers: dict[str, str] = {}
        try:
            return await handler(request)
        except web.HTTPException as exception:
            error = from_http_exception(exception, request)
            if isinstance(exception, web.HTTPMethodNotAllowed):
                headers["Allow"] = exception.headers["Allow"]
        except RequestError as refusal:
            error = refusal
        except (asyncio.CancelledError, ConnectionError):
            raise  # the client is gone
        except Exception:
            _log.exception("%s %s failed", request.method, request.path)
            error = RequestError("internal error in the front door; see its log")
        metrics.failed(error.code)
        response = error_response(error, config.retry_after_s)
        response.headers.update(headers)
        return response

    return errors


def _auth(config: RouterConfig) -> list[Middleware]:
    if config.api_key is None:
        return []
    expected = f"Bearer {config.api_key}".encode()

    @web.middleware
    async def auth(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if request.path.startswith("/v1/") and not hmac.compare_digest(given, expected):
            raise UnauthorizedError("wrong or missing API key: send 'Authorization: Bearer KEY'")
        return await handler(request)

    return [auth]


class _Info:
    """Endpoints that only tell something."""

    def __init__(
        self,
        model: ModelInfo,
        cluster: Cluster,
        metrics: Metrics,
        down: Callable[[], dict[str, str]] | None,
    ) -> None:
        self._model = model
        self._cluster = cluster
        self._metrics = metrics
        self._down = down

    async def models(self, request: web.Request) -> web.Response:
        return json_response({"object": "list", "data": [self._card()]})

    async def model(self, request: web.Request) -> web.Response:
        name = request.match_info["model"]
        if name != self._model.served_model_name:
            raise ModelNotFoundError(f"no model {name!r}; this server has {self._card()['id']!r}")
        return json_response(self._card())

    def _card(self) -> dict[str, Any]:
        model = self._model
        return {
            "id": model.served_model_name,
            "object": "model",
            "created": model.created,
            "owned_by": "pdrelay",
            "root": model.root,
            "parent": None,
            "max_model_len": model.max_model_len,
            "vocab_size": model.vocab_size,
        }

    async def health(self, request: web.Request) -> web.Response:
        """200 only while every instance answers and has met those it hands over to."""
        sick = {**self._cluster.sick(), **(self._down() if self._down is not None else {})}
        if sick:
            return json_response({"status": "unavailable", "instances": sick}, 503)
        return json_response({"status": "ok"})

    async def version(self, request: web.Request) -> web.Response:
        return json_response({"version": __version__})

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})
