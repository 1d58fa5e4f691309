"""Serves the application with the settings that it relies on."""

from __future__ import annotations

import logging
from typing import Any

from aiohttp import web

from pdrelay.router.config import RouterConfig
from pdrelay.router.malformed import JsonErrorServer


def runner_options(config: RouterConfig) -> dict[str, Any]:
    """Keyword arguments of `web.AppRunner`.

    `handler_cancellation` is how a client's leaving reaches its requests. `keepalive_timeout` also
    bounds how long a connection may take over its request line and headers. aiohttp logs a
    traceback for every malformed request: its logger is silent, ours tells of real failures.
    """
    silent = logging.Logger("aiohttp.server", logging.CRITICAL + 1)
    return {
        "access_log": None,
        "handler_cancellation": True,
        "keepalive_timeout": config.keepalive_timeout_s,
        "shutdown_timeout": config.drain_timeout_s,
        "logger": silent,
    }


def make_runner(app: web.Application, config: RouterConfig) -> web.AppRunner:
    return _Runner(app, **runner_options(config))


class _Runner(web.AppRunner):
    """An AppRunner whose server answers malformed HTTP in JSON.

    aiohttp has no setting for it, so this relies on `_make_server`, seen in 3.14. Should
    it go, such requests are answered by aiohttp's own plain text again.
    """

    async def _make_server(self) -> web.Server:
        return JsonErrorServer.like(await super()._make_server())
