"""The common form of all workloads: sessions of turns in causal order. Pure: no files, clock or network."""

from __future__ import annotations

import enum
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from memserve.bench.content import Content, Run

SALT_TOKENS = 16
"""Tokens that a salt adds to a prompt."""

TURN_OVERHEAD = 8
"""Tokens that a chat template may add to a message."""

TEMPLATE_OVERHEAD = 40
"""Tokens that a chat template may add to a conversation, such as a system message of its own."""


class Endpoint(enum.StrEnum):
    """How prompts are sent: as messages, as one text, or as token ids."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a prompt."""

    role: str
    content: Content


@dataclass(frozen=True, slots=True)
class Turn:
    """What a turn adds to its session.

    ``reply`` is the recorded answer, ``max_tokens`` its length. The turn is sent ``think`` seconds after the
    previous answer ended.
    """

    asked: tuple[Message, ...]
    reply: Content
    max_tokens: int
    think: float = 0.0


@dataclass(frozen=True, slots=True)
class Session:
    """Turns of one user or agent; ``arrival`` (s) where it was recorded."""

    opening: tuple[Message, ...]
    turns: tuple[Turn, ...]
    arrival: float | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """Sessions and how they are to be sent.

    With ``history`` a prompt contains the session's earlier turns and their answers, else only the opening.
    With ``fixed`` an answer has exactly ``max_tokens`` tokens, else it may end by itself before.
    """

    name: str
    sessions: tuple[Session, ...]
    endpoint: Endpoint
    history: bool
    fixed: bool

    @property
    def turns(self) -> int:
        """Turns of all sessions."""
        return sum(len(session.turns) for session in self.sessions)


def compose_prompt(workload: Workload, session: Session, answers: Sequence[Content]) -> tuple[Message, ...]:
    """The prompt of turn number ``len(answers)``, given the answers of all turns before it.

    Neighbours of the same role become one message: not every chat template takes two.
    """
    said = list(session.opening)
    if workload.history:
        for earlier, answer in zip(session.turns, answers, strict=False):
            said += (*earlier.asked, Message("assistant", answer))
    said += session.turns[len(answers)].asked
    runs = (tuple(run) for _, run in groupby(said, lambda message: message.role))
    return tuple(Message(run[0].role, sum((one.content for one in run), ())) for run in runs)


def salt_workload(workload: Workload, salt: str) -> Workload:
    """The same workload with other tokens in front, so that nothing cached for another salt fits it."""
    front = Run((1 << 40) + zlib.crc32(salt.encode()), SALT_TOKENS)
    return replace(workload, sessions=tuple(_salt_session(one, front) for one in workload.sessions))


def _salt_session(session: Session, front: Run) -> Session:
    if session.opening:
        return replace(session, opening=_put_in_front(session.opening, front))
    first, *others = session.turns
    return replace(session, turns=(replace(first, asked=_put_in_front(first.asked, front)), *others))


def _put_in_front(messages: tuple[Message, ...], front: Run) -> tuple[Message, ...]:
    first, *others = messages
    return (replace(first, content=(front, *first.content)), *others)
