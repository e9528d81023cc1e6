"""A request of a simulation: what is asked, where it is on its way, what became of it. Values only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np

from memserve.core.types import InstanceId, Ledger, Namespace, Tokens
from memserve.scheduler.decision import Decision
from memserve.sim.engine import Job, SimEngine

SPACE = Namespace("simulated")
"""That of all prompts."""


@dataclass(frozen=True, slots=True)
class SimRequest:
    """A request that comes at ``at`` s; ``prompt``: int32[n], ``answer``: int32[m], m at least 1."""

    at: float
    prompt: Tokens
    answer: Tokens
    session: str | None = None


class Source(Protocol):
    """Where requests come from; they may depend on how earlier ones ended."""

    def next_at(self) -> float | None:
        """When the next one comes, s; None: not before another one ends, or never."""

    def take_due(self, now: float) -> Sequence[SimRequest]:
        """Those that come by ``now``, earliest first."""


class InOrder:
    """Requests that come whatever happens, in order of their times."""

    def __init__(self, requests: Iterable[SimRequest]) -> None:
        self._coming: Iterator[SimRequest] = iter(requests)
        self._next = next(self._coming, None)

    def next_at(self) -> float | None:
        return None if self._next is None else self._next.at

    def take_due(self, now: float) -> Sequence[SimRequest]:
        due = []
        while self._next is not None and self._next.at <= now:
            due.append(self._next)
            self._next = next(self._coming, None)
        return due


class Outcome(msgspec.Struct):
    """What became of a request; times in seconds since the start.

    ``number`` counts requests as they came. ``decisions``: one per attempt, none where nobody could take it.
    ``ledger``: where the KV of its own prompt came from. ``error`` is empty where it was answered in full.
    """

    number: int
    at: float
    prompt_tokens: int
    answer_tokens: int
    decisions: tuple[Decision, ...] = ()
    ledger: Ledger = Ledger()
    first_token: float = 0.0
    ended: float = 0.0
    error: str = ""

    @property
    def decision(self) -> Decision:
        """The first one."""
        return self.decisions[0]

    @property
    def cached_tokens(self) -> int:
        return self.ledger.cached

    @property
    def ttft(self) -> float:
        return self.first_token - self.at

    @property
    def served(self) -> float:
        """The first token's time without the wait in line: what decisions predict."""
        return self.first_token - self.decision.decided_at

    @property
    def jct(self) -> float:
        return self.ended - self.at


@dataclass(slots=True, eq=False)
class Journey:
    """A request on its way. ``job`` is its present attempt, ``engine`` where that is.

    ``answered``: tokens of its answer that earlier attempts brought; ``fruitless``: attempts in a row, the
    present one included, that brought none.
    """

    request: SimRequest
    outcome: Outcome
    job: Job | None = None
    engine: SimEngine | None = None
    answered: int = 0
    fruitless: int = 0

    @property
    def prompt(self) -> Tokens:
        """The next attempt's: the request's own and what has been answered."""
        if not self.answered:
            return self.request.prompt
        return np.concatenate((self.request.prompt, self.request.answer[: self.answered]))

    @property
    def answer(self) -> Tokens:
        """What is still to be said."""
        return self.request.answer[self.answered :]

    def needs(self, instance: InstanceId) -> bool:
        """Whether the present attempt cannot go on without ``instance``: P matters until D has taken over."""
        if self.job is None or self.engine is None:
            return False
        return instance in (self.job.decode_on, self.engine.instance)
