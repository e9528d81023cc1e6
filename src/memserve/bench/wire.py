"""An OpenAI-compatible server's words, as far as a benchmark reads them, and server-sent events. Pure."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from memserve.bench.records import Sources
from memserve.core.errors import ProtocolError


class Ledger(msgspec.Struct, frozen=True):
    """MemServe's ledger of a prompt's tokens."""

    computed: int = 0
    local: int = 0
    host: int = 0
    disk: int = 0
    peer: int = 0
    backflow: int = 0


class PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None
    memserve: Ledger | None = None


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one answer."""

    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None

    @property
    def sources(self) -> Sources:
        """Where the prompt's KV came from, as far as the server says."""
        details = self.prompt_tokens_details
        if details is None or (details.memserve is None and details.cached_tokens is None):
            return Sources(unknown=self.prompt_tokens)
        if details.memserve is not None:
            return Sources(*msgspec.structs.astuple(details.memserve))
        cached = details.cached_tokens or 0
        return Sources(computed=self.prompt_tokens - cached, cached=cached)


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Error(msgspec.Struct, frozen=True):
    message: str = "no message"


class Event(msgspec.Struct, frozen=True):
    """One event of a streamed answer, chat or completion."""

    choices: list[_Choice] = []
    usage: Usage | None = None
    error: _Error | str | None = None

    @property
    def text(self) -> str:
        return "".join(_text(choice) for choice in self.choices)

    @property
    def finished(self) -> bool:
        return any(choice.finish_reason is not None for choice in self.choices)


class Model(msgspec.Struct, frozen=True):
    """A served model; ``max_model_len`` in tokens where the server says it."""

    id: str
    max_model_len: int | None = None


class Models(msgspec.Struct, frozen=True):
    data: list[Model]


class Instance(msgspec.Struct, frozen=True):
    """An instance in MemServe's ``/v1/cluster``."""

    role: str
    counters: dict[str, float] = {}


class Cluster(msgspec.Struct, frozen=True):
    instances: list[Instance]


class EventReader:
    """Turns the bytes of an event stream into events, however they were cut."""

    def __init__(self) -> None:
        self._rest = b""
        self.done = False
        """Whether ``[DONE]`` was read."""

    def read(self, piece: bytes) -> Iterator[Event]:
        """The events that ``piece`` completes. Raises ``ProtocolError`` for what is none."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                self.done = True
            else:
                yield _decode(payload)


def explain_refusal(status: int, content: bytes) -> str:
    """A refusal in words."""
    try:
        error = msgspec.json.decode(content, type=Event).error
    except msgspec.DecodeError:
        error = None
    message = error.message if isinstance(error, _Error) else error or "no message"
    return f"status {status}: {message}"


def explain_error(event: Event) -> str:
    """The error that an event reports, or nothing."""
    return event.error.message if isinstance(event.error, _Error) else event.error or ""


def _decode(payload: bytes) -> Event:
    try:
        return _EVENTS.decode(payload)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"the server sent an event that is no completion chunk: {error}") from error


def _text(choice: _Choice) -> str:
    return (choice.delta.content or "" if choice.delta is not None else "") + (choice.text or "")


_EVENTS = msgspec.json.Decoder(Event)
