"""What happens to every HTTP request: it gets an id, is counted and timed, and may need an API key.

This is the edge where bugs become a 500 and a traceback in the log.
"""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from memserve.server.errors import bug_response, unauthorized_response
from memserve.server.metrics import Metrics
from memserve.server.tenants import Tenants

log = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
_SAFE_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_DISCONNECTED = 499
"""Status in metrics when the client was gone before the answer began (nginx's convention)."""


class EveryRequest:
    """ASGI middleware; the outermost one, so that it sees every response.

    A key of ``tenants`` guards all paths under ``/v1``; probes and metrics stay open.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, tenants: Tenants) -> None:
        self._app = app
        self._metrics = metrics
        self._tenants = tenants

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _choose_id(headers.get(REQUEST_ID))
        arrived = self._metrics.begin_request()
        scope.setdefault("state", {}).update(request_id=request_id, arrived=arrived)
        status = _DISCONNECTED

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            if self._may_enter(scope["path"], headers.get("authorization", "")):
                await self._app(scope, receive, send_marked)
            else:
                await unauthorized_response()(scope, receive, send_marked)
        except Exception:
            log.exception("bug in request %s", request_id)
            if status != _DISCONNECTED:
                raise
            await bug_response()(scope, receive, send_marked)
        finally:
            self._metrics.end_request(_endpoint(scope), status, arrived)

    def _may_enter(self, path: str, given: str) -> bool:
        return not path.startswith("/v1") or self._tenants.may_enter(given)


def request_id_of(request: HTTPConnection) -> str:
    """The id that this HTTP request goes by."""
    return str(request.state.request_id)


def arrival_of(request: HTTPConnection) -> float:
    """When the request arrived, on the metrics' clock, s."""
    return float(request.state.arrived)


def _choose_id(given: str | None) -> str:
    if given is not None and _SAFE_ID.fullmatch(given):
        return given
    return uuid.uuid4().hex


def _endpoint(scope: Scope) -> str:
    """The route's path, so that made-up paths do not make up metrics."""
    return str(getattr(scope.get("route"), "path", "other"))
