"""The shell: booking, bounded history, and news that reach the state."""

from __future__ import annotations

import pytest

from memserve.core.clock import VirtualClock
from memserve.core.errors import NoInstance
from memserve.core.messages import Heartbeat, LoadReport, Snapshot
from memserve.core.types import InstanceId, RequestId
from memserve.scheduler.policies import policy_by_name
from memserve.scheduler.service import GlobalScheduler

P0, P1, D0 = InstanceId("p0"), InstanceId("p1"), InstanceId("d0")


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(100.0)


@pytest.fixture
def scheduler(cluster, clock: VirtualClock) -> GlobalScheduler:
    made = GlobalScheduler(policy_by_name("prompt-tree"), clock, history=3)
    for name in ("p0", "p1", "d0"):
        made.member_ready(cluster.member(name), cluster.ready(name))
    return made


def test_route_books_until_finished(cluster, scheduler: GlobalScheduler, clock: VirtualClock) -> None:
    clock.advance(2.5)
    first = scheduler.route(cluster.request("a"))
    assert (first.prefill, first.decode, first.decided_at) == ("p0", "d0", 102.5)
    assert scheduler.route(cluster.request("b", start=5000)).prefill == "p1"
    scheduler.first_token(RequestId("a"))
    assert scheduler.route(cluster.request("c", start=9000)).prefill == "p0"
    for name in ("a", "b", "c"):
        scheduler.finish(RequestId(name))
    assert all(not any(state.load) for state in scheduler.state.instances())
    scheduler.state.check()


def test_history_is_bounded(cluster, scheduler: GlobalScheduler) -> None:
    made = [scheduler.route(cluster.request(name)) for name in "abcdefg"]
    assert scheduler.remembered() == tuple("bcdefg"), "twice as many while none ends"
    scheduler.finish(RequestId("e"))
    assert scheduler.remembered() == tuple("efg")
    assert scheduler.decision(RequestId("d")) is None
    assert [scheduler.decision(decision.request) for decision in made[4:]] == made[4:]


def test_refused_request_leaves_no_trace(cluster, scheduler: GlobalScheduler) -> None:
    scheduler.member_lost(D0)
    with pytest.raises(NoInstance):
        scheduler.route(cluster.request("a"))
    assert scheduler.decision(RequestId("a")) is None
    assert all(not any(state.load) for state in scheduler.state.instances())


def test_pool_events_and_snapshots_reach_the_trees(cluster, scheduler: GlobalScheduler) -> None:
    assert not scheduler.on_pool_events(cluster.events("p1", 0, cluster.stored(0, 4)))
    assert scheduler.route(cluster.request("a")).prefill == "p1"
    assert scheduler.on_pool_events(cluster.events("p1", 9, cluster.stored(500, 1)))
    assert not scheduler.on_snapshot(Snapshot(P1, 1, 10, (cluster.stored(500, 4), cluster.stored(900, 1))))
    assert scheduler.state.tree.nodes == 2
    assert scheduler.route(cluster.request("b", start=500)).matched_prefill == 64


def test_membership_news_steer_requests(cluster, scheduler: GlobalScheduler) -> None:
    scheduler.on_heartbeat(Heartbeat(P0, 1, LoadReport(tokens_to_prefill=9)))
    assert scheduler.route(cluster.request("a")).prefill == "p1"
    scheduler.finish(RequestId("a"))
    scheduler.member_suspected(P1)
    assert scheduler.route(cluster.request("b")).prefill == "p0"
    scheduler.member_recovered(P1)
    assert scheduler.route(cluster.request("c")).prefill == "p1"
    scheduler.finish(RequestId("c"))
    scheduler.member_draining(P1)
    assert scheduler.route(cluster.request("d")).prefill == "p0"
    scheduler.member_lost(P0)
    with pytest.raises(NoInstance):
        scheduler.route(cluster.request("e"))
