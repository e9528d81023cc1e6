"""Changes what a running instance does: whether the cluster can do without its old role, then the change.

Knows members and roles; nothing of requests, which go on wherever they run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from memserve.cluster.manager import ClusterManager
from memserve.cluster.membership import MemberState, MemberView
from memserve.core.errors import InvalidRequest
from memserve.core.types import InstanceId, Role
from memserve.engine.phases import PHASES, Handoff

_ANSWER_SECONDS = 10.0


class RoleSwitch:
    """One change at a time, so that two that are fine alone cannot leave a role to nobody together.

    ``phases`` names the row of the phases table that the instances were started with.
    """

    def __init__(self, manager: ClusterManager, phases: str) -> None:
        self._manager = manager
        self._phases = PHASES[phases]
        self._changing = asyncio.Lock()

    async def switch(self, instance: InstanceId, role: Role) -> Role:
        """Let ``instance`` work as ``role`` and return its role before.

        Raises ``InvalidRequest``, with code ``not_found`` or ``conflict``, or ``PeerLost``.
        """
        async with self._changing:
            before = self._require(instance, role)
            if before is not role:
                await self._manager.set_role(instance, role, _ANSWER_SECONDS)
            return before

    def _require(self, instance: InstanceId, role: Role) -> Role:
        require_ready(instance, self._manager)
        views = {view.instance: view for view in self._manager.view()}
        view = views[instance]
        if view.state is MemberState.DRAINING:
            raise _conflict(f"{instance} is leaving; choose another instance")
        if role is not Role.COLOCATED and self._phases.handoff is Handoff.NONE:
            raise _conflict(
                f"phases {self._phases.name!r} hand nothing over, so every instance stays colocated; "
                "start the server with --phases pd-caching-3"
            )
        _require_both_legs(views, instance, role)
        return view.role


def missing_legs(roles: Iterable[Role]) -> list[str]:
    """The work that nobody with one of ``roles`` does: ``prefill``, ``decode``."""
    found = list(roles)
    missing = []
    if not any(role.prefills for role in found):
        missing.append(Role.PREFILL.value)
    if not any(role.decodes for role in found):
        missing.append(Role.DECODE.value)
    return missing


def require_ready(instance: InstanceId, manager: ClusterManager) -> None:
    """Raise ``InvalidRequest`` unless an instance of this name lives and has been loaded."""
    link = manager.link(instance)
    if link is None:
        known = ", ".join(link.join.instance for link in manager.links())
        raise InvalidRequest(
            f"There is no instance {instance!r}; living ones: {known}.", field="instance", code="not_found"
        )
    if link.ready is None:
        raise _conflict(
            f"{instance} is still loading; try again when `memserve status` calls it ready", "instance"
        )


def _require_both_legs(views: dict[InstanceId, MemberView], instance: InstanceId, role: Role) -> None:
    stay = {
        name: view.role
        for name, view in views.items()
        if name != instance and view.state in (MemberState.READY, MemberState.SUSPECT)
    }
    missing = missing_legs([*stay.values(), role])
    if missing:
        others = ", ".join(sorted(stay)) or "there is none yet"
        raise _conflict(
            f"with {instance} as {role} nobody would be left to {missing[0]}; give another instance "
            f"({others}) the role {missing[0]} or colocated first"
        )


def _conflict(text: str, field: str = "role") -> InvalidRequest:
    return InvalidRequest(f"{text[:1].upper()}{text[1:]}.", field=field, code="conflict")
