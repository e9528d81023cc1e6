"""Events, snapshots, incarnations, bookings and admission."""

from __future__ import annotations

import pytest

from memserve.core.errors import LayoutMismatch
from memserve.core.messages import LoadReport, Moved
from memserve.core.types import InstanceId, Namespace, RequestId, Role
from memserve.scheduler.feeds import EventOutcome
from memserve.scheduler.places import Admission, Leg, Work

SPACE = Namespace("model")
APPLIED, STALE, SNAPSHOT = EventOutcome.APPLIED, EventOutcome.STALE_INCARNATION, EventOutcome.NEEDS_SNAPSHOT


def test_events_fill_the_tree(cluster) -> None:
    cluster.add("p0", "d0", "c0")
    assert cluster.apply("p0", 0, cluster.stored(0, 4)) is APPLIED
    assert cluster.apply("d0", 0, cluster.stored(0, 3)) is APPLIED
    assert cluster.apply("c0", 0, cluster.stored(0, 2), cluster.removed(0, 2, keep=1)) is APPLIED
    held = cluster.state.match(SPACE, cluster.tokens(0, 5)).by_instance()
    assert held == {"p0": 64, "d0": 48, "c0": 16}
    assert cluster.state.tree.held_tokens(InstanceId("p0")) == 64


def test_a_new_role_takes_along_what_is_held_booked_and_known_of_the_events(cluster) -> None:
    cluster.add("p0", "p1", "d0")
    cluster.apply("p0", 0, cluster.stored(0, 4))
    cluster.apply("p1", 0, cluster.stored(0, 2))
    cluster.book("r", "p0", "d0", 64)
    cluster.state.set_role(InstanceId("p0"), Role.DECODE)
    assert cluster.held(Leg.PREFILL, 0, 5) == {"p1": 2}
    assert cluster.held(Leg.DECODE, 0, 5) == {"p0": 4}
    assert [place.instance for place in cluster.state.places(Leg.PREFILL).instances] == ["p1"]
    assert [place.instance for place in cluster.state.places(Leg.DECODE).instances] == ["d0", "p0"]
    assert cluster.apply("p0", 1, cluster.removed(0, 4, keep=3), cluster.stored(900, 1)) is APPLIED
    assert cluster.held(Leg.DECODE, 0, 5) == {"p0": 3}
    assert cluster.load("p0").prefill_tokens == 64
    cluster.state.unbook(RequestId("r"))
    assert cluster.load("p0") == Work()
    cluster.state.check()


def test_a_new_role_before_the_snapshot_loses_nothing(cluster) -> None:
    cluster.add("p0")
    assert cluster.apply("p0", 2, cluster.stored(200, 1)) is SNAPSHOT
    cluster.state.set_role(InstanceId("p0"), Role.DECODE)
    cluster.state.set_role(InstanceId("nobody"), Role.DECODE)
    assert cluster.snapshot("p0", 2, cluster.stored(0, 2)) is APPLIED
    assert cluster.held(Leg.DECODE, 0, 2) == {"p0": 2}
    assert cluster.held(Leg.DECODE, 200, 1) == {"p0": 1}


def test_what_moved_to_another_tier_is_held_still(cluster) -> None:
    cluster.add("p0")
    stored = cluster.stored(0, 4)
    cluster.apply("p0", 0, stored, Moved(stored.namespace, stored.tokens, 16, "disk"))
    assert cluster.apply("p0", 2, cluster.stored(9, 1)) is APPLIED
    assert cluster.held(Leg.PREFILL, 0, 5) == {"p0": 4}


def test_gap_applies_nothing_until_the_snapshot_then_what_came_early(cluster) -> None:
    cluster.add("p0")
    cluster.apply("p0", 0, cluster.stored(0, 1))
    assert cluster.apply("p0", 3, cluster.stored(300, 1)) is SNAPSHOT
    assert cluster.apply("p0", 4, cluster.stored(400, 1)) is SNAPSHOT
    assert cluster.held(Leg.PREFILL, 300, 1) == {}
    assert cluster.snapshot("p0", 4, cluster.stored(200, 1), cluster.stored(300, 1)) is APPLIED
    assert cluster.held(Leg.PREFILL, 0, 1) == {}
    for start in (200, 300, 400):
        assert cluster.held(Leg.PREFILL, start, 1) == {"p0": 1}
    assert cluster.apply("p0", 5, cluster.stored(500, 1)) is APPLIED


def test_unknown_start_needs_a_snapshot(cluster) -> None:
    cluster.add("p0")
    assert cluster.apply("p0", 7, cluster.stored(0, 1)) is SNAPSHOT


def test_early_batches_with_a_hole_ask_again(cluster) -> None:
    cluster.add("p0")
    cluster.apply("p0", 5, cluster.stored(500, 1))
    assert cluster.snapshot("p0", 3) is SNAPSHOT
    assert cluster.snapshot("p0", 5) is APPLIED


def test_events_known_already_are_skipped(cluster) -> None:
    cluster.add("p0")
    cluster.apply("p0", 0, cluster.stored(0, 2), cluster.removed(0, 2, keep=0))
    assert cluster.apply("p0", 0, cluster.stored(0, 2)) is APPLIED
    assert cluster.held(Leg.PREFILL, 0, 2) == {}
    assert cluster.apply("p0", 1, cluster.removed(0, 2, keep=0), cluster.stored(9, 1)) is APPLIED
    assert cluster.held(Leg.PREFILL, 0, 2) == {}
    assert cluster.held(Leg.PREFILL, 9, 1) == {"p0": 1}


def test_snapshot_older_than_the_events_changes_nothing(cluster) -> None:
    cluster.add("p0")
    cluster.apply("p0", 0, cluster.stored(0, 1), cluster.stored(100, 1))
    assert cluster.snapshot("p0", 1, cluster.stored(0, 1)) is APPLIED
    assert cluster.held(Leg.PREFILL, 100, 1) == {"p0": 1}


def test_other_incarnations_are_not_listened_to(cluster) -> None:
    assert cluster.apply("p0", 0, cluster.stored(0, 1)) is STALE
    cluster.add("p0", incarnation=2)
    assert cluster.apply("p0", 0, cluster.stored(0, 1), incarnation=1) is STALE
    assert cluster.snapshot("p0", 1, cluster.stored(0, 1), incarnation=1) is STALE
    cluster.report("p0", incarnation=1, tokens_to_prefill=50)
    assert cluster.load("p0") == Work()
    assert cluster.held(Leg.PREFILL, 0, 1) == {}


def test_new_incarnation_starts_empty(cluster) -> None:
    cluster.add("p0", "d0")
    cluster.apply("p0", 0, cluster.stored(0, 4))
    cluster.book("r", "p0", "d0", 100)
    cluster.add("p0", incarnation=2)
    assert cluster.held(Leg.PREFILL, 0, 4) == {}
    assert cluster.load("p0") == Work()
    cluster.state.unbook(RequestId("r"))
    assert cluster.load("p0") == cluster.load("d0") == Work()
    cluster.state.check()


def test_other_block_size_is_refused(cluster) -> None:
    with pytest.raises(LayoutMismatch, match="p0 has blocks of 32 tokens"):
        cluster.state.add_instance(cluster.member("p0"), cluster.ready("p0", block_tokens=32))
    assert cluster.state.instances() == ()


def test_bookings_come_and_go(cluster) -> None:
    cluster.add("p0", "d0", "c0")
    cluster.book("r", "p0", "d0", 100)
    cluster.book("s", "c0", "c0", 10)
    assert cluster.load("p0") == Work(prefill_tokens=100, requests=1)
    assert cluster.load("d0") == Work(context_tokens=100, requests=1)
    assert cluster.load("c0") == Work(10, 10, 1)
    for request in ("r", "s", "r", "unknown"):
        cluster.state.finish_prefill(RequestId(request))
    assert cluster.load("p0") == Work()
    assert cluster.load("c0") == Work(0, 10, 1, streams=1)
    cluster.state.check()
    for request in ("r", "s", "r"):
        cluster.state.unbook(RequestId(request))
    assert cluster.load("d0") == cluster.load("c0") == Work()
    cluster.state.check()


def test_booking_again_replaces(cluster) -> None:
    cluster.add("p0", "p1", "d0")
    cluster.book("r", "p0", "d0", 100)
    cluster.book("r", "p1", "d0", 100)
    assert cluster.load("p0") == Work()
    assert cluster.load("d0") == Work(context_tokens=100, requests=1)
    assert cluster.state.turn == 2


def test_report_adds_what_was_not_booked_here(cluster) -> None:
    cluster.add("p0", "d0")
    cluster.book("r", "p0", "d0", 100)
    cluster.report("p0", tokens_to_prefill=300, waiting=2, running=1)
    assert cluster.load("p0") == Work(prefill_tokens=300, requests=3)
    cluster.state.finish_prefill(RequestId("r"))
    assert cluster.load("p0") == Work(prefill_tokens=200, requests=2)
    cluster.report("p0")
    assert cluster.load("p0") == Work()


def test_report_never_hides_what_is_booked(cluster) -> None:
    cluster.add("p0", "d0")
    cluster.book("r", "p0", "d0", 100)
    cluster.report("p0")
    cluster.report("d0", active_blocks=10, incoming_blocks=2)
    assert cluster.load("p0") == Work(prefill_tokens=100, requests=1)
    assert cluster.load("d0") == Work(context_tokens=12 * 16, requests=1)


def names(cluster, leg: Leg) -> list[str]:
    return [state.instance for state in cluster.state.places(leg).instances]


def test_places_follow_roles(cluster) -> None:
    assert names(cluster, Leg.PREFILL) == []
    cluster.add("p1", "c0", "p0")
    assert names(cluster, Leg.PREFILL) == ["c0", "p0", "p1"]
    assert names(cluster, Leg.DECODE) == ["c0"]
    cluster.add("d0")
    assert names(cluster, Leg.DECODE) == ["d0"]
    cluster.state.drop_instance(InstanceId("d0"))
    assert names(cluster, Leg.DECODE) == ["c0"]


def test_suspects_are_a_last_resort_and_draining_none(cluster) -> None:
    cluster.add("p0", "p1")
    cluster.state.set_admission(InstanceId("p0"), Admission.LAST_RESORT)
    assert names(cluster, Leg.PREFILL) == ["p1"]
    cluster.state.set_admission(InstanceId("p1"), Admission.CLOSED)
    assert names(cluster, Leg.PREFILL) == ["p0"]
    cluster.state.set_admission(InstanceId("p0"), Admission.CLOSED)
    assert names(cluster, Leg.PREFILL) == []
    cluster.state.set_admission(InstanceId("p1"), Admission.OPEN)
    assert names(cluster, Leg.PREFILL) == ["p1"]


def test_a_report_is_news_unless_it_says_the_same_and_nothing_was_booked_since(cluster) -> None:
    cluster.add("c1")
    (place,) = cluster.state.instances()
    cluster.report("c1", active_blocks=8)
    assert place.knows(LoadReport(active_blocks=8))
    assert not place.knows(LoadReport(active_blocks=9))
    cluster.book("r", "c1", "c1", 64)
    assert not place.knows(LoadReport(active_blocks=8)), "load is the report's and what was booked since"
    cluster.report("c1", active_blocks=8)
    assert place.knows(LoadReport(active_blocks=8))
    cluster.report("c1", waiting=5, tokens_to_prefill=900)
    assert not place.knows(place.report), "what others sent is less after a while"
