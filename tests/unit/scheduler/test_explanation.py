"""An explanation alone leads to the choice again, by rules written down a second time here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import pytest

from memserve.core.clock import VirtualClock
from memserve.core.config import POLICIES
from memserve.core.types import InstanceId, RequestId, StepPrices
from memserve.scheduler.history import Explanation
from memserve.scheduler.policies import policy_by_name
from memserve.scheduler.policies.classic import _hash64, _seed
from memserve.scheduler.policies.cost import LeastCost
from memserve.scheduler.record import Candidate
from memserve.scheduler.service import GlobalScheduler

Places = Sequence[Candidate]
Rule = Callable[[Explanation, Places, str], InstanceId]
SMALL = ("c0", "c1", "d0", "d1", "p0", "p1", "p2")
LARGE = tuple(f"{role}{n:02}" for role in "pdc" for n in range(12))


def order(one: Candidate) -> tuple[int, int]:
    return one.queued_tokens, one.running


def least_load(_: Explanation, places: Places, __: str) -> InstanceId:
    return min(places, key=order).instance


def round_robin(why: Explanation, places: Places, leg: str) -> InstanceId:
    part = next(part for part in why.decision.reason.split("; ") if part.startswith(leg))
    number, _, count = part.partition("number ")[2].partition(" of ")
    assert int(count) == len(places)
    return places[int(number)].instance


def session_id(why: Explanation, places: Places, _: str) -> InstanceId:
    number = _hash64(session_of(why.decision.request))
    return max(places, key=lambda one: _seed(one.instance) * number & (1 << 64) - 1).instance


def prompt_tree(_: Explanation, places: Places, __: str) -> InstanceId:
    least = min(places, key=order)
    longer = sorted({one.matched_tokens for one in places if one.matched_tokens > least.matched_tokens})
    for tokens in reversed(longer):
        place = min((one for one in places if one.matched_tokens == tokens), key=order)
        if place.queued_tokens - least.queued_tokens <= tokens:
            return place.instance
    return least.instance


def cost(why: Explanation, places: Places, leg: str) -> InstanceId:
    if places[0].total is None:
        assert "so as prompt-tree" in why.decision.reason
        return prompt_tree(why, places, leg)
    return min(places, key=lambda one: one.total).instance


def weighted_overlap(why: Explanation, places: Places, leg: str) -> InstanceId:
    def tokens(one: Candidate) -> int:
        decoded = one.context_tokens if one.role.decodes else 0
        return one.queued_tokens + why.decision.prompt_tokens - one.matched_tokens + decoded

    if leg == "decode":
        return least_load(why, places, leg)
    place = min(places, key=tokens)
    assert f": {tokens(place)} tokens to compute and to hold" in why.decision.reason
    return place.instance


def cache_aware(why: Explanation, places: Places, leg: str) -> InstanceId:
    longest = max(places, key=lambda one: one.matched_tokens)
    if leg == "decode":
        return least_load(why, places, leg)
    if longest.matched_tokens > 0.3 * why.decision.prompt_tokens:
        return longest.instance
    # Sizes of trees are not recorded per place; the reason has that of the chosen one.
    assert "has least cached: " in why.decision.reason
    return why.decision.prefill


def exploit_explore(why: Explanation, places: Places, leg: str) -> InstanceId:
    if leg == "decode":
        return least_load(why, places, leg)
    prompt, most = why.decision.prompt_tokens, max(one.matched_tokens for one in places)
    if most <= prompt - most:
        return min(places, key=lambda one: one.queued_tokens + prompt - one.matched_tokens).instance
    least = min(places, key=order)
    place = min((one for one in places if one.matched_tokens == most), key=order)
    return (place if place.queued_tokens <= 2 * least.queued_tokens + prompt else least).instance


RULES: dict[str, Rule] = {
    "round-robin": round_robin,
    "least-load": least_load,
    "session-id": session_id,
    "prompt-tree": prompt_tree,
    "cost": cost,
    "weighted-overlap": weighted_overlap,
    "cache-aware": cache_aware,
    "exploit-explore": exploit_explore,
}


def session_of(request: RequestId) -> str:
    return f"s{int(request[1:]) % 7}"


def explanations(cluster, scheduler: GlobalScheduler, clock: VirtualClock, names: Sequence[str], seed: int):
    """Explains 150 decisions of a busy life, each as it is asked for after the next ones were made."""
    random, sequences = Random(seed), dict.fromkeys(names, 0)
    for name in names:
        scheduler.member_ready(cluster.member(name), cluster.ready(name))
    for n in range(150):
        clock.advance(random.expovariate(20))
        path, blocks = 1000 * random.randrange(9), random.randrange(1, 60)
        request = cluster.request(f"r{n}", path, blocks, session_of(RequestId(f"r{n}")))
        decision = scheduler.route(request)
        for place in filter(None, (decision.prefill, decision.decode)):
            kept = cluster.stored(path, random.randrange(1, blocks + 1))
            scheduler.on_pool_events(cluster.events(place, sequences[place], kept))
            sequences[place] += 1
        if n >= 9:
            scheduler.first_token(RequestId(f"r{n - 9}"), cached=random.randrange(16))
        if n >= 20:
            scheduler.finish(RequestId(f"r{n - 20}"))
        name = random.choice(names)
        prices = StepPrices(token=random.uniform(1e-4, 3e-3))
        scheduler.state.apply_load(cluster.heartbeat(name, prices=prices))
    scheduler.state.check()
    for name in scheduler.remembered():
        why = scheduler.explain(name)
        assert why is not None
        yield why


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("policy", POLICIES)
def test_small_cluster(cluster, policy: str, seed: int) -> None:
    clock = VirtualClock(50.0)
    scheduler = GlobalScheduler(policy_by_name(policy), clock)
    check(explanations(cluster, scheduler, clock, SMALL, seed), RULES[policy])


@pytest.mark.parametrize("policy", ["prompt-tree", "least-load", "cost"])
def test_large_cluster(cluster, policy: str) -> None:
    clock = VirtualClock(50.0)
    scheduler = GlobalScheduler(policy_by_name(policy), clock)
    check(explanations(cluster, scheduler, clock, LARGE, 5), RULES[policy])


def test_fetches_are_part_of_it(cluster) -> None:
    clock = VirtualClock(50.0)
    scheduler = GlobalScheduler(LeastCost(fetches=True), clock)
    explained = list(explanations(cluster, scheduler, clock, SMALL, 1))
    check(explained, cost)
    fetched = [why for why in explained if why.decision.fetch_from is not None]
    assert fetched
    for why in fetched:
        chosen = next(one for one in why.prefill_candidates if one.chosen)
        assert chosen.fetch_tokens == why.decision.fetch_tokens
        assert 0 < chosen.fetch <= chosen.wait


def check(explained: Sequence[Explanation], derive: Rule) -> None:
    decode = 0
    for why in explained:
        decision = why.decision
        assert derive(why, why.prefill_candidates, "prefill") == decision.prefill, decision.reason
        assert [one.instance for one in why.prefill_candidates if one.chosen] == [decision.prefill]
        chosen = next(one for one in why.prefill_candidates if one.chosen)
        assert chosen.matched_tokens == decision.matched_prefill
        assert chosen.prefill == pytest.approx(decision.predicted_prefill)
        assert decision.predicted_prefill <= decision.forecast.served * (1 + 1e-9)
        if decision.decode is not None:
            decode += 1
            assert derive(why, why.decode_candidates, "decode") == decision.decode, decision.reason
    assert decode > 10
