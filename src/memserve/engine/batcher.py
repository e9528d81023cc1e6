"""Continuous batching with chunked prefill: which sequence computes how many tokens in the next step.

Pure: it holds queues and decides; blocks, memory and time belong to the engine. Decode rows come first, so
a long prompt never freezes a running stream; the rest of the step's budget goes to prompts in order of
arrival.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from memserve.core.types import RequestId
from memserve.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next ``count`` pending tokens of a sequence; ``last`` when none remain, so a token is sampled."""

    sequence: Sequence
    count: int

    @property
    def last(self) -> bool:
        return self.count == self.sequence.pending


class Batcher:
    """Waiting and running sequences of one engine. Units of ``step_tokens``: rows per forward pass."""

    def __init__(self, *, step_tokens: int, max_running: int) -> None:
        self._step_tokens = step_tokens
        self._max_running = max_running
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._running
        yield from self._waiting

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def full(self) -> bool:
        return len(self._running) >= self._max_running

    @property
    def tokens_to_prefill(self) -> int:
        """Prompt tokens that are still to be computed, in all sequences."""
        return sum(max(sequence.pending - 1, 0) for sequence in self)

    def find(self, request: RequestId) -> Sequence | None:
        return next((sequence for sequence in self if sequence.request == request), None)

    def enqueue(self, sequence: Sequence) -> None:
        """Add a new arrival at the end of the queue."""
        self._waiting.append(sequence)

    def admissible(self) -> tuple[Sequence, ...]:
        """Waiting sequences in order of arrival, none when the batch is full."""
        return () if self.full else tuple(self._waiting)

    def admitted(self) -> tuple[Sequence, ...]:
        """Running sequences, oldest first."""
        return tuple(self._running)

    def admit(self, sequence: Sequence) -> None:
        """Move a waiting sequence into the batch, which must not be full."""
        assert not self.full, "the batch is full"
        self._waiting.remove(sequence)
        self._running.append(sequence)

    def preempt_newest(self) -> Sequence | None:
        """Send the newest running sequence back to the head of the queue.

        The oldest is preempted last, so it always gets done: nobody starves.
        """
        if not self._running:
            return None
        victim = self._running.pop()
        self._waiting.appendleft(victim)
        return victim

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is."""
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)

    def plan(self) -> tuple[Chunk, ...]:
        """The chunks of the next step; empty when there is nothing to compute."""
        decoding = [Chunk(sequence, 1) for sequence in self._running if sequence.pending == 1]
        budget = self._step_tokens - len(decoding)
        chunks = decoding
        for sequence in self._running:
            if budget <= 0:
                break
            if sequence.pending > 1:
                chunk = Chunk(sequence, min(sequence.pending, budget))
                budget -= chunk.count
                chunks.append(chunk)
        return tuple(chunks)

    def check(self) -> None:
        """Assert the invariants."""
        requests = [sequence.request for sequence in self]
        assert len(requests) == len(set(requests)), "a sequence is queued twice"
        assert len(self._running) <= self._max_running, "the batch is over its limit"
