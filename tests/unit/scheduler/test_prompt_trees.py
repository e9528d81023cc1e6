"""What is believed, what is promised, and by whom either is said."""

from __future__ import annotations

import pytest

from memserve.core.config import TreeSource
from memserve.core.types import InstanceId, Namespace, RequestId, Tokens, as_tokens
from memserve.scheduler.prompt_trees import PromptTrees, TreeOptions
from memserve.scheduler.tree import NODE_BYTES

SPACE, OTHER = Namespace("m"), Namespace("m", salt="tenant")
A, B = InstanceId("a"), InstanceId("b")
R1, R2 = RequestId("r1"), RequestId("r2")


def tokens(blocks: int, start: int = 0) -> Tokens:
    return as_tokens(range(start, start + 2 * blocks))


def trees(**options) -> PromptTrees:
    made = PromptTrees(2, TreeOptions(**options))
    for instance in (A, B):
        made.enlist(instance)
    return made


def expected(made: PromptTrees, blocks: int = 9, namespace: Namespace = SPACE) -> dict[InstanceId, int]:
    """Blocks that will be there."""
    held = made.match(namespace, tokens(blocks)).expected().by_instance()
    return {name: count // 2 for name, count in held.items()}


def confirmed(made: PromptTrees, blocks: int = 9) -> dict[InstanceId, int]:
    """Blocks that are there."""
    return {name: count // 2 for name, count in made.match(SPACE, tokens(blocks)).by_instance().items()}


def test_a_promise_is_told_apart_from_what_is_held() -> None:
    made = trees()
    made.store(A, SPACE, tokens(2))
    made.promise(R1, A, SPACE, as_tokens([*tokens(4), 99]), now=0.0)
    made.promise(R2, B, SPACE, tokens(3), now=0.0)
    assert confirmed(made) == {A: 2}
    assert expected(made) == {A: 4, B: 3}
    assert expected(made, namespace=OTHER) == {}
    made.check()


def test_the_event_keeps_the_promise() -> None:
    made = trees()
    made.promise(R1, A, SPACE, tokens(4), now=0.0)
    made.store(A, SPACE, tokens(3))
    assert (made.promises, confirmed(made), expected(made)) == (1, {A: 3}, {A: 4})
    made.store(B, SPACE, tokens(4))
    made.store(A, OTHER, tokens(4))
    assert made.promises == 1
    made.store(A, SPACE, tokens(5))
    assert (made.promises, confirmed(made)) == (0, {A: 5, B: 4})
    made.remove(A, SPACE, tokens(5), 2)
    assert expected(made) == {A: 1, B: 4}
    made.check()


def test_what_is_held_already_is_promised_until_the_first_token_only() -> None:
    made = trees()
    made.store(A, SPACE, tokens(4))
    made.promise(R1, A, SPACE, tokens(4), now=0.0)
    made.prefilled(R1, now=1.0)
    assert made.promises == 0


def test_a_promise_outlives_the_first_token_until_the_event() -> None:
    made = trees()
    made.promise(R1, A, SPACE, tokens(4), now=0.0)
    made.prefilled(R1, now=1.0)
    assert expected(made) == {A: 4}
    made.ended(R1)
    assert expected(made) == {}


def test_taking_one_back_leaves_what_others_promise() -> None:
    made = trees()
    made.promise(R1, A, SPACE, tokens(6), now=0.0)
    made.promise(R2, A, SPACE, as_tokens([*tokens(3), 98, 99]), now=0.0)
    made.promise(RequestId("r3"), A, OTHER, tokens(6), now=0.0)
    made.ended(R1)
    assert expected(made) == {A: 3}
    made.check()
    made.ended(R2)
    assert expected(made) == {}
    assert expected(made, namespace=OTHER) == {A: 6}
    made.check()


def test_a_promise_is_void_after_its_time() -> None:
    made = trees(speculative_seconds=10.0)
    made.promise(R1, A, SPACE, tokens(4), now=5.0)
    made.promise(R2, A, SPACE, tokens(6), now=6.0)
    made.advance(14.9)
    assert expected(made) == {A: 6}
    made.advance(15.0)
    assert made.promises == 1
    made.promise(R1, A, SPACE, tokens(2), now=15.5)
    made.advance(16.0)
    assert expected(made) == {A: 2}


def test_promises_of_a_lost_instance_are_gone_and_its_number_is_free() -> None:
    made = trees()
    made.promise(R1, A, SPACE, tokens(4), now=0.0)
    made.promise(R2, B, SPACE, tokens(2), now=0.0)
    made.drop_instance(A)
    assert made.enlist(InstanceId("c")) == 0
    assert expected(made) == {B: 2}
    made.ended(R1)
    made.check()


def test_less_than_a_block_promises_nothing() -> None:
    made = trees()
    made.promise(R1, A, SPACE, as_tokens([1]), now=0.0)
    assert made.promises == 0


def test_without_speculation_only_events_count() -> None:
    made = trees(speculative=False)
    made.promise(R1, A, SPACE, tokens(4), now=0.0)
    assert expected(made) == {}


@pytest.mark.parametrize("speculative", [True, False])
def test_without_events_the_first_token_tells(speculative: bool) -> None:
    made = trees(source=TreeSource.TTL, ttl=10.0, speculative=speculative)
    made.promise(R1, A, SPACE, tokens(4), now=0.0)
    assert (confirmed(made), expected(made)) == ({}, {A: 4} if speculative else {})
    made.prefilled(R1, now=1.0)
    assert (made.promises, confirmed(made)) == (0, {A: 4})
    made.used(A, SPACE, tokens(6), now=2.0)
    made.used(B, SPACE, tokens(1), now=2.0)
    assert confirmed(made) == {A: 6, B: 1}
    assert (made.held_tokens(A), made.nodes > 0, made.memory > 0) == (12, True, True)
    made.check()


def test_without_events_pools_are_not_listened_to() -> None:
    made = trees(source=TreeSource.TTL)
    made.store(A, SPACE, tokens(4))
    made.remove(A, SPACE, tokens(4), 0)
    made.forget(A)
    assert expected(made) == {}
    made.check()


def test_without_events_what_is_not_used_is_forgotten() -> None:
    made = trees(source=TreeSource.TTL, ttl=10.0)
    made.used(A, SPACE, tokens(4), now=0.0)
    made.used(B, SPACE, tokens(4), now=6.0)
    made.used(A, SPACE, tokens(2), now=12.0)
    made.advance(14.9)
    assert confirmed(made) == {A: 4, B: 4}
    made.advance(15.0)
    assert confirmed(made) == {A: 2, B: 4}
    made.advance(1000.0)
    assert (confirmed(made), made.nodes) == ({}, 0)


def test_without_events_a_lost_instance_holds_nothing() -> None:
    made = trees(source=TreeSource.TTL, ttl=10.0)
    made.used(A, SPACE, tokens(4), now=0.0)
    made.used(A, SPACE, tokens(4), now=6.0)
    made.used(B, SPACE, tokens(3), now=6.0)
    made.drop_instance(A)
    assert confirmed(made) == {B: 3}
    made.check()


def test_an_instance_that_keeps_no_prompts_promises_none() -> None:
    made = trees(prompts_kept=False)
    made.promise(R1, A, SPACE, tokens(4), now=0.0)
    assert made.promises == 0


def test_a_limit_holds_for_all_times_together() -> None:
    made = trees(source=TreeSource.TTL, ttl=10.0, memory=9 * NODE_BYTES)
    for start in range(40):
        made.used(A, SPACE, tokens(1, start=10 * start), now=float(start))
    assert 0 < made.memory <= 9 * NODE_BYTES
    made.check()
