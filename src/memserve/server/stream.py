"""One request's chunks on their way to the client: in order, each token once, whoever sends them.

A request may take several attempts, each on other instances; what earlier ones sent stays sent. Knows
chunks and attempts; who is chosen and who was lost, others know.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import msgspec
import numpy as np

from memserve.core.errors import MemServeError
from memserve.core.messages import TokenChunk
from memserve.core.types import InstanceId, RequestId, SamplingParams, Tokens
from memserve.scheduler.decision import Decision
from memserve.server.backend import GenerationRequest

_SEPARATOR = "~"


def request_of(attempt: RequestId) -> RequestId:
    """The request that an attempt belongs to."""
    return RequestId(attempt.partition(_SEPARATOR)[0])


def attempt_of(request: RequestId, attempt: int) -> RequestId:
    """The name of a request's attempt, which count from 1."""
    return request if attempt <= 1 else RequestId(f"{request}{_SEPARATOR}{attempt - 1}")


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The request cannot be finished where it runs. ``lost``: an instance is gone, and all know that."""

    reason: str
    lost: bool


class Stream:
    """Collects a request's chunks.

    ``decision`` is that of the present attempt: None before the first, between two, and after the last token.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.decision: Decision | None = None
        self.attempts = 0
        self.fruitless = 0
        """Attempts in a row, the present one included, that have brought no token."""
        self.ended = False
        self._arrived: asyncio.Queue[TokenChunk | Interrupted | MemServeError] = asyncio.Queue()
        self._answered: list[int] = []
        self._base = 0
        self._early: dict[int, TokenChunk] = {}

    @property
    def attempt(self) -> RequestId:
        """The name of the present attempt; no message of another one is meant for this stream."""
        return attempt_of(self.request.request, self.attempts)

    @property
    def next_attempt(self) -> RequestId:
        """The name of the attempt after it."""
        return attempt_of(self.request.request, self.attempts + 1)

    @property
    def answered(self) -> int:
        """Tokens that have come, of all attempts."""
        return len(self._answered)

    def tokens(self) -> Tokens:
        """The next attempt's prompt: the request's own and what has been answered. int32[n]."""
        if not self._answered:
            return self.request.tokens
        return np.concatenate([self.request.tokens, np.array(self._answered, np.int32)])

    def sampling(self) -> SamplingParams:
        """Sampling for the next attempt: the rest of the answer, with the same random numbers."""
        whole, given = self.request.sampling, len(self._answered)
        return msgspec.structs.replace(
            whole, max_tokens=whole.max_tokens - given, first_index=whole.first_index + given
        )

    def begin(self, decision: Decision) -> None:
        """The next attempt is the present one now; it goes on behind the tokens that have come."""
        self.attempts += 1
        self.fruitless += 1
        self.decision = decision
        self._base = len(self._answered)
        self._early.clear()

    def accept(self, chunk: TokenChunk) -> None:
        """Queue a chunk once all before it have come; P's first token may arrive after D's second.

        The ledger is that of the first token, which tells how the request's own prompt was found.
        """
        self._early[chunk.offset] = chunk
        while (ready := self._early.pop(len(self._answered) - self._base, None)) is not None:
            if self._base:
                ready = msgspec.structs.replace(ready, ledger=None)
            self._answered += ready.tokens
            self.fruitless = 0
            self._arrived.put_nowait(ready)
            if ready.finish is not None:
                self.decision = None
                return

    def interrupt(self, reason: str, *, lost: bool) -> None:
        """The present attempt is over; what it has sent goes out first."""
        self.decision = None
        self._arrived.put_nowait(Interrupted(reason, lost))

    def fail(self, error: MemServeError) -> None:
        """End with an error after what has come."""
        self._arrived.put_nowait(error)

    async def next(self) -> TokenChunk | Interrupted:
        """What comes next. Raises what :meth:`fail` was given."""
        # Unbounded here: whoever iterates sets the deadline, and leaving cancels the request.
        arrived = await self._arrived.get()
        if isinstance(arrived, MemServeError):
            raise arrived
        return arrived

    def uses(self, instance: InstanceId) -> bool:
        """Whether the present attempt was sent to ``instance``."""
        return self.decision is not None and instance in (self.decision.prefill, self.decision.decode)

    def needs(self, instance: InstanceId) -> bool:
        """Whether the present attempt cannot go on without ``instance``: P matters until D has spoken."""
        if self.decision is None:
            return False
        if instance == self.decision.decode:
            return True
        decoding = self.decision.decode is not None and len(self._answered) - self._base > 1
        return instance == self.decision.prefill and not decoding
