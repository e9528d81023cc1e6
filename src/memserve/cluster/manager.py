"""The cluster manager: control connections in, membership events through the pure machine, effects out.

It owns the connections and knows who is at the other end. What requests and pool events mean is up to the
``ClusterListener``, which gets every message that does not concern membership.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

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
    MemberSuspected,
    MemberView,
    ProcessExited,
    RoleChanged,
    Tick,
)
from memserve.core.clock import Clock
from memserve.core.config import ClusterConfig
from memserve.core.errors import PeerLost, ProtocolError
from memserve.core.messages import (
    ControlMessage,
    Heartbeat,
    Join,
    Leave,
    LoadProgress,
    Member,
    Members,
    Message,
    Ready,
    SetRole,
    Shutdown,
)
from memserve.core.types import InstanceId, Role
from memserve.wire import Connection, listen

log = logging.getLogger(__name__)


class ClusterListener(Protocol):
    """Who wants to know. Calls come in the order of events and must not block."""

    def on_progress(self, progress: LoadProgress) -> None: ...

    def on_ready(self, member: Member, ready: Ready) -> None: ...

    def on_suspected(self, instance: InstanceId) -> None: ...

    def on_recovered(self, instance: InstanceId) -> None: ...

    def on_draining(self, instance: InstanceId) -> None: ...

    def on_role_changed(self, member: Member) -> None: ...

    def on_lost(self, instance: InstanceId, reason: str) -> None: ...

    def on_heartbeat(self, heartbeat: Heartbeat) -> None: ...

    def on_message(self, instance: InstanceId, message: Message) -> None: ...


@dataclass(slots=True)
class Link:
    """What the manager knows of an instance that has joined."""

    join: Join
    connection: Connection
    ready: Ready | None = None


class ClusterManager:
    """Accepts instances at an address and keeps their membership; ``kill`` ends a lost process."""

    def __init__(
        self,
        config: ClusterConfig,
        clock: Clock,
        listener: ClusterListener,
        *,
        kill: Callable[[InstanceId], None],
    ) -> None:
        self._config = config
        self._clock = clock
        self._listener = listener
        self._kill = kill
        self._membership = Membership(config)
        self._links: dict[InstanceId, Link] = {}
        self._server: asyncio.Server | None = None
        self._ticking: asyncio.Task[None] | None = None
        self._stopping = False

    async def start(self, address: str) -> None:
        """Listen for instances at ``address`` and watch their heartbeats."""
        self._server = await listen(address, ControlMessage, lambda: self)
        self._ticking = asyncio.create_task(self._tick())

    async def stop(self) -> None:
        """Tell all instances to stop and close; the launcher waits for their processes."""
        self._stopping = True
        for link in list(self._links.values()):
            if not link.connection.closed:
                link.connection.notify(Shutdown())
                link.connection.close("the server stops")
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.gather(self._ticking, return_exceptions=True)
        if self._server is not None:
            self._server.close()

    def view(self) -> tuple[MemberView, ...]:
        """Everyone ever seen, with state and reason."""
        return self._membership.view()

    def link(self, instance: InstanceId) -> Link | None:
        """What is known of a joined, living instance."""
        return self._links.get(instance)

    def links(self) -> tuple[Link, ...]:
        """Every joined, living instance, ordered by name."""
        return tuple(self._links[name] for name in sorted(self._links))

    def send(self, instance: InstanceId, message: Message) -> None:
        """Notify an instance. Raises ``PeerLost`` when it is not there."""
        self._connection(instance).notify(message)

    async def call(self, instance: InstanceId, message: Message, timeout: float) -> Any:
        """Ask an instance; see :meth:`Connection.call`."""
        return await self._connection(instance).call(message, timeout)

    async def set_role(self, instance: InstanceId, role: Role, timeout: float) -> None:
        """Let an instance do other work; everybody is told once it has agreed. Raises ``PeerLost``."""
        connection = self._connection(instance)
        incarnation = self._links[instance].join.incarnation
        await connection.call(SetRole(role), timeout)
        self._apply(RoleChanged(instance, incarnation, role))

    def process_exited(self, instance: InstanceId, incarnation: int, reason: str) -> None:
        """The launcher saw a child end."""
        self._apply(ProcessExited(instance, incarnation, reason))

    # --- what connections bring ---

    def on_notify(self, connection: Connection, message: Any) -> None:
        if isinstance(message, Heartbeat):
            self._apply(Heard(message.instance, message.incarnation))
            self._listener.on_heartbeat(message)
        elif isinstance(message, Join):
            self._joined(connection, message)
        elif isinstance(message, LoadProgress):
            self._listener.on_progress(message)
        else:
            self._from_member(connection, message)

    async def on_call(self, connection: Connection, message: Any) -> Message:
        raise ProtocolError(f"the server does not answer {type(message).__name__}")

    def on_close(self, connection: Connection, reason: str) -> None:
        link = self._link_of(connection)
        if link is not None:
            self._apply(ConnectionLost(link.join.instance, link.join.incarnation, f"connection {reason}"))

    # --- inside ---

    def _joined(self, connection: Connection, join: Join) -> None:
        connection.label = join.instance
        self._apply(Joined(join.instance, join.incarnation, join.role))
        known = next((view for view in self.view() if view.instance == join.instance), None)
        if known is None or known.incarnation != join.incarnation or known.state.gone:
            connection.close(f"incarnation {join.incarnation} of {join.instance} is over")
            return
        self._links[join.instance] = Link(join, connection)

    def _from_member(self, connection: Connection, message: Message) -> None:
        link = self._link_of(connection)
        if link is None:
            log.warning("ignored %s from an instance that is no member", type(message).__name__)
        elif isinstance(message, Ready):
            link.ready = message
            self._apply(BecameReady(message.instance, link.join.incarnation, message.peer_address))
        elif isinstance(message, Leave):
            self._apply(LeaveRequested(link.join.instance))
        else:
            self._listener.on_message(link.join.instance, message)

    def _apply(self, event: Event) -> None:
        if self._stopping:
            return
        for effect in self._membership.apply(event, self._clock.now()):
            self._act(effect)

    def _act(self, effect: Effect) -> None:
        if isinstance(effect, MemberReady):
            link = self._links[effect.member.instance]
            assert link.ready is not None
            self._listener.on_ready(effect.member, link.ready)
        elif isinstance(effect, MemberSuspected):
            self._listener.on_suspected(effect.instance)
        elif isinstance(effect, MemberRecovered):
            self._listener.on_recovered(effect.instance)
        elif isinstance(effect, MemberDraining):
            self._listener.on_draining(effect.instance)
        elif isinstance(effect, MemberRoleChanged):
            self._listener.on_role_changed(effect.member)
        elif isinstance(effect, MemberLost):
            self._lose(effect)
        elif isinstance(effect, MembersChanged):
            for link in self._links.values():
                if not link.connection.closed:
                    link.connection.notify(Members(effect.members))

    def _lose(self, effect: MemberLost) -> None:
        link = self._links.pop(effect.instance, None)
        if link is not None:
            link.connection.close(effect.reason)
        self._kill(effect.instance)
        self._listener.on_lost(effect.instance, effect.reason)

    async def _tick(self) -> None:
        while True:
            self._apply(Tick())
            await asyncio.sleep(self._config.heartbeat / 2)

    def _connection(self, instance: InstanceId) -> Connection:
        link = self._links.get(instance)
        if link is None:
            raise PeerLost(f"{instance} is not a living member")
        return link.connection

    def _link_of(self, connection: Connection) -> Link | None:
        return next((link for link in self._links.values() if link.connection is connection), None)
