"""The life of a member, one transition at a time; tests/property tries all orders."""

from __future__ import annotations

import pytest

from memserve.cluster.membership import (
    BecameReady,
    ConnectionLost,
    Effect,
    Heard,
    Joined,
    LeaveRequested,
    MemberDraining,
    MemberLost,
    MemberReady,
    MemberRecovered,
    MemberRoleChanged,
    MembersChanged,
    Membership,
    MemberState,
    MemberSuspected,
    ProcessExited,
    RoleChanged,
    Tick,
)
from memserve.core.config import ClusterConfig
from memserve.core.messages import Member
from memserve.core.types import InstanceId, Role

P0 = InstanceId("p0")
MEMBER = Member(P0, 1, Role.PREFILL, "@p0")
CONFIG = ClusterConfig(heartbeat=0.25, dead_after=1.5, start_timeout=30.0)


@pytest.fixture
def membership() -> Membership:
    return Membership(CONFIG)


@pytest.fixture
def serving(membership: Membership) -> Membership:
    """With p0, incarnation 1, ready since 0 s and ticked then."""
    membership.apply(Joined(P0, 1, Role.PREFILL), 0.0)
    membership.apply(BecameReady(P0, 1, "@p0"), 0.0)
    membership.apply(Tick(), 0.0)
    return membership


def tick(membership: Membership, start: float, end: float) -> list[Effect]:
    """Tick each quarter of a second after ``start`` up to ``end``; returns all effects."""
    beats = round((end - start) / CONFIG.heartbeat)
    return [e for n in range(1, beats + 1) for e in membership.apply(Tick(), start + n * CONFIG.heartbeat)]


def state_of(membership: Membership) -> MemberState:
    membership.check()
    return next(view.state for view in membership.view() if view.instance == P0)


def test_joining_is_no_member_yet(membership: Membership) -> None:
    assert membership.apply(Joined(P0, 1, Role.PREFILL), 0.0) == []
    assert membership.members() == ()
    assert state_of(membership) is MemberState.JOINING


def test_ready_member_is_announced(membership: Membership) -> None:
    membership.apply(Joined(P0, 1, Role.PREFILL), 0.0)
    assert membership.apply(BecameReady(P0, 1, "@p0"), 1.0) == [
        MemberReady(MEMBER),
        MembersChanged((MEMBER,)),
    ]
    assert membership.apply(BecameReady(P0, 1, "@other"), 2.0) == []
    assert membership.members() == (MEMBER,)


def test_silence_makes_suspect_then_dead(serving: Membership) -> None:
    assert tick(serving, 0.0, 0.5) == []
    assert tick(serving, 0.5, 1.5) == [MemberSuspected(P0, 1)]
    assert serving.members() == (MEMBER,)
    assert tick(serving, 1.5, 1.75) == [
        MemberLost(P0, 1, "no heartbeat for 1.75 s", left=False),
        MembersChanged(()),
    ]
    assert state_of(serving) is MemberState.DEAD


def test_heartbeat_brings_a_suspect_back(serving: Membership) -> None:
    tick(serving, 0.0, 1.0)
    assert serving.apply(Heard(P0, 1), 1.1) == [MemberRecovered(P0, 1)]
    assert serving.apply(Heard(P0, 1), 1.2) == []
    assert state_of(serving) is MemberState.READY


def test_our_own_stall_is_nobodys_silence(serving: Membership) -> None:
    assert serving.apply(Tick(), 10.0) == []
    assert state_of(serving) is MemberState.READY
    assert MemberLost(P0, 1, "no heartbeat for 1.75 s", left=False) in tick(serving, 10.0, 13.0)


def test_silence_before_our_stall_still_counts(serving: Membership) -> None:
    tick(serving, 0.0, 1.0)
    assert serving.apply(Tick(), 11.0) == []
    assert state_of(serving) is MemberState.SUSPECT
    tick(serving, 11.0, 11.5)
    assert state_of(serving) is MemberState.DEAD


def test_slow_start_ends_at_the_start_timeout(membership: Membership) -> None:
    membership.apply(Joined(P0, 1, Role.PREFILL), 0.0)
    assert membership.apply(Tick(), 30.0) == []
    assert membership.apply(Tick(), 30.1) == [MemberLost(P0, 1, "not ready within 30 s", left=False)]


@pytest.mark.parametrize("event", [ConnectionLost(P0, 1, "gone"), ProcessExited(P0, 1, "gone")])
def test_broken_member_is_dead_at_once_and_only_once(serving: Membership, event) -> None:
    assert serving.apply(event, 1.0) == [MemberLost(P0, 1, "gone", left=False), MembersChanged(())]
    assert serving.apply(event, 1.1) == []
    assert serving.apply(Heard(P0, 1), 1.2) == []
    assert serving.apply(Joined(P0, 1, Role.PREFILL), 1.3) == []
    assert serving.apply(BecameReady(P0, 1, "@p0"), 1.4) == []
    assert state_of(serving) is MemberState.DEAD


def test_a_role_changes_while_the_member_serves(serving: Membership) -> None:
    decoding = Member(P0, 1, Role.DECODE, "@p0")
    changed = [MemberRoleChanged(decoding), MembersChanged((decoding,))]
    assert serving.apply(RoleChanged(P0, 1, Role.DECODE), 0.1) == changed
    assert serving.apply(RoleChanged(P0, 1, Role.DECODE), 0.2) == []
    assert state_of(serving) is MemberState.READY
    assert serving.view()[0].role is Role.DECODE


def test_nobody_changes_roles_before_it_is_ready(membership: Membership) -> None:
    membership.apply(Joined(P0, 1, Role.PREFILL), 0.0)
    assert membership.apply(RoleChanged(P0, 1, Role.DECODE), 0.1) == []
    assert membership.apply(BecameReady(P0, 1, "@p0"), 0.2) == [
        MemberReady(MEMBER),
        MembersChanged((MEMBER,)),
    ]


def test_draining_member_stays_until_it_ends(serving: Membership) -> None:
    assert serving.apply(LeaveRequested(P0), 1.0) == [MemberDraining(P0, 1)]
    assert serving.apply(LeaveRequested(P0), 1.0) == []
    assert serving.apply(Heard(P0, 1), 1.1) == []
    assert serving.members() == (MEMBER,)
    assert serving.apply(ProcessExited(P0, 1), 1.2) == [
        MemberLost(P0, 1, "process exited", left=True),
        MembersChanged(()),
    ]
    assert state_of(serving) is MemberState.LEFT


def test_draining_member_that_falls_silent_is_dead(serving: Membership) -> None:
    serving.apply(LeaveRequested(P0), 0.0)
    tick(serving, 0.0, 2.0)
    assert state_of(serving) is MemberState.DEAD


def test_leaving_before_ready_is_leaving(membership: Membership) -> None:
    membership.apply(Joined(P0, 1, Role.PREFILL), 0.0)
    effects = membership.apply(LeaveRequested(P0), 1.0)
    assert effects == [MemberLost(P0, 1, "asked to leave before it was ready", left=True)]


def test_new_incarnation_first_loses_the_old_one(serving: Membership) -> None:
    assert serving.apply(Joined(P0, 2, Role.DECODE), 1.0) == [
        MemberLost(P0, 1, "replaced by incarnation 2", left=False),
        MembersChanged(()),
    ]
    again = Member(P0, 2, Role.DECODE, "@new")
    assert serving.apply(BecameReady(P0, 2, "@new"), 1.0) == [MemberReady(again), MembersChanged((again,))]


@pytest.mark.parametrize(
    "event",
    [
        Joined(P0, 1, Role.PREFILL),
        BecameReady(P0, 1, "@old"),
        Heard(P0, 1),
        RoleChanged(P0, 1, Role.DECODE),
        ConnectionLost(P0, 1),
        ProcessExited(P0, 1),
    ],
)
def test_older_incarnations_are_ignored(membership: Membership, event) -> None:
    membership.apply(Joined(P0, 2, Role.PREFILL), 0.0)
    membership.apply(BecameReady(P0, 2, "@p0"), 0.0)
    before = membership.view()
    assert membership.apply(event, 0.1) == []
    assert membership.view() == before


@pytest.mark.parametrize(
    "event", [BecameReady(P0, 1, "@p0"), Heard(P0, 1), LeaveRequested(P0), ProcessExited(P0, 1)]
)
def test_strangers_are_ignored(membership: Membership, event) -> None:
    assert membership.apply(event, 0.0) == []
    assert membership.view() == ()


def test_members_are_ordered_by_name(membership: Membership) -> None:
    for name in ("p1", "d0", "p0"):
        membership.apply(Joined(InstanceId(name), 1, Role.PREFILL), 0.0)
        membership.apply(BecameReady(InstanceId(name), 1, f"@{name}"), 0.0)
    assert [member.instance for member in membership.members()] == ["d0", "p0", "p1"]
