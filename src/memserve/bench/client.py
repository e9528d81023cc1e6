"""Asks an OpenAI-compatible server: its models, its counters, and one streamed answer at a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import httpx
import msgspec

from memserve.bench.content import render_text, render_tokens
from memserve.bench.records import Sent
from memserve.bench.wire import (
    Cluster,
    Event,
    EventReader,
    Models,
    Usage,
    explain_error,
    explain_refusal,
)
from memserve.bench.workload import Endpoint, Message
from memserve.core.errors import ConfigError, NoInstance, ProtocolError

S = TypeVar("S", bound=msgspec.Struct)

_CONNECT_SECONDS = 10.0
_ASK_SECONDS = 10.0
_PATHS = {
    Endpoint.CHAT: "/v1/chat/completions",
    Endpoint.COMPLETIONS: "/v1/completions",
    Endpoint.TOKENS: "/v1/completions",
}


@dataclass(frozen=True, slots=True)
class Asking:
    """How every prompt is sent. ``timeout``: seconds for one answer; ``vocabulary``: for token ids."""

    endpoint: Endpoint
    fixed: bool
    model: str
    temperature: float = 0.0
    timeout: float = 120.0
    vocabulary: int = 32000


@dataclass(frozen=True, slots=True)
class Answer:
    """A streamed answer: its text, when its pieces came (the clock's seconds), and its error."""

    text: str
    arrivals: tuple[float, ...]
    usage: Usage | None
    error: str = ""

    @property
    def output_tokens(self) -> int:
        """Tokens, as the server counts them, else the pieces that came."""
        counted = None if self.usage is None else self.usage.completion_tokens
        return len(self.arrivals) if counted is None else counted


class OpenAIClient:
    """Connections to the server at ``url``."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._clock = clock
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(None, connect=_CONNECT_SECONDS)
        try:
            # A proxy of the environment must not come between.
            self._http = httpx.AsyncClient(
                base_url=self.url,
                headers=headers,
                timeout=timeout,
                limits=limits,
                transport=transport,
                trust_env=False,
            )
        except httpx.InvalidURL as error:
            raise ConfigError(f"--url {url!r} is no address: {error}") from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def models(self) -> Models:
        """What is served. Raises ``NoInstance`` if nobody answers, ``ConfigError`` for a refusal."""
        try:
            async with asyncio.timeout(_ASK_SECONDS):
                response = await self._http.get("/v1/models")
        except (httpx.HTTPError, httpx.UnsupportedProtocol, TimeoutError) as error:
            raise NoInstance(
                f"no server answers at {self.url} ({error or type(error).__name__}). Start one with: "
                "memserve serve, or name another with --url"
            ) from error
        if response.status_code != 200:
            refusal = explain_refusal(response.status_code, response.content)
            raise ConfigError(f"{self.url}/v1/models: {refusal}; a key is given with MEMSERVE_API_KEY")
        return self._decode("/v1/models", response.content, Models)

    async def sent_bytes(self) -> tuple[Sent, ...] | None:
        """Bytes that instances have sent each other so far, by role; None if the server does not say."""
        try:
            async with asyncio.timeout(_ASK_SECONDS):
                response = await self._http.get("/v1/cluster")
            if response.status_code != 200:
                return None
            cluster = msgspec.json.decode(response.content, type=Cluster)
        except (httpx.HTTPError, TimeoutError, msgspec.DecodeError):
            return None
        return _sum_sent(cluster)

    async def ask(self, asking: Asking, prompt: Sequence[Message], max_tokens: int, session: str) -> Answer:
        """One streamed answer. Whatever goes wrong is in the answer's ``error``; cancelling cancels it."""
        body = msgspec.json.encode(_body(asking, prompt, max_tokens))
        stream = _Collecting(self._clock)
        error = ""
        try:
            async with asyncio.timeout(asking.timeout):
                await self._stream(_PATHS[asking.endpoint], body, session, stream)
        except TimeoutError:
            error = f"not answered within {asking.timeout:g} s"
        except httpx.HTTPError as failure:
            error = f"connection: {failure or type(failure).__name__}"
        except ProtocolError as failure:
            error = str(failure)
        return stream.answer(error)

    async def _stream(self, path: str, body: bytes, session: str, into: _Collecting) -> None:
        headers = {"content-type": "application/json", "x-session-id": session}
        async with self._http.stream("POST", path, content=body, headers=headers) as response:
            if response.status_code != 200:
                refusal = explain_refusal(response.status_code, await response.aread())
                raise ProtocolError(refusal)
            async for piece in response.aiter_bytes():
                into.take(piece)

    def _decode(self, path: str, content: bytes, schema: type[S]) -> S:
        try:
            return msgspec.json.decode(content, type=schema)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{self.url}{path} is no OpenAI-compatible server: {error}") from error


class _Collecting:
    """An answer as it comes in."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._reader = EventReader()
        self._texts: list[str] = []
        self._arrivals: list[float] = []
        self._usage: Usage | None = None
        self._finished = False

    def take(self, piece: bytes) -> None:
        now = self._clock()
        for event in self._reader.read(piece):
            self._take_event(event, now)

    def _take_event(self, event: Event, now: float) -> None:
        if failure := explain_error(event):
            raise ProtocolError(f"in mid-stream: {failure}")
        if text := event.text:
            self._texts.append(text)
            self._arrivals.append(now)
        self._finished = self._finished or event.finished
        self._usage = event.usage or self._usage

    def answer(self, error: str) -> Answer:
        if not error and not (self._finished or self._reader.done):
            error = "the server ended the answer before it was complete"
        return Answer("".join(self._texts), tuple(self._arrivals), self._usage, error)


def _body(asking: Asking, prompt: Sequence[Message], max_tokens: int) -> dict[str, object]:
    body: dict[str, object] = {
        "model": asking.model,
        "max_tokens": max_tokens,
        "temperature": asking.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if asking.fixed:
        body["ignore_eos"] = True
    if asking.endpoint is Endpoint.CHAT:
        body["messages"] = [{"role": one.role, "content": render_text(one.content)} for one in prompt]
    elif asking.endpoint is Endpoint.COMPLETIONS:
        body["prompt"] = "".join(render_text(one.content) for one in prompt)
    else:
        body["prompt"] = _tokens(prompt, asking.vocabulary)
    return body


def _tokens(prompt: Sequence[Message], vocabulary: int) -> list[int]:
    tokens = render_tokens([piece for one in prompt for piece in one.content], vocabulary)
    assert tokens is not None, "text cannot be sent as token ids; see check_endpoint"
    return tokens


def _sum_sent(cluster: Cluster) -> tuple[Sent, ...] | None:
    if not any("pool_sent_bytes" in one.counters for one in cluster.instances):
        return None
    sums: dict[str, int] = {}
    for one in cluster.instances:
        sums[one.role] = sums.get(one.role, 0) + int(one.counters.get("pool_sent_bytes", 0))
    return tuple(Sent(role, count) for role, count in sorted(sums.items()))
