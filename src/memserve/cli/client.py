"""Talks to a running server for the terminal commands: models, cluster, streamed chat."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar
from urllib.parse import quote

import httpx
import msgspec

from memserve.core.errors import MemServeError
from memserve.server.schemas import ModelList
from memserve.server.views import ClusterBody, HealthBody, MemoryAnswer, MemoryBody, RoleAnswer, RoleBody
from memserve.server.why import WhyBody

S = TypeVar("S", bound=msgspec.Struct)

_CONNECT_SECONDS = 3.0
_READ_SECONDS = 600.0


class ServerError(MemServeError):
    """The server is not there, or it refused; the message says what to do."""


class Turn(msgspec.Struct, frozen=True):
    """One message of a conversation."""

    role: str
    content: str


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta


class PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class ChatUsage(msgspec.Struct, frozen=True):
    """Tokens of one turn."""

    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptDetails | None = None

    @property
    def cached(self) -> int:
        details = self.prompt_tokens_details
        return 0 if details is None else details.cached_tokens or 0


class _Error(msgspec.Struct, frozen=True):
    message: str = "unknown error"


class ChatEvent(msgspec.Struct, frozen=True):
    """One event of a streamed answer."""

    choices: list[_Choice] = []
    usage: ChatUsage | None = None
    error: _Error | None = None

    @property
    def text(self) -> str:
        return "".join(choice.delta.content or "" for choice in self.choices)


class ServerClient:
    """A connection to ``url``; raises ``ServerError`` for whatever goes wrong."""

    def __init__(
        self, url: str, api_key: str | None = None, transport: httpx.BaseTransport | None = None
    ) -> None:
        self.url = url.rstrip("/")
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        timeout = httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS)
        # A proxy of the environment must not come between a terminal and its own machine.
        self._http = httpx.Client(headers=headers, timeout=timeout, transport=transport, trust_env=False)

    def __enter__(self) -> ServerClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def models(self) -> list[str]:
        """Names of the served models."""
        return [card.id for card in self._get("/v1/models", ModelList).data]

    def cluster(self) -> ClusterBody:
        """What ``/v1/cluster`` says."""
        return self._get("/v1/cluster", ClusterBody)

    def why(self, request_id: str) -> WhyBody:
        """What ``/v1/cluster/why/ID`` says."""
        return self._get(f"/v1/cluster/why/{quote(request_id, safe='')}", WhyBody)

    def health(self) -> HealthBody:
        """What ``/health`` says, also when that is bad."""
        return self._get("/health", HealthBody, accept=(200, 503))

    def resize(self, instance: str, sizes: MemoryBody) -> MemoryAnswer:
        """Give an instance's pool more or less memory."""
        body = {name: size for name, size in msgspec.structs.asdict(sizes).items() if size is not None}
        return self._put(f"/v1/cluster/{quote(instance, safe='')}/memory", body, MemoryAnswer)

    def set_role(self, instance: str, role: str) -> RoleAnswer:
        """Let an instance prefill, decode, or do both."""
        body = msgspec.structs.asdict(RoleBody(role))
        return self._put(f"/v1/cluster/{quote(instance, safe='')}/role", body, RoleAnswer)

    def chat(
        self, model: str, turns: Sequence[Turn], session: str, temperature: float | None
    ) -> Generator[ChatEvent, None, None]:
        """Stream one answer; closing the iterator cancels it."""
        body: dict[str, object] = {
            "model": model,
            "messages": [msgspec.to_builtins(turn) for turn in turns],
            "stream": True,
            "stream_options": {"include_usage": True},
            "session_id": session,
            "temperature": temperature,
        }
        with (
            self._explained(),
            self._http.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response,
        ):
            if response.status_code != 200:
                raise ServerError(_explain(response.status_code, response.read()))
            for event in read_events(response.iter_lines()):
                if event.error is not None:
                    raise ServerError(event.error.message)
                yield event

    def _get(self, path: str, schema: type[S], accept: Sequence[int] = (200,)) -> S:
        with self._explained():
            response = self._http.get(f"{self.url}{path}")
        return self._decode(path, response, schema, accept)

    def _put(self, path: str, body: dict[str, object], schema: type[S]) -> S:
        with self._explained():
            response = self._http.put(f"{self.url}{path}", json=body)
        return self._decode(path, response, schema, (200,))

    def _decode(self, path: str, response: httpx.Response, schema: type[S], accept: Sequence[int]) -> S:
        if response.status_code not in accept:
            raise ServerError(_explain(response.status_code, response.content))
        try:
            return msgspec.json.decode(response.content, type=schema)
        except msgspec.DecodeError as error:
            raise ServerError(f"{self.url}{path} is not a MemServe server: {error}") from error

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ServerError(
                f"no server answers at {self.url}. Start one with: memserve serve, or name another with --url"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerError(f"{self.url}: {error or type(error).__name__}") from error


def read_events(lines: Iterable[str]) -> Iterator[ChatEvent]:
    """Decode server-sent events up to ``[DONE]``. Raises ``ServerError`` when that never comes."""
    for line in lines:
        kind, _, payload = line.partition(":")
        payload = payload.strip()
        if kind != "data":
            continue
        if payload == "[DONE]":
            return
        try:
            yield msgspec.json.decode(payload, type=ChatEvent)
        except msgspec.DecodeError as error:
            raise ServerError(f"the server sent an event that is no chat chunk: {error}") from error
    raise ServerError("the server ended the answer before it was complete")


def _explain(status: int, content: bytes) -> str:
    try:
        error = msgspec.json.decode(content, type=ChatEvent).error or _Error()
    except msgspec.DecodeError:
        error = _Error()
    return f"the server refused with status {status}: {error.message}"
