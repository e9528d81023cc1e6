"""Nobody starves: any arrivals, any preemptions, any pool that holds the longest sequence.

The machine plays engine on the pure batcher, with a counter for a pool. However it was left, all that waits
gets done, and in a number of steps that the work itself bounds.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from memserve.core.types import Namespace, RequestId, SamplingParams
from memserve.engine.batcher import Batcher, work_of
from memserve.engine.pace import Pace
from memserve.engine.sequence import Sequence, new_sequence

BLOCK = 16
LONGEST = 300


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)


class EngineOnPaper:
    """What the engine does with a batcher; steps take ``seconds_per_token``."""

    def __init__(self, batcher: Batcher, pool: int, seconds_per_token: float) -> None:
        self.batcher = batcher
        self.pool = pool
        self.seconds_per_token = seconds_per_token
        self.held: dict[Sequence, int] = {}
        self.done: list[Sequence] = []

    @property
    def free(self) -> int:
        return self.pool - sum(self.held.values())

    def admit(self) -> None:
        for sequence in self.batcher.admissible():
            need = blocks_for(sequence.length)
            if self.batcher.full or need > self.free:
                return
            self.held[sequence] = need
            self.batcher.admit(sequence)

    def preempt(self) -> None:
        victim = self.batcher.preempt_newest()
        if victim is not None:
            del self.held[victim]
            victim.computed = 0

    def grow(self) -> None:
        for sequence in self.batcher.admitted():
            while sequence in self.held and self.held[sequence] < blocks_for(sequence.length):
                if self.free:
                    self.held[sequence] += 1
                else:
                    self.preempt()

    def step(self) -> None:
        self.admit()
        self.grow()
        chunks = self.batcher.plan()
        work = work_of(chunks)
        rows = work.decode_rows + work.prefill_tokens
        self.batcher.pace.times.learn(work, 0.001 + self.seconds_per_token * rows)
        for chunk in chunks:
            self._advance(chunk.sequence, chunk.count, chunk.last)

    def _advance(self, sequence: Sequence, count: int, last: bool) -> None:
        sequence.computed += count
        if last:
            sequence.append(0)
        if sequence.sampled == sequence.sampling.max_tokens:
            self.leave(sequence)
            self.done.append(sequence)

    def leave(self, sequence: Sequence) -> None:
        self.batcher.remove(sequence)
        self.held.pop(sequence, None)


class BatcherMachine(RuleBasedStateMachine):
    @initialize(
        step_tokens=st.integers(16, 64),
        width=st.integers(1, 24),
        spare=st.integers(0, 30),
        tpot=st.none() | st.sampled_from([1e-4, 0.02, 1.0]),
    )
    def begin(self, step_tokens: int, width: int, spare: int, tpot: float | None) -> None:
        self.batcher = Batcher(step_tokens=step_tokens, max_running=width, pace=Pace(tpot))
        self.engine = EngineOnPaper(self.batcher, blocks_for(LONGEST) + spare, 1e-3)
        self.asked = 0
        self.gone = 0

    @rule(prompt=st.integers(1, LONGEST - 40), answer=st.integers(1, 40))
    def arrive(self, prompt: int, answer: int) -> None:
        self.asked += 1
        tokens = np.zeros(prompt, np.int32)
        name = RequestId(f"s{self.asked}")
        made = new_sequence(name, Namespace("m"), tokens, SamplingParams(max_tokens=answer))
        self.batcher.enqueue(made)

    @rule()
    def step(self) -> None:
        """Whoever came first of all that are here gets a share of every step."""
        oldest = min(self.batcher, key=lambda each: each.arrival, default=None)
        before = (oldest.length, oldest.computed) if oldest else (0, 0)
        self.engine.step()
        assert oldest is None or oldest in self.engine.done or (oldest.length, oldest.computed) > before

    @rule()
    def preempt(self) -> None:
        self.engine.preempt()

    @rule(at=st.integers(0, 100))
    def cancel(self, at: int) -> None:
        known = list(self.batcher)
        if known:
            self.engine.leave(known[at % len(known)])
            self.gone += 1

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "batcher"):
            self.batcher.check()
            assert self.engine.free >= 0

    def teardown(self) -> None:
        if not hasattr(self, "batcher"):
            return
        # At worst each in turn, one row per step, is the oldest.
        for _ in range(sum(each.prompt_length + 2 * each.sampling.max_tokens + 4 for each in self.batcher)):
            self.engine.step()
        assert len(self.engine.done) == self.asked - self.gone, "somebody starves"


TestBatcherMachine = BatcherMachine.TestCase
TestBatcherMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.parametrize("arriving", [1, 3])
def test_a_long_prompt_gets_done_under_a_stream_of_short_ones(arriving: int) -> None:
    batcher = Batcher(step_tokens=64, max_running=64)
    engine = EngineOnPaper(batcher, 1000, 1e-3)

    def ask(name: str, length: int) -> Sequence:
        tokens = np.zeros(length, np.int32)
        made = new_sequence(RequestId(name), Namespace("m"), tokens, SamplingParams(max_tokens=1))
        batcher.enqueue(made)
        return made

    long, steps = ask("long", 2000), 0
    while long not in engine.done:
        for at in range(arriving):
            ask(f"short {steps} {at}", 60)
        engine.step()
        steps += 1
        assert steps <= 2 * 2000 // 64 + 1, "it gets half of every step"
    assert len(engine.done) > steps // 3, "short ones do not wait for it"
