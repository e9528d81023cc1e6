"""What the benchmark and a driver process say: a JSON object per line. Standard library only."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field


class ProtocolError(Exception):
    """A line that is no message, with the line."""


@dataclass(frozen=True, slots=True)
class Load:
    """Load ``model`` (a path); room for ``kv_tokens`` tokens of KV, sequences of at most ``context``.

    ``weights``: ``4bit`` (as the file has them) or ``bf16``. ``options`` are the engine's own.
    ``clock``: ``wall``, or ``processor``: the driver's processor time divided by its threads.
    """

    model: str
    weights: str
    threads: int
    context: int
    kv_tokens: int
    vocabulary: int
    options: dict[str, str] = field(default_factory=dict)
    clock: str = "wall"


@dataclass(frozen=True, slots=True)
class Prefill:
    """Time ``repeats`` prompts of ``tokens`` tokens, one after the other, each to its first token."""

    tokens: int
    repeats: int = 1


@dataclass(frozen=True, slots=True)
class Decode:
    """Time ``steps`` tokens of each of ``streams`` sequences with about ``context`` tokens behind them."""

    streams: int
    context: int
    steps: int


@dataclass(frozen=True, slots=True)
class Mixed:
    """``streams`` decode ``idle_tokens`` tokens each, then ``prompts`` prompts of ``prompt_tokens`` arrive.

    Before that the same number of prompts is timed without streams.
    """

    streams: int
    stream_prompt: int
    prompts: int
    prompt_tokens: int
    idle_tokens: int


@dataclass(frozen=True, slots=True)
class Quit:
    """End the process."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Versions and settings for people: name -> text."""

    about: dict[str, str]


@dataclass(frozen=True, slots=True)
class Timed:
    """Of each repeat: how many tokens were worked on, and in how many seconds."""

    tokens: int
    seconds: list[float]


@dataclass(frozen=True, slots=True)
class MixedTimed:
    """Seconds between two tokens of a stream, without and with prompts; seconds for all prompts."""

    idle_p50: float
    idle_p99: float
    mixed_p50: float
    mixed_p99: float
    alone_seconds: float
    mixed_seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine refused; the process goes on."""

    reason: str


Request = Load | Prefill | Decode | Mixed | Quit
Answer = Loaded | Timed | MixedTimed | Failed
Message = Request | Answer

_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind for kind in (Load, Prefill, Decode, Mixed, Quit, Loaded, Timed, MixedTimed, Failed)
}


def encode(message: Message) -> bytes:
    """One line."""
    return json.dumps({"kind": type(message).__name__, **dataclasses.asdict(message)}).encode() + b"\n"


def decode(line: bytes) -> Message:
    """Inverse of :func:`encode`. Raises ``ProtocolError`` for anything else."""
    try:
        fields = json.loads(line)
        kind = _KINDS[fields.pop("kind")]
        return kind(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProtocolError(f"not a message ({type(error).__name__}: {error}): {line[:200]!r}") from error
