"""Errors as HTTP: OpenAI's error object, the status, `Retry-After` where trying again helps."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from pdrelay.errors import InvalidRequestError, OverloadedError, RequestError, WorkerLostError

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class UnauthorizedError(RequestError):
    status = 401
    code = "invalid_api_key"


class NotFoundError(InvalidRequestError):
    status = 404
    code = "not_found"


class ModelNotFoundError(NotFoundError):
    code = "model_not_found"


class MethodNotAllowedError(RequestError):
    status = 405
    code = "method_not_allowed"


class MalformedHttpError(InvalidRequestError):
    code = "malformed_http"


class SlowBodyError(RequestError):
    status = 408
    code = "request_timeout"


class BodyTooLargeError(RequestError):
    status = 413
    code = "request_too_large"


def error_object(error: RequestError) -> dict[str, Any]:
    """{"error": {message, type, param, code}}."""
    default = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": str(error),
            "type": _TYPES.get(error.status, default),
            "param": getattr(error, "param", None),
            "code": error.code,
        }
    }


def error_response(error: RequestError, retry_after_s: int) -> web.Response:
    response = web.Response(
        status=error.status,
        body=msgspec.json.encode(error_object(error)),
        content_type="application/json",
    )
    if isinstance(error, OverloadedError):
        response.headers["Retry-After"] = str(error.retry_after)
    elif isinstance(error, WorkerLostError):
        response.headers["Retry-After"] = str(retry_after_s)
    elif isinstance(error, UnauthorizedError):
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def from_http_exception(error: web.HTTPException, request: web.Request) -> RequestError:
    """aiohttp's own refusals, in our shape."""
    where = f"{request.method} {request.path}"
    match error:
        case web.HTTPNotFound():
            return NotFoundError(f"no such path: {where}")
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            return MethodNotAllowedError(f"{where} is not allowed; use {allowed}")
        case web.HTTPRequestEntityTooLarge():
            return BodyTooLargeError("the body is larger than the server takes: send less")
    other = RequestError(error.reason)
    other.status, other.code = error.status, "http_error"
    return other
