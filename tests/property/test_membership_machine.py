"""Membership under any order of events: nobody comes back from the dead, effects and state agree."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from memserve.cluster.membership import (
    BecameReady,
    ConnectionLost,
    Effect,
    Event,
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
from memserve.core.types import InstanceId, Role

names = st.sampled_from([InstanceId(f"i{n}") for n in range(3)])
incarnations = st.integers(1, 4)
CONFIG = ClusterConfig(heartbeat=0.25, dead_after=1.5, start_timeout=5.0)


class FollowEffects(RuleBasedStateMachine):
    """Keeps its own picture of the cluster from effects alone and compares it with the machine's."""

    def __init__(self) -> None:
        super().__init__()
        self.membership = Membership(CONFIG)
        self.now = 0.0
        self.serving: dict[InstanceId, tuple[int, MemberState]] = {}
        self.roles: dict[InstanceId, Role] = {}
        self.announced: tuple = ()
        self.lost: set[tuple[InstanceId, int]] = set()

    def apply(self, event: Event) -> None:
        for effect in self.membership.apply(event, self.now):
            self.follow(effect)

    def follow(self, effect: Effect) -> None:
        if isinstance(effect, MembersChanged):
            self.announced = effect.members
            return
        if isinstance(effect, MemberReady):
            key = (effect.member.instance, effect.member.incarnation)
            assert key not in self.lost
            assert effect.member.instance not in self.serving
            self.serving[effect.member.instance] = (effect.member.incarnation, MemberState.READY)
            self.roles[effect.member.instance] = effect.member.role
            return
        if isinstance(effect, MemberRoleChanged):
            assert self.serving[effect.member.instance][0] == effect.member.incarnation
            assert self.roles[effect.member.instance] is not effect.member.role
            self.roles[effect.member.instance] = effect.member.role
            return
        key = (effect.instance, effect.incarnation)
        assert key not in self.lost
        if isinstance(effect, MemberLost):
            self.lost.add(key)
            self.serving.pop(effect.instance, None)
            return
        state = {
            MemberSuspected: MemberState.SUSPECT,
            MemberRecovered: MemberState.READY,
            MemberDraining: MemberState.DRAINING,
        }[type(effect)]
        assert self.serving[effect.instance][0] == effect.incarnation
        self.serving[effect.instance] = (effect.incarnation, state)

    @rule(name=names, incarnation=incarnations, role=st.sampled_from(Role))
    def join(self, name: InstanceId, incarnation: int, role: Role) -> None:
        self.apply(Joined(name, incarnation, role))

    @rule(name=names, incarnation=incarnations)
    def ready(self, name: InstanceId, incarnation: int) -> None:
        self.apply(BecameReady(name, incarnation, f"@{name}"))

    @rule(name=names, incarnation=incarnations)
    def join_and_be_ready(self, name: InstanceId, incarnation: int) -> None:
        self.apply(Joined(name, incarnation, Role.PREFILL))
        self.apply(BecameReady(name, incarnation, f"@{name}"))

    @rule(name=names, incarnation=incarnations)
    def hear(self, name: InstanceId, incarnation: int) -> None:
        self.apply(Heard(name, incarnation))

    @rule(name=names, incarnation=incarnations, role=st.sampled_from(Role))
    def change_role(self, name: InstanceId, incarnation: int, role: Role) -> None:
        self.apply(RoleChanged(name, incarnation, role))

    @rule(name=names)
    def leave(self, name: InstanceId) -> None:
        self.apply(LeaveRequested(name))

    @rule(name=names, incarnation=incarnations, kind=st.sampled_from([ConnectionLost, ProcessExited]))
    def break_off(self, name: InstanceId, incarnation: int, kind: type) -> None:
        self.apply(kind(name, incarnation))

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.25, 0.6, 2.0, 6.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.apply(Tick())

    @rule(beats=st.integers(1, 8))
    def wait_in_beats(self, beats: int) -> None:
        for _ in range(beats):
            self.wait(CONFIG.heartbeat)

    @invariant()
    def effects_tell_all(self) -> None:
        self.membership.check()
        members = self.membership.members()
        assert members == self.announced
        assert {m.instance: m.incarnation for m in members} == {n: i for n, (i, _) in self.serving.items()}
        assert all(self.roles[member.instance] is member.role for member in members)
        for line in self.membership.view():
            if line.state.serves:
                assert self.serving[line.instance] == (line.incarnation, line.state)

    @invariant()
    def the_lost_stay_lost(self) -> None:
        for line in self.membership.view():
            assert line.state.gone == ((line.instance, line.incarnation) in self.lost)


TestFollowEffects = FollowEffects.TestCase
TestFollowEffects.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
