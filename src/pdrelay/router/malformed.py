"""HTTP that never reaches the application, answered in OpenAI's shape.

What aiohttp's parser refuses (a bad request line, an oversized header, a wrong Content-Length) gets
no middleware: the connection's protocol answers it.
"""

from __future__ import annotations

from typing import Any, Self

from aiohttp import web

from pdrelay.errors import RequestError
from pdrelay.router.openai.errors import MalformedHttpError, error_response

_MAX_MESSAGE_CHARS = 200


class JsonErrorServer(web.Server):
    """A web.Server whose connections are JsonErrorHandlers."""

    @classmethod
    def like(cls, server: web.Server) -> Self:
        """One that serves the same application. `server` must have no connection yet."""
        return cls(
            server.request_handler,
            request_factory=server.request_factory,
            handler_cancellation=server.handler_cancellation,
            **server._kwargs,
        )

    def __call__(self) -> web.RequestHandler:
        return JsonErrorHandler(self, loop=self._loop, **self._kwargs)


class JsonErrorHandler(web.RequestHandler):
    """One connection."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to a request that the application has not answered; the connection ends.

        Raises ConnectionError when a part of an answer has left already.
        """
        super().handle_error(request, status, exc, message)
        response = error_response(_error(status, message), retry_after_s=0)
        response.force_close()
        return response


def _error(status: int, message: str | None) -> RequestError:
    if status < 500:
        error: RequestError = MalformedHttpError(_one_line(message))
    else:
        error = RequestError("internal error in the front door; see its log")
    error.status = status
    return error


def _one_line(message: Any) -> str:
    """aiohttp shows the place in further lines, as bytes of the request."""
    lines = str(message or "").strip().splitlines()
    what = lines[0].rstrip(": ")[:_MAX_MESSAGE_CHARS] if lines else "it cannot be parsed"
    return f"malformed HTTP request: {what}"
