"""Where requests go by role, what is recorded, and that a log replays to the same bytes."""

from __future__ import annotations

import msgspec
import pytest

from memserve.core.config import POLICIES
from memserve.core.errors import NoInstance
from memserve.core.types import InstanceId
from memserve.scheduler.decision import Decision, RouteRequest, decide, decide_recorded
from memserve.scheduler.places import Work
from memserve.scheduler.policies import MAX_CANDIDATES, policy_by_name
from memserve.scheduler.record import Record
from memserve.scheduler.state import SchedulerState, Share

PROMPT_TREE = policy_by_name("prompt-tree")


def record_of(cluster, policy: str = "prompt-tree", blocks: int = 4) -> Record:
    request = cluster.request("r", blocks=blocks)
    return decide_recorded(request, cluster.state, policy_by_name(policy), now=0)[1]


def test_prefill_and_decode_places_with_their_reasons(cluster) -> None:
    cluster.add("p0", "p1", "d0", "d1")
    cluster.apply("p1", 0, cluster.stored(0, 3))
    cluster.apply("d1", 0, cluster.stored(0, 2))
    decision = decide(cluster.request("r", blocks=4), cluster.state, PROMPT_TREE, now=12.5)
    assert (decision.prefill, decision.decode) == ("p1", "d1")
    assert (decision.matched_prefill, decision.matched_decode) == (48, 32)
    assert (decision.policy, decision.decided_at, decision.prompt_tokens) == ("prompt-tree", 12.5, 64)
    assert decision.reason == "prefill on p1: holds 48 tokens; decode on d1: holds 32 tokens"
    record = record_of(cluster)
    assert [(c.instance, c.matched_tokens, c.chosen) for c in record.prefill_candidates()] == [
        ("p0", 0, False),
        ("p1", 48, True),
    ]
    assert [c.instance for c in record.decode_candidates() if c.chosen] == ["d1"]


def test_colocated_place_decodes_what_it_prefills(cluster) -> None:
    cluster.add("p0", "d0", "c0")
    cluster.apply("c0", 0, cluster.stored(0, 2))
    decision = decide(cluster.request("r"), cluster.state, PROMPT_TREE, now=0)
    assert (decision.prefill, decision.decode) == ("c0", None)
    assert record_of(cluster).decode_candidates() == ()
    assert decision.matched_decode == 32
    assert decision.prefill_share() == Share(
        InstanceId("c0"), Work(prefill_tokens=32), decision.predicted_prefill
    )
    assert decision.decode_share() == Share(InstanceId("c0"), Work(context_tokens=64, requests=1))


def test_colocated_place_decodes_for_others_when_it_must(cluster) -> None:
    cluster.add("p0", "c0", "d0")
    cluster.apply("p0", 0, cluster.stored(0, 2))
    assert decide(cluster.request("r"), cluster.state, PROMPT_TREE, now=0).decode == "d0"
    cluster.state.drop_instance(InstanceId("d0"))
    assert decide(cluster.request("r"), cluster.state, PROMPT_TREE, now=0).decode == "c0"


@pytest.mark.parametrize(("names", "missing"), [([], "prefill"), (["d0"], "prefill"), (["p0"], "decode")])
def test_missing_role_is_named(cluster, names: list[str], missing: str) -> None:
    cluster.add(*names)
    with pytest.raises(NoInstance, match=f"no {missing} or colocated instance"):
        decide(cluster.request("r"), cluster.state, PROMPT_TREE, now=0)


def test_fully_held_prompt_still_computes_a_token(cluster) -> None:
    cluster.add("p0", "d0")
    cluster.apply("p0", 0, cluster.stored(0, 4))
    decision = decide(cluster.request("r", blocks=4), cluster.state, PROMPT_TREE, now=0)
    assert decision.prefill_share().work == Work(prefill_tokens=1, requests=1)


def test_large_clusters_record_the_candidates_that_matter(cluster) -> None:
    cluster.add("d0", *(f"p{n:02}" for n in range(40)))
    cluster.apply("p30", 0, cluster.stored(0, 3))
    cluster.report("p30", tokens_to_prefill=1000)
    cluster.apply("p20", 0, cluster.stored(0, 2))
    decision = decide(cluster.request("r"), cluster.state, PROMPT_TREE, now=0)
    assert decision.prefill == "p20"
    assert [c.instance for c in record_of(cluster).prefill_candidates()] == ["p00", "p20", "p30"]
    least = record_of(cluster, "least-load").prefill_candidates()
    assert [(c.instance, c.matched_tokens) for c in least] == [("p00", 0), ("p30", 48)]


def test_recorded_candidates_are_bounded(cluster) -> None:
    cluster.add("d0", *(f"p{n:02}" for n in range(40)))
    for n in range(20, 40):
        cluster.apply(f"p{n}", 0, cluster.stored(0, n))
        cluster.report(f"p{n}", tokens_to_prefill=10_000)
    recorded = record_of(cluster, blocks=40).prefill_candidates()
    assert MAX_CANDIDATES - 2 <= len(recorded) <= MAX_CANDIDATES
    assert [c.instance for c in recorded if c.chosen] == ["p00"]


def test_deciding_changes_nothing(cluster) -> None:
    cluster.add("p0", "p1", "d0")
    first = decide(cluster.request("r"), cluster.state, PROMPT_TREE, now=0)
    assert decide(cluster.request("r"), cluster.state, PROMPT_TREE, now=0) == first


@pytest.mark.parametrize("policy", POLICIES)
def test_log_replays_to_the_same_bytes(cluster, policy: str) -> None:
    first = run_log(cluster, policy)
    cluster.state = SchedulerState()
    assert run_log(cluster, policy) == first
    assert len({raw for _, raw in first}) == len(first)


def run_log(cluster, policy: str) -> list[tuple[str, bytes]]:
    """Requests, events, reports and an instance's death in a fixed order, as a live log would hold them."""
    cluster.add("p0", "p1", "p2", "d0", "d1", "c0")
    sequences = dict.fromkeys(("p0", "p1", "p2", "d0", "d1", "c0"), 0)
    decisions = []
    for n in range(60):
        request = cluster.request(f"r{n}", start=1000 * (n % 7), blocks=1 + n % 5, session=f"s{n % 7}")
        decision, record = route(cluster.state, request, policy, now=n / 10)
        written = (decision, record.prefill_candidates(), record.decode_candidates())
        decisions.append((decision.request, msgspec.msgpack.encode(written)))
        for name in (decision.prefill, decision.decode):
            if name is not None:
                cluster.apply(name, sequences[name], cluster.stored(1000 * (n % 7), 1 + n % 5))
                sequences[name] += 1
        if n >= 8:
            cluster.state.unbook(f"r{n - 8}")
        if n % 10 == 9:
            cluster.report("p0", tokens_to_prefill=16 * n)
        if n == 40:
            cluster.state.drop_instance(InstanceId("p1"))
    cluster.state.check()
    return decisions


def route(state: SchedulerState, request: RouteRequest, policy: str, now: float) -> tuple[Decision, Record]:
    decision, record = decide_recorded(request, state, policy_by_name(policy), now)
    state.book(decision.request, decision.prefill_share(), decision.decode_share(), now)
    return decision, record
