"""Which changes of roles the cluster can do with, and how the others are refused."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from memserve.cluster.manager import Link
from memserve.cluster.membership import (
    BecameReady,
    Joined,
    LeaveRequested,
    Membership,
    MemberState,
    MemberView,
    RoleChanged,
)
from memserve.core.config import ClusterConfig
from memserve.core.errors import InvalidRequest
from memserve.core.messages import Join, Ready
from memserve.core.types import InstanceId, Role
from memserve.server.roles import RoleSwitch, missing_legs

ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "c": Role.COLOCATED}


@dataclass
class Members:
    """Stands where the cluster manager does; instances agree when ``agree`` is set."""

    membership: Membership = field(default_factory=lambda: Membership(ClusterConfig()))
    agree: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, *names: str, ready: bool = True) -> None:
        for name in map(InstanceId, names):
            self.membership.apply(Joined(name, 1, ROLES[name[0]]), 0.0)
            if ready:
                self.membership.apply(BecameReady(name, 1, f"@{name}"), 0.0)

    def view(self) -> tuple[MemberView, ...]:
        return self.membership.view()

    def links(self) -> tuple[Link, ...]:
        return tuple(link for view in self.view() if (link := self.link(view.instance)) is not None)

    def link(self, instance: InstanceId) -> Link | None:
        view = next((view for view in self.view() if view.instance == instance), None)
        if view is None or view.state.gone:
            return None
        join = Join(instance, view.incarnation, view.role, 0)
        loading = view.state is MemberState.JOINING
        ready = Ready(instance, f"@{instance}", "m", 512, 16, 64, 4096, "layout", "reference")
        return Link(join, None, None if loading else ready)  # type: ignore[arg-type]

    async def set_role(self, instance: InstanceId, role: Role, timeout: float) -> None:
        await self.agree.wait()
        self.membership.apply(RoleChanged(instance, 1, role), 0.0)


def switch(members: Members, *changes: tuple[str, Role], phases: str = "pd-caching-3") -> list[object]:
    """Ask for all ``changes`` at once; returns earlier roles and errors."""

    async def ask() -> list[object]:
        members.agree.set()
        roles = RoleSwitch(members, phases)  # type: ignore[arg-type]
        asked = (roles.switch(InstanceId(name), role) for name, role in changes)
        async with asyncio.timeout(20):
            return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(ask())


def refused(result: object, *words: str, code: str = "conflict") -> None:
    assert isinstance(result, InvalidRequest)
    assert result.code == code
    for word in words:
        assert word in str(result)


def test_a_change_tells_the_role_before() -> None:
    members = Members()
    members.add("p0", "p1", "d0")
    assert switch(members, ("p0", Role.DECODE), ("p0", Role.DECODE)) == [Role.PREFILL, Role.DECODE]
    assert {view.instance: view.role for view in members.view()} == {
        "p0": Role.DECODE,
        "p1": Role.PREFILL,
        "d0": Role.DECODE,
    }


def test_two_changes_at_once_cannot_leave_a_role_to_nobody() -> None:
    members = Members()
    members.add("p0", "p1", "d0")
    first, second = switch(members, ("p0", Role.DECODE), ("p1", Role.DECODE))
    assert first is Role.PREFILL
    refused(second, "nobody would be left to prefill", "d0, p0", "colocated first")


@pytest.mark.parametrize(
    ("names", "change", "missing"),
    [
        (("p0", "d0"), ("p0", Role.DECODE), "prefill"),
        (("p0", "d0"), ("d0", Role.PREFILL), "decode"),
        (("c0",), ("c0", Role.PREFILL), "decode"),
    ],
)
def test_the_last_of_a_kind_stays(names: tuple[str, ...], change: tuple[str, Role], missing: str) -> None:
    members = Members()
    members.add(*names)
    refused(switch(members, change)[0], f"left to {missing}")


def test_those_that_load_or_leave_neither_change_nor_count() -> None:
    members = Members()
    members.add("p0", "p1", "d0")
    members.add("p2", ready=False)
    members.membership.apply(LeaveRequested(InstanceId("p1")), 0.0)
    refused(switch(members, ("p2", Role.DECODE))[0], "still loading")
    refused(switch(members, ("p1", Role.DECODE))[0], "leaving")
    refused(switch(members, ("p0", Role.DECODE))[0], "left to prefill")
    refused(switch(members, ("p9", Role.DECODE))[0], "'p9'", code="not_found")


def test_without_a_handoff_all_stay_colocated() -> None:
    members = Members()
    members.add("c0", "c1")
    refused(switch(members, ("c0", Role.PREFILL), phases="colocated")[0], "--phases pd-caching-3")
    assert switch(members, ("c0", Role.COLOCATED), phases="colocated") == [Role.COLOCATED]


@pytest.mark.parametrize(
    ("roles", "missing"),
    [("pd", []), ("c", []), ("cp", []), ("pp", ["decode"]), ("d", ["prefill"]), ("", ["prefill", "decode"])],
)
def test_what_nobody_does(roles: str, missing: list[str]) -> None:
    assert missing_legs(ROLES[letter] for letter in roles) == missing
