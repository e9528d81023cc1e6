"""What the next step computes: decode first, prompts by arrival within the budget, fair preemption."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.core.types import Namespace, RequestId, SamplingParams
from memserve.engine.batcher import Batcher
from memserve.engine.sequence import Sequence, new_sequence


def sequence(name: str, prompt: int, *, computed: int = 0, answer: int = 8) -> Sequence:
    tokens = np.arange(prompt, dtype=np.int32)
    made = new_sequence(RequestId(name), Namespace("m"), tokens, SamplingParams(max_tokens=answer))
    made.computed = computed
    return made


def running(batcher: Batcher, *sequences: Sequence) -> None:
    for each in sequences:
        batcher.enqueue(each)
        batcher.admit(each)


def shown(batcher: Batcher) -> list[tuple[str, int, bool]]:
    return [(chunk.sequence.request, chunk.count, chunk.last) for chunk in batcher.plan()]


def test_nothing_to_do_is_an_empty_plan() -> None:
    assert Batcher(step_tokens=32, max_running=4).plan() == ()


def test_a_long_prompt_is_cut_and_decodes_ride_along() -> None:
    batcher = Batcher(step_tokens=32, max_running=4)
    running(batcher, sequence("long", 100), sequence("decoding", 10, computed=9))
    assert shown(batcher) == [("decoding", 1, True), ("long", 31, False)]


def test_half_a_step_is_the_oldest_prompts_and_the_rest_the_shortest() -> None:
    batcher = Batcher(step_tokens=32, max_running=4)
    running(batcher, sequence("long", 100), sequence("longer", 200), sequence("short", 12))
    assert shown(batcher) == [("long", 20, False), ("short", 12, True)]


def test_leftover_budget_goes_to_the_next_prompt() -> None:
    batcher = Batcher(step_tokens=32, max_running=4)
    running(batcher, sequence("first", 20), sequence("second", 20), sequence("third", 20))
    assert shown(batcher) == [("first", 20, True), ("second", 12, False)]


def test_more_decodes_than_budget_all_run() -> None:
    batcher = Batcher(step_tokens=16, max_running=40)
    running(batcher, *(sequence(f"d{at}", 5, computed=4) for at in range(20)))
    assert len(batcher.plan()) == 20


def test_a_full_batch_admits_nobody() -> None:
    batcher = Batcher(step_tokens=32, max_running=1)
    first, second = sequence("a", 4), sequence("b", 4)
    batcher.enqueue(first)
    batcher.enqueue(second)
    assert batcher.admissible() == (first, second)
    batcher.admit(first)
    assert batcher.full
    assert batcher.admissible() == ()
    with pytest.raises(AssertionError, match="full"):
        batcher.admit(second)


def test_the_newest_is_preempted_and_comes_back_first() -> None:
    batcher = Batcher(step_tokens=32, max_running=4)
    old, new, late = sequence("old", 4), sequence("new", 4), sequence("late", 4)
    running(batcher, old, new)
    batcher.enqueue(late)
    assert batcher.preempt_newest() is new
    assert batcher.admissible() == (new, late)
    assert batcher.preempt_newest() is old
    assert batcher.preempt_newest() is None


def test_tokens_to_prefill_counts_what_is_pending() -> None:
    batcher = Batcher(step_tokens=32, max_running=4)
    running(batcher, sequence("half", 10, computed=4), sequence("decoding", 10, computed=9))
    batcher.enqueue(sequence("waiting", 7))
    assert batcher.tokens_to_prefill == 5 + 0 + 6


@given(
    prompts=st.lists(st.integers(1, 200), min_size=1, max_size=12),
    budget=st.integers(16, 64),
    width=st.integers(1, 6),
)
def test_every_prompt_is_computed_once_in_bounded_steps(prompts: list[int], budget: int, width: int) -> None:
    batcher = Batcher(step_tokens=budget, max_running=width)
    for at, length in enumerate(prompts):
        batcher.enqueue(sequence(f"s{at}", length))
    done: list[str] = []
    for _ in range(sum(length // 16 + 2 for length in prompts) + len(prompts)):
        for each in batcher.admissible()[: width - batcher.running]:
            batcher.admit(each)
        chunks = batcher.plan()
        assert sum(chunk.count for chunk in chunks) <= budget
        batcher.check()
        for chunk in chunks:
            last = chunk.last
            chunk.sequence.computed += chunk.count
            if last:
                done.append(chunk.sequence.request)
                batcher.remove(chunk.sequence)
    assert sorted(done) == sorted(f"s{at}" for at in range(len(prompts)))
