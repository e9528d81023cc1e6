"""ASGI responses whose work ends when the client goes away: a whole JSON answer, and an event stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from memserve.core.errors import MemServeError
from memserve.server.errors import RequestTimedOut, describe_error, internal_error

log = logging.getLogger(__name__)

LateHeaders = Callable[[], Mapping[str, str]]
DONE = b"data: [DONE]\n\n"


def encode_event(payload: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"


def json_response(payload: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response of anything ``msgspec`` can encode."""
    return Response(msgspec.json.encode(payload), status, headers, media_type="application/json")


class _Working(Response):
    """A response that is still to be worked for, within ``seconds``, as long as the client listens.

    ``late`` headers are asked for when the status line is sent.
    """

    def __init__(self, seconds: float, headers: Mapping[str, str], late: LateHeaders) -> None:
        super().__init__(headers=headers)
        self._late = late
        # The base class has promised an empty body.
        del self.headers["content-length"]
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await run_while_connected(self._respond_in_time(scope, receive, send), receive)

    async def _respond_in_time(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._seconds) as limit:
                await self._respond(scope, receive, send)
        except TimeoutError:
            if not limit.expired():
                raise
            raise RequestTimedOut(
                f"The request was not finished within {self._seconds:g} s and has been cancelled. "
                "Remedy: ask for fewer tokens, or raise server.request_timeout (--request-timeout)."
            ) from None

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


class WholeAnswer(_Working):
    """Awaits ``answer`` and sends it as JSON. Errors of ``answer`` go to the exception handlers."""

    def __init__(
        self,
        answer: Callable[[], Awaitable[msgspec.Struct]],
        seconds: float,
        headers: Mapping[str, str],
        late: LateHeaders = dict,
    ) -> None:
        super().__init__(seconds, headers, late)
        self._answer = answer

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = json_response(await self._answer())
        response.headers.update(self.headers)
        response.headers.update(self._late())
        await response(scope, receive, send)


class EventStream(_Working):
    """Sends ``events`` as they come.

    The status line waits for the first event: errors until then are ordinary responses, later ones an
    event of their own.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        seconds: float,
        headers: Mapping[str, str],
        late: LateHeaders = dict,
    ) -> None:
        super().__init__(seconds, headers, late)
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"
        self._events = events
        self._started = False

    async def _respond_in_time(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super()._respond_in_time(scope, receive, send)
        except MemServeError as error:
            if not self._started:
                raise
            await _send_last(send, encode_event(describe_error(error).body))
        except Exception:
            if not self._started:
                raise
            log.exception("bug in a stream")
            await _send_last(send, encode_event(internal_error()))

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events) as events:
            first = await anext(events)
            self._started = True
            self.headers.update(self._late())
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await _send_part(send, first)
            async for event in events:
                await _send_part(send, event)
        await _send_last(send, DONE)


async def run_while_connected(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Run ``work`` to its end, or cancel it when the client disconnects. Raises what ``work`` raises."""
    working = asyncio.create_task(work)
    listening = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((working, listening), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        await _cancel(working)
        await _cancel(listening)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait((task,))


def _send_part(send: Send, body: bytes) -> Awaitable[None]:
    return send({"type": "http.response.body", "body": body, "more_body": True})


def _send_last(send: Send, body: bytes) -> Awaitable[None]:
    return send({"type": "http.response.body", "body": body, "more_body": False})
