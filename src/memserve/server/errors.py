"""Errors as OpenAI's clients expect them: status, headers and the ``{"error": ...}`` body."""

from __future__ import annotations

import math
from http import HTTPStatus

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from memserve.core.errors import InvalidRequest, MemServeError, NoInstance, Overloaded, PeerLost, Refusal

RETRY_SECONDS = 1
"""What ``Retry-After`` says at least: membership and queues change within about a second."""
_RETRY_SECONDS_MOST = 600
_STATUS_OF_REFUSAL = {
    Refusal.OVERLOADED: HTTPStatus.TOO_MANY_REQUESTS,
    Refusal.TENANT_QUEUE_FULL: HTTPStatus.TOO_MANY_REQUESTS,
    Refusal.QUEUE_FULL: HTTPStatus.SERVICE_UNAVAILABLE,
    Refusal.SLO_TTFT: HTTPStatus.SERVICE_UNAVAILABLE,
}

_INVALID = "invalid_request_error"
_STATUS_OF_CODE = {
    "model_not_found": HTTPStatus.NOT_FOUND,
    "not_found": HTTPStatus.NOT_FOUND,
    "conflict": HTTPStatus.CONFLICT,
    "body_too_large": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "unsupported_media_type": HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
}


class RequestTimedOut(MemServeError):
    """A request was not finished within ``server.request_timeout`` and has been cancelled."""


class ErrorObject(msgspec.Struct, frozen=True):
    """OpenAI's error object. ``param`` names the offending field."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """The whole body of an error response, and of an error event in a stream."""

    error: ErrorObject


class Described(msgspec.Struct, frozen=True):
    """An error ready to be sent."""

    status: int
    body: ErrorBody
    retry_after: int | None = None


def describe_error(error: MemServeError) -> Described:
    """Say what a client should see of ``error``."""
    text = str(error)
    if isinstance(error, InvalidRequest):
        status = _STATUS_OF_CODE.get(error.code, HTTPStatus.BAD_REQUEST)
        return Described(status, ErrorBody(ErrorObject(text, _INVALID, error.field or None, error.code)))
    if isinstance(error, Overloaded):
        return _describe_refusal(error, text)
    if isinstance(error, NoInstance):
        return _unavailable(text, "no_instance")
    if isinstance(error, PeerLost):
        return _unavailable(text, "instance_lost")
    if isinstance(error, RequestTimedOut):
        return _described(HTTPStatus.GATEWAY_TIMEOUT, text, "timeout_error", "request_timeout")
    return _described(HTTPStatus.INTERNAL_SERVER_ERROR, text, "server_error", "request_failed")


def error_response(error: MemServeError) -> Response:
    """The HTTP response for ``error``."""
    described = describe_error(error)
    headers = {} if described.retry_after is None else {"retry-after": str(described.retry_after)}
    return _respond(described.status, described.body.error, headers)


def unauthorized_response() -> Response:
    """For a missing or wrong API key."""
    text = "Missing or wrong API key: send it as 'Authorization: Bearer KEY'."
    error = ErrorObject(text, "authentication_error", None, "invalid_api_key")
    return _respond(HTTPStatus.UNAUTHORIZED, error, {"www-authenticate": "Bearer"})


async def on_known_error(request: Request, error: Exception) -> Response:
    """FastAPI exception handler for every ``MemServeError``."""
    assert isinstance(error, MemServeError)
    return error_response(error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """FastAPI exception handler for the framework's own errors: unknown paths and wrong methods."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    allowed = (error.headers or {}).get("Allow")
    if error.status_code == HTTPStatus.NOT_FOUND:
        text, code = f"There is no {where} here; docs/api.md lists the endpoints.", "not_found"
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        text, code = f"{where} is not possible; allowed: {allowed}.", "method_not_allowed"
    else:
        text, code = f"{where}: {error.detail}", "http_error"
    return _respond(error.status_code, ErrorObject(text, _INVALID, None, code), dict(error.headers or {}))


def bug_response() -> Response:
    """For an exception that nobody raised on purpose."""
    return _respond(HTTPStatus.INTERNAL_SERVER_ERROR, internal_error().error, {"x-should-retry": "false"})


def internal_error() -> ErrorBody:
    """What clients see of our own bugs; the log has the traceback."""
    text = "Internal error; the server's log has the details under this request's x-request-id."
    return ErrorBody(ErrorObject(text, "server_error", None, "internal_error"))


def _describe_refusal(error: Overloaded, text: str) -> Described:
    status = _STATUS_OF_REFUSAL[error.reason]
    seconds = math.ceil(min(max(error.retry_after, RETRY_SECONDS), _RETRY_SECONDS_MOST))
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        return _unavailable(text, error.reason, seconds)
    return _described(status, text, "rate_limit_error", error.reason, seconds)


def _unavailable(text: str, code: str, retry_after: int = RETRY_SECONDS) -> Described:
    return _described(HTTPStatus.SERVICE_UNAVAILABLE, text, "service_unavailable_error", code, retry_after)


def _described(status: int, text: str, kind: str, code: str, retry_after: int | None = None) -> Described:
    return Described(status, ErrorBody(ErrorObject(text, kind, None, code)), retry_after)


def _respond(status: int, error: ErrorObject, headers: dict[str, str]) -> Response:
    body = msgspec.json.encode(ErrorBody(error))
    return Response(body, status, headers, media_type="application/json")
