"""A workload that needs no data: chats of made-up words with a shared beginning. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from memserve.bench.content import Text, draw_exponential, draw_uniform, make_runs
from memserve.bench.workload import (
    SALT_TOKENS,
    TEMPLATE_OVERHEAD,
    TURN_OVERHEAD,
    Endpoint,
    Message,
    Session,
    Turn,
    Workload,
)
from memserve.core.errors import ConfigError

_KEYS_PER_SESSION = 1 << 12
_TASK = "\nTell a long story that uses all of these words."
_TASK_TOKENS = 12
_THINK, _LENGTHS = 2, 3
"""Streams of random numbers: think times and lengths."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of synthetic sessions.

    ``prompt``: tokens of the first prompt, ``shared`` of them (a share, 0 to 1) the same in all sessions;
    ``follow_up``: tokens that each later turn adds; ``output``: tokens of an answer, ``spread`` of it (a
    share) up or down at random; ``think``: mean seconds between an answer and the next turn.
    """

    sessions: int = 16
    turns: int = 3
    prompt: int = 512
    shared: float = 0.5
    follow_up: int = 64
    output: int = 64
    spread: float = 0.25
    think: float = 1.0


def make_synthetic(shape: Shape, context: int, seed: int) -> Workload:
    """Sessions of ``shape`` for models with ``context`` tokens. Raises ``ConfigError`` if they do not fit."""
    _check(shape, context)
    shared = round(shape.prompt * shape.shared)
    opening = (Message("system", make_runs(seed * _KEYS_PER_SESSION, shared)),) if shared else ()
    sessions = tuple(_make_session(shape, seed, at, opening, shared) for at in range(shape.sessions))
    return Workload("synthetic", sessions, Endpoint.CHAT, history=True, fixed=True)


def _make_session(shape: Shape, seed: int, at: int, opening: tuple[Message, ...], shared: int) -> Session:
    key = (seed + 1) * (1 << 24) + at * _KEYS_PER_SESSION
    think = draw_exponential(seed, _THINK + (at << 8), shape.turns, shape.think)
    scale = 1 - shape.spread + 2 * shape.spread * draw_uniform(seed, _LENGTHS + (at << 8), shape.turns)
    turns = []
    for turn in range(shape.turns):
        tokens = shape.prompt - shared if turn == 0 else shape.follow_up
        output = max(1, round(shape.output * float(scale[turn])))
        words = make_runs(key + turn * 64, max(1, tokens - _TASK_TOKENS))
        asked = (Message("user", (*words, Text(_TASK))),)
        reply = make_runs(key + turn * 64 + 32, output)
        turns.append(Turn(asked, reply, output, think[turn] if turn else 0.0))
    return Session(opening, tuple(turns))


def _check(shape: Shape, context: int) -> None:
    for name, option in (("sessions", "--sessions"), ("turns", "--turns"), ("output", "--output-tokens")):
        if getattr(shape, name) < 1:
            raise ConfigError(f"{option} is {getattr(shape, name)}; accepted: at least 1")
    if not 0 <= shape.shared <= 1 or not 0 <= shape.spread < 1:
        raise ConfigError(f"--shared is {shape.shared:g}; accepted: a share from 0 to 1")
    if shape.prompt < 2 * _TASK_TOKENS or shape.follow_up < _TASK_TOKENS:
        raise ConfigError(
            f"--prompt-tokens is {shape.prompt} and --turn-tokens {shape.follow_up}; accepted: at least "
            f"{2 * _TASK_TOKENS} and {_TASK_TOKENS}"
        )
    longest = (
        shape.prompt
        + (shape.turns - 1) * shape.follow_up
        + round(shape.turns * shape.output * (1 + shape.spread))
    )
    longest += SALT_TOKENS + TEMPLATE_OVERHEAD + 2 * shape.turns * TURN_OVERHEAD
    if longest > context:
        raise ConfigError(
            f"a synthetic session grows to {longest} tokens and --context is {context}; lower --turns, "
            "--prompt-tokens, --turn-tokens or --output-tokens"
        )
