"""Each policy's choice among a few instances."""

from __future__ import annotations

from collections import Counter

import pytest

from memserve.core.config import POLICIES
from memserve.core.errors import ConfigError
from memserve.core.types import InstanceId
from memserve.scheduler.places import Leg
from memserve.scheduler.policies import LegQuery, policy_by_name


def choose(cluster, policy: str, leg: Leg = Leg.PREFILL, *, turn: int = 0, session: str | None = None) -> str:
    request = cluster.request("r", session=session)
    held = cluster.state.match(request.namespace, request.tokens)
    query = LegQuery(
        cluster.state.places(leg), held, session, turn, len(request.tokens), cluster.state.tree.held_tokens
    )
    return policy_by_name(policy).choose(query).place.instance


def test_every_configured_policy_exists_and_others_do_not() -> None:
    assert [policy_by_name(name).name for name in POLICIES] == list(POLICIES)
    with pytest.raises(ConfigError, match=r"server\.policy is 'fastest'; accepted: round-robin"):
        policy_by_name("fastest")


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "cost"])
def test_all_equal_goes_by_id_or_turn(cluster, policy: str) -> None:
    cluster.add("p2", "p0", "p1")
    assert choose(cluster, policy) == "p0"


def test_round_robin_takes_turns(cluster) -> None:
    cluster.add("p0", "p1", "p2")
    assert [choose(cluster, "round-robin", turn=turn) for turn in range(4)] == ["p0", "p1", "p2", "p0"]


def test_least_load_counts_tokens_then_requests(cluster) -> None:
    cluster.add("p0", "p1", "p2", "d0", "d1")
    cluster.book("a", "p0", "d0", 100)
    cluster.report("p1", running=3)
    assert choose(cluster, "least-load") == "p2"
    assert choose(cluster, "least-load", Leg.DECODE) == "d1"
    cluster.report("p2", tokens_to_prefill=1)
    assert choose(cluster, "least-load") == "p1"


def test_session_stays_where_it_is_when_others_come_and_go(cluster) -> None:
    sessions = [f"session-{n}" for n in range(400)]
    cluster.add(*(f"p{n}" for n in range(8)))
    before = {s: choose(cluster, "session-id", session=s) for s in sessions}
    share = Counter(before.values())
    assert len(share) == 8
    assert max(share.values()) < 3 * 400 / 8

    cluster.state.drop_instance(InstanceId("p3"))
    after = {s: choose(cluster, "session-id", session=s) for s in sessions}
    assert {s for s in sessions if after[s] != before[s]} == {s for s in sessions if before[s] == "p3"}

    cluster.add("p8", "p3")
    last = {s: choose(cluster, "session-id", session=s) for s in sessions}
    assert {last[s] for s in sessions if last[s] != before[s]} == {"p8"}


def test_session_id_without_session_takes_the_least_loaded(cluster) -> None:
    cluster.add("p0", "p1", "d0")
    cluster.book("a", "p0", "d0", 10)
    assert choose(cluster, "session-id") == "p1"


def test_prompt_tree_takes_the_longest_prefix_on_either_leg(cluster) -> None:
    cluster.add("p0", "p1", "p2", "d0", "d1")
    cluster.apply("p1", 0, cluster.stored(0, 1))
    cluster.apply("p2", 0, cluster.stored(0, 3))
    cluster.apply("d1", 0, cluster.stored(0, 2))
    assert choose(cluster, "prompt-tree") == "p2"
    assert choose(cluster, "prompt-tree", Leg.DECODE) == "d1"


def test_prompt_tree_breaks_ties_by_load_then_id(cluster) -> None:
    cluster.add("p0", "p1", "p2", "p3", "d0")
    for name in ("p3", "p2", "p1"):
        cluster.apply(name, 0, cluster.stored(0, 2))
    assert choose(cluster, "prompt-tree") == "p1"
    cluster.book("a", "p1", "d0", 8)
    assert choose(cluster, "prompt-tree") == "p2"


def test_prompt_tree_waits_no_longer_than_the_prefix_saves(cluster) -> None:
    cluster.add("p0", "p1", "p2", "d0")
    cluster.apply("p1", 0, cluster.stored(0, 1))
    cluster.apply("p2", 0, cluster.stored(0, 3))
    cluster.report("p0", tokens_to_prefill=5)
    cluster.report("p2", tokens_to_prefill=48 + 5)
    cluster.report("p1", tokens_to_prefill=16 + 5)
    assert choose(cluster, "prompt-tree") == "p2"
    cluster.report("p2", tokens_to_prefill=48 + 6)
    assert choose(cluster, "prompt-tree") == "p1"
    cluster.report("p1", tokens_to_prefill=16 + 6)
    assert choose(cluster, "prompt-tree") == "p0"


def test_prompt_tree_ignores_holders_that_may_not_take_requests(cluster) -> None:
    cluster.add("p0", "p1", "d0", "c0")
    cluster.apply("c0", 0, cluster.stored(0, 4))
    assert choose(cluster, "prompt-tree", Leg.DECODE) == "d0"
    assert choose(cluster, "prompt-tree", Leg.PREFILL) == "c0"


def test_weighted_overlap_weighs_what_is_ahead_against_what_is_cached(cluster) -> None:
    cluster.add("p0", "p1", "d0")
    cluster.apply("p1", 0, cluster.stored(0, 2))
    assert choose(cluster, "weighted-overlap") == "p1"
    cluster.book("a", "p1", "d0", 33)
    assert choose(cluster, "weighted-overlap") == "p0"


def test_cache_aware_wants_a_third_of_the_prompt(cluster) -> None:
    cluster.add("p0", "p1", "d0")
    cluster.apply("p1", 0, cluster.stored(0, 1))
    assert choose(cluster, "cache-aware") == "p0"
    cluster.apply("p1", 1, cluster.stored(0, 2))
    assert choose(cluster, "cache-aware") == "p1"
    cluster.report("p1", waiting=65)
    assert choose(cluster, "cache-aware") == "p0"


def test_exploit_explore_exploits_more_than_half(cluster) -> None:
    cluster.add("p0", "p1", "d0")
    cluster.apply("p1", 0, cluster.stored(0, 3))
    cluster.report("p1", tokens_to_prefill=60)
    assert choose(cluster, "exploit-explore") == "p1"
    cluster.report("p1", tokens_to_prefill=65)
    assert choose(cluster, "exploit-explore") == "p0"


def test_exploit_explore_explores_by_what_is_to_do(cluster) -> None:
    cluster.add("p0", "p1", "d0")
    cluster.apply("p1", 0, cluster.stored(0, 2))
    assert choose(cluster, "exploit-explore") == "p1"
    cluster.report("p1", tokens_to_prefill=33)
    assert choose(cluster, "exploit-explore") == "p0"
