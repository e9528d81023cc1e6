"""Workloads from recorded text: chats, questions about long documents, agents. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from memserve.bench.content import Text, draw_exponential, draw_uniform
from memserve.bench.fitting import (
    MIN_ASKED,
    MIN_REPLY,
    Ruler,
    common_factor,
    scale_lengths,
    usable_tokens,
)
from memserve.bench.workload import Endpoint, Message, Session, Turn, Workload
from memserve.core.errors import ConfigError

CHAT_THINK, DOCUMENT_THINK, TOOL_THINK = 2.0, 1.0, 0.2
"""Mean seconds between an answer and the next turn where the data says nothing: people, readers, tools."""

T = TypeVar("T")

_LONGEST_TOKEN = 8
"""Characters that a token of running text has at most, on average."""

_ORDER, _THINK = 4, 5
"""Streams of random numbers."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """What was asked and answered."""

    asked: str
    reply: str


@dataclass(frozen=True, slots=True)
class Document:
    """A text and questions about it."""

    text: str
    questions: tuple[Exchange, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """An agent's thought and action, and what came back."""

    thought: str
    action: str
    observation: str


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A question and an agent's way to its answer."""

    question: str
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Making:
    """How recorded text becomes a workload: how many sessions, for how many tokens of context.

    ``think``: mean seconds between an answer and the next turn; None: as the kind of workload has it.
    """

    ruler: Ruler
    sessions: int
    context: int
    seed: int
    think: float | None = None


def make_chats(conversations: Sequence[Sequence[Exchange]], making: Making) -> Workload:
    """Multi-turn chats (ShareGPT): later prompts contain what was said. Raises ``ConfigError``."""
    chosen = _choose(conversations, making)
    sessions = tuple(_make_chat(one, making, at) for at, one in enumerate(chosen))
    return Workload("sharegpt", sessions, Endpoint.CHAT, history=True, fixed=False)


def make_documents(documents: Sequence[Document], template: str, making: Making) -> Workload:
    """Questions about long documents (LooGLE); ``template`` has places for ``{input}`` and ``{Q}``.

    A document cut to the context is one window of it; further sessions get further windows, and when all
    were used, the same ones again.
    """
    head, _, tail = template.partition("{input}")
    if not tail or "{Q}" not in tail or not documents:
        raise ConfigError("the LooGLE prompt has no place for {input} and {Q}, or there are no documents")
    wholes = [making.ruler.count(document.text) for document in documents]
    sessions = tuple(
        _make_reading(documents[one], wholes[one], (head, tail), making, at, at // len(documents))
        for at in range(making.sessions)
        for one in (at % len(documents),)
    )
    return Workload("loogle", sessions, Endpoint.COMPLETIONS, history=False, fixed=True)


def make_agents(trajectories: Sequence[Trajectory], prefix: str, making: Making) -> Workload:
    """Agent loops (ReAct): all begin with ``prefix``; each step adds the answer and an observation to it."""
    chosen = _choose(trajectories, making)
    shared = making.ruler.count(prefix)
    texts = [_agent_texts(one) for one in chosen]
    totals = [sum(making.ruler.count(text) for pair in pairs for text in pair) for pairs in texts]
    room = usable_tokens(making.context, 2 * max(len(pairs) for pairs in texts) + 1)
    factor = common_factor([shared + total for total in totals], room)
    opening = making.ruler.cut(prefix, int(shared * factor))
    room -= making.ruler.count(opening)
    sessions = tuple(
        _make_session(pairs, min(room, int(total * factor) + 1), making, at, (_message("user", opening),))
        for at, (pairs, total) in enumerate(zip(texts, totals, strict=True))
    )
    return Workload("react", sessions, Endpoint.COMPLETIONS, history=True, fixed=True)


def _make_chat(exchanges: Sequence[Exchange], making: Making, at: int) -> Session:
    pairs = [(one.asked, one.reply) for one in exchanges]
    room = usable_tokens(making.context, 2 * len(pairs))
    return _make_session(pairs, room, making, at, (), CHAT_THINK)


def _make_session(
    pairs: Sequence[tuple[str, str]],
    room: int,
    making: Making,
    at: int,
    opening: tuple[Message, ...],
    think: float = TOOL_THINK,
) -> Session:
    """Turns of (asked, reply), together cut to ``room`` tokens."""
    ruler = making.ruler
    lengths = [ruler.count(text) for pair in pairs for text in pair]
    scaled = scale_lengths(lengths, room, [MIN_ASKED, MIN_REPLY] * len(pairs))
    pauses = _pauses(making, at, len(pairs), think)
    turns = []
    for turn, (asked, reply) in enumerate(pairs):
        said, answered = scaled[2 * turn], max(1, scaled[2 * turn + 1])
        message = _message("user", _cut(ruler, asked, said, lengths[2 * turn]))
        recorded = (Text(_cut(ruler, reply, answered, lengths[2 * turn + 1])),)
        turns.append(Turn((message,), recorded, answered, pauses[turn]))
    return Session(opening, tuple(turns))


def _make_reading(
    document: Document, whole: int, around: tuple[str, str], making: Making, at: int, part: int
) -> Session:
    """Questions on window number ``part`` of a document of ``whole`` tokens."""
    ruler, (head, tail) = making.ruler, around
    asked = [ruler.count(one.asked) for one in document.questions]
    replies = [ruler.count(one.reply) for one in document.questions]
    room = usable_tokens(making.context, 1) - ruler.count(head) - ruler.count(tail)
    kept, *_ = scale_lengths((whole, max(asked), max(replies)), room, (MIN_ASKED, MIN_ASKED, MIN_REPLY))
    factor = kept / max(1, whole)
    windows = max(1, whole // max(1, kept))
    start = int(len(document.text) * (part % windows) * factor)
    # Tokenizing no more than can be needed saves most of the time.
    text = document.text[start : start + kept * _LONGEST_TOKEN]
    opening = (_message("user", head + _cut(ruler, text, kept, whole)),)
    pauses = _pauses(making, at, len(asked), DOCUMENT_THINK)
    turns = []
    for turn, one in enumerate(document.questions):
        question = _cut(ruler, one.asked, max(MIN_ASKED, int(asked[turn] * factor)), asked[turn])
        length = min(max(1, replies[turn]), max(MIN_REPLY, int(replies[turn] * factor)))
        reply = (Text(_cut(ruler, one.reply, length, replies[turn])),)
        turns.append(Turn((_message("user", tail.replace("{Q}", question)),), reply, length, pauses[turn]))
    return Session(opening, tuple(turns))


def _agent_texts(trajectory: Trajectory) -> list[tuple[str, str]]:
    """(asked, reply) of each step, as the ReAct prompts write them."""
    asked = f"\nQuestion: {trajectory.question}"
    pairs = []
    for number, step in enumerate(trajectory.steps, 1):
        pairs.append((f"{asked}\nThought {number}:", f" {step.thought}\nAction {number}: {step.action}"))
        asked = f"\nObservation {number}: {step.observation}"
    return pairs


def _choose(items: Sequence[T], making: Making) -> list[T]:
    """As many as there are to be sessions, in the seed's order; again from its start if need be."""
    if not items:
        raise ConfigError("the data set has no sessions")
    order = np.argsort(draw_uniform(making.seed, _ORDER, len(items)), kind="stable").tolist()
    return [items[order[at % len(items)]] for at in range(making.sessions)]


def _pauses(making: Making, at: int, turns: int, usual: float) -> list[float]:
    mean = usual if making.think is None else making.think
    return [0.0, *draw_exponential(making.seed, _THINK + (at << 8), turns - 1, mean)]


def _cut(ruler: Ruler, text: str, tokens: int, whole: int) -> str:
    return text if tokens >= whole else ruler.cut(text, tokens)


def _message(role: str, text: str) -> Message:
    return Message(role, (Text(text),))
