"""What all endpoints that generate share: from checked wishes and prompts to a running generation."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from memserve.core.config import ServerConfig
from memserve.core.errors import InvalidRequest
from memserve.core.types import RequestId, Tokens, as_tokens
from memserve.engine.models.chat_template import ChatTemplate
from memserve.engine.models.tokenizer import IncrementalDecoder, Tokenizer
from memserve.server.backend import Backend, GenerationRequest
from memserve.server.generation import Choice, Generation
from memserve.server.metrics import Meter, Metrics
from memserve.server.middleware import arrival_of, request_id_of
from memserve.server.responses import EventStream, WholeAnswer
from memserve.server.schemas import AskedBase
from memserve.server.tenants import TENANT_HEADER, Tenants
from memserve.server.validation import MAX_CHOICES, SLO_TTFT_HEADER, Limits, Wishes, check_slo_ttft
from memserve.server.why import RecentIds, route_header

SESSION_HEADER = "x-session-id"
TRACE_HEADER = "x-memserve-trace"
IGNORED_HEADER = "x-memserve-ignored"
_IGNORED_LENGTH = 1024
_LONG_TEXT = 20_000
"""Characters; tokenizing more would hold up other streams, so a thread does it."""


@dataclass(frozen=True, slots=True)
class Door:
    """Everything an endpoint works with."""

    backend: Backend
    tokenizer: Tokenizer
    template: ChatTemplate | None
    served: tuple[str, ...]
    config: ServerConfig
    limits: Limits
    metrics: Metrics
    tenants: Tenants
    ids: RecentIds = field(default_factory=RecentIds)

    async def encode(self, text: str, *, bos: bool) -> Tokens:
        """Tokens of a prompt; special tokens may be written out in it."""
        if len(text) < _LONG_TEXT:
            return self.tokenizer.encode(text, special=True, bos=bos)
        return await asyncio.to_thread(self.tokenizer.encode, text, special=True, bos=bos)

    def prepare(self, request: Request, asked: Asked) -> Generation:
        """Put the choices of a request together, each with an id and a seed of its own."""
        wishes = asked.wishes
        if len(asked.prompts) * wishes.n > MAX_CHOICES:
            raise InvalidRequest(
                f"{len(asked.prompts)} prompts with 'n' {wishes.n} make more than {MAX_CHOICES} answers. "
                "Remedy: send several requests.",
                field="n",
            )
        choices = []
        for number, prompt in enumerate(asked.prompts):
            for copy in range(wishes.n):
                index = number * wishes.n + copy
                wanted = self._request_for(request, asked, prompt, index)
                choices.append(Choice(index, copy == 0, wanted))
        self.ids.note(request_id_of(request), asked.id)
        endpoint = request.scope["route"].path
        return Generation(
            tuple(choices),
            wishes.stop,
            lambda: IncrementalDecoder(self.tokenizer),
            Meter(self.metrics, endpoint, arrival_of(request)),
        )

    def _request_for(self, request: Request, asked: Asked, prompt: Prompt, index: int) -> GenerationRequest:
        wishes, body = asked.wishes, asked.body
        sampling = msgspec.structs.replace(
            wishes.sampling,
            max_tokens=prompt.max_tokens,
            seed=(wishes.sampling.seed + index) % (1 << 63),
        )
        return GenerationRequest(
            RequestId(asked.id if index == 0 else f"{asked.id}-{index}"),
            prompt.tokens,
            sampling,
            session=body.session_id or request.headers.get(SESSION_HEADER),
            salt=body.cache_salt or "",
            trace=request.headers.get(TRACE_HEADER, "") in ("1", "true"),
            tenant=self.tenants.tenant_of(
                request.headers.get("authorization", ""), request.headers.get(TENANT_HEADER)
            ),
            priority=body.priority or 0,
            slo_ttft=check_slo_ttft(request.headers.get(SLO_TTFT_HEADER), self.config.slo_ttft),
        )

    def respond(
        self,
        asked: Asked,
        answer: Callable[[], Awaitable[msgspec.Struct]],
        events: Callable[[], AsyncGenerator[bytes, None]],
    ) -> Response:
        """Answer whole or as a stream, as the request wishes."""
        headers = ignored_header(asked.ignored)

        def route() -> dict[str, str]:
            return route_header(self.backend.decisions(RequestId(asked.id)))

        if asked.wishes.stream:
            return EventStream(events(), self.config.request_timeout, headers, route)
        return WholeAnswer(answer, self.config.request_timeout, headers, route)


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """Tokens to continue, int32[n], and by how many."""

    tokens: Tokens
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Asked:
    """One checked request. ``id`` is the answer's id and the first choice's request id."""

    id: str
    created: int
    model: str
    body: AskedBase
    wishes: Wishes
    prompts: Sequence[Prompt]
    ignored: tuple[str, ...]


def new_id(prefix: str) -> str:
    """An id that no other request has."""
    return f"{prefix}-{uuid.uuid4().hex}"


def new_seed() -> int:
    """For requests that ask for none."""
    return secrets.randbits(62)


def now() -> int:
    """Unix time in whole seconds, for ``created``."""
    return int(time.time())


def as_prompt(values: Sequence[int]) -> Tokens:
    """Token ids that have been checked: int32[n]."""
    return as_tokens(list(values))


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """A response header that names the request's unknown fields, in printable ASCII."""
    if not names:
        return {}
    safe = (name.encode("ascii", "backslashreplace").decode() for name in names)
    text = ", ".join("".join(char if char.isprintable() else "?" for char in name) for name in safe)
    return {IGNORED_HEADER: text[:_IGNORED_LENGTH]}
