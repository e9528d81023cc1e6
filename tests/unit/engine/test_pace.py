"""Pacing: prefill fills the time that decode leaves, and a closed loop of it meets its target."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.core.config import EngineConfig
from memserve.core.types import Namespace, RequestId, SamplingParams
from memserve.engine.assembly import build_batcher
from memserve.engine.batcher import Batcher, work_of
from memserve.engine.pace import FLOOR_TOKENS, Budget, Pace, StepTimes, Work
from memserve.engine.sequence import Sequence, new_sequence


@dataclass(frozen=True)
class Machine:
    """A machine whose steps take what this says, in seconds, up to ``noise``."""

    fixed: float
    row: float
    token: float
    context: float = 1e-7
    noise: float = 0.0

    def seconds_of(self, work: Work, rng: random.Random) -> float:
        linear = self.fixed + self.row * work.decode_rows + self.token * work.prefill_tokens
        attended = self.context * (work.decode_context + work.prefill_context)
        return (linear + attended) * rng.uniform(1 - self.noise, 1 + self.noise)


def sequence(name: str, prompt: int, *, computed: int = 0, answer: int = 8) -> Sequence:
    tokens = np.arange(prompt, dtype=np.int32)
    made = new_sequence(RequestId(name), Namespace("m"), tokens, SamplingParams(max_tokens=answer))
    made.computed = computed
    return made


def enter(batcher: Batcher, *sequences: Sequence) -> None:
    for each in sequences:
        batcher.enqueue(each)
        batcher.admit(each)


def play(batcher: Batcher, machine: Machine, steps: int, seed: int = 0) -> list[tuple[Work, float]]:
    """Run steps on ``machine``; streams go on for ever."""
    rng, played = random.Random(seed), []
    for _ in range(steps):
        chunks = batcher.plan()
        work = work_of(chunks)
        seconds = machine.seconds_of(work, rng)
        batcher.pace.times.learn(work, seconds)
        played.append((work, seconds))
        for chunk in chunks:
            last = chunk.last
            chunk.sequence.computed += chunk.count
            if last:
                chunk.sequence.append(1)
    return played


@pytest.mark.parametrize("slower", [1, 4])
def test_streams_keep_their_pace_while_a_long_prompt_is_read(slower: int) -> None:
    machine = Machine(0.012 * slower, 0.001 * slower, 0.0015 * slower, noise=0.1)
    batcher = Batcher(step_tokens=512, max_running=16, pace=Pace(0.08 * slower))
    enter(batcher, *(sequence(f"s{at}", 100, answer=4000) for at in range(8)))
    play(batcher, machine, 60)
    enter(batcher, sequence("long", 6000, answer=4000))
    played = [(work, seconds) for work, seconds in play(batcher, machine, 80) if work.prefill_tokens]
    settled = [seconds for _, seconds in played[10:]]
    assert 0.07 * slower < np.mean(settled) < 0.085 * slower
    assert len(played) > 10
    assert max(settled) < 0.12 * slower


def test_without_streams_a_step_is_filled() -> None:
    batcher = Batcher(step_tokens=256, max_running=4, pace=Pace(0.001))
    enter(batcher, sequence("long", 1000))
    assert [work.prefill_tokens for work, _ in play(batcher, Machine(0.01, 0.001, 0.01), 4)] == [256] * 3 + [
        232
    ]


def test_a_target_that_streams_alone_miss_still_leaves_prefill_the_floor() -> None:
    batcher = Batcher(step_tokens=256, max_running=4, pace=Pace(0.001))
    enter(batcher, sequence("stream", 10, computed=9, answer=100), sequence("long", 400))
    worked = play(batcher, Machine(0.01, 0.001, 0.01), 20)
    assert all(FLOOR_TOKENS - 1 <= work.prefill_tokens <= FLOOR_TOKENS for work, _ in worked)


def test_no_target_means_whole_steps() -> None:
    batcher = Batcher(step_tokens=256, max_running=4)
    enter(batcher, sequence("stream", 10, computed=9, answer=100), sequence("long", 1000))
    assert batcher.pace.seconds_left(Work().decode(9)) == math.inf
    assert [work.prefill_tokens for work, _ in play(batcher, Machine(0.01, 0.001, 0.01), 2)] == [255, 255]


def test_the_configuration_sets_the_target_and_zero_none() -> None:
    assert build_batcher(EngineConfig(target_tpot=0.05)).pace.target == 0.05
    assert build_batcher(EngineConfig(target_tpot=0)).pace.target is None


@given(st.floats(0, 10), st.integers(0, 100_000))
def test_tokens_within_is_the_most_that_fits(seconds: float, computed: int) -> None:
    times = StepTimes()
    times.learn(Work().decode(100).prefill(0, 100), 0.2)
    count = times.prefill.tokens_within(seconds, computed)
    # Half an attended token more or less is the rounding of n^2 / 2.
    slack = times.prefill_seconds(0, 1)
    assert times.prefill_seconds(computed, count) <= seconds + slack
    assert times.prefill_seconds(computed, count + 2) >= seconds - slack


def test_attention_of_a_long_context_counts() -> None:
    times = StepTimes()
    assert times.prefill.tokens_within(0.1, 8000) < times.prefill.tokens_within(0.1, 0)
    budget = Budget(times.prefill, 512, 0.1)
    first = budget.fit(0, 1000, 0.5)
    budget.spend(0, first)
    assert 0 < budget.fit(8000, 1000) < first
