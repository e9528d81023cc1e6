"""Continuous batching with chunked prefill: which sequence computes how many tokens in the next step.

Pure: it holds queues and decides; blocks, memory and time belong to the engine. Decode rows come first, so
a long prompt never freezes a running stream. Of what is left, half goes to the prompt that came first, so
that it gets done whatever comes after it, and the rest to the shortest, which do not wait for the long ones.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from memserve.core.types import RequestId
from memserve.engine.pace import Budget, Pace, Work
from memserve.engine.sequence import Sequence
from memserve.engine.share_out import share_out
from memserve.engine.speculation import Lookup

WORTH = 1.2
"""A proposed token must bring this much more tokens per second than the step does: both are estimates."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next ``count`` pending tokens of a sequence; ``last`` when none remain, so a token is sampled.

    ``proposed`` are what may be sampled then: their rows are computed in the same pass.
    """

    sequence: Sequence
    count: int
    proposed: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        return self.count + len(self.proposed)

    @property
    def last(self) -> bool:
        return self.count == self.sequence.pending


def work_of(chunks: Iterable[Chunk]) -> Work:
    """What a step of ``chunks`` computes, before their sequences have moved on."""
    work = Work()
    for chunk in chunks:
        computed = chunk.sequence.computed
        work = work.decode(computed) if chunk.count == 1 else work.prefill(computed, chunk.count)
        if chunk.proposed:
            work = work.speculate(computed, len(chunk.proposed))
    return work


class Batcher:
    """Waiting and running sequences of one engine, both in order of arrival.

    ``step_tokens`` bounds the rows of a forward pass; ``pace`` bounds prefill further while streams run.
    Prefill gets a little of each step even where the streams alone exceed these bounds. With ``lookup``
    streams propose tokens where these bring more tokens per second than the step has without them.
    """

    def __init__(
        self, *, step_tokens: int, max_running: int, pace: Pace | None = None, lookup: Lookup | None = None
    ) -> None:
        self.pace = pace or Pace()
        self.lookup = lookup
        self._step_tokens = step_tokens
        self._max_running = max_running
        self._arrivals = 0
        self._waiting: list[Sequence] = []
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
        self._arrivals += 1
        sequence.arrival = self._arrivals
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
        bisect.insort(self._running, sequence, key=_arrival)

    def preempt_newest(self) -> Sequence | None:
        """Send the newest running sequence back to its place in the queue.

        The oldest is preempted last, so it always gets done: nobody starves.
        """
        if not self._running:
            return None
        victim = self._running.pop()
        bisect.insort(self._waiting, victim, key=_arrival)
        return victim

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is."""
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)

    def plan(self) -> tuple[Chunk, ...]:
        """The chunks of the next step; empty when there is nothing to compute."""
        decoding = tuple(Chunk(sequence, 1) for sequence in self._running if sequence.pending == 1)
        if self.lookup is not None:
            decoding = tuple(self._speculate(self.lookup, decoding))
        prompts = [sequence for sequence in self._running if sequence.pending > 1]
        rows = max(self._step_tokens - sum(chunk.rows for chunk in decoding), 1)
        behind = prompts[0].computed if prompts else 0
        budget = Budget(self.pace.times.prefill, rows, self.pace.seconds_left(work_of(decoding), behind))
        chunks = (Chunk(sequence, count) for sequence, count in share_out(prompts, budget))
        return (*decoding, *chunks)

    def _speculate(self, lookup: Lookup, decoding: tuple[Chunk, ...]) -> Iterator[Chunk]:
        """Let streams propose tokens: in half of the rows that are left, and within the target time."""
        times, work = self.pace.times, work_of(decoding)
        rows = (self._step_tokens - len(decoding)) // 2
        alone = times.seconds_of(work)
        seconds = (self.pace.target or math.inf) - alone
        for chunk in decoding:
            sequence = chunk.sequence
            if sequence.sampled == 0:
                yield chunk
                continue
            cost = times.speculation_seconds(sequence.computed)
            # The last wanted token takes no row: it is sampled from the one before.
            room = int(max(0, min(sequence.wanted - 1, rows, seconds / cost)))
            worth = WORTH * cost * len(decoding) / alone
            proposed = sequence.draft_with(lookup).propose(sequence.tokens, room, worth)
            rows -= len(proposed)
            seconds -= len(proposed) * cost
            yield replace(chunk, proposed=proposed)

    def check(self) -> None:
        """Assert the invariants."""
        requests = [sequence.request for sequence in self]
        assert len(requests) == len(set(requests)), "a sequence is queued twice"
        assert len(self._running) <= self._max_running, "the batch is over its limit"
        for queue in (self._waiting, self._running):
            arrivals = [sequence.arrival for sequence in queue]
            assert arrivals == sorted(arrivals), "a queue is not in order of arrival"


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
