"""The manager against instances that are sockets only: joining, silence, impostors, broken connections."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from memserve.cluster.heartbeat import HeartbeatThread
from memserve.cluster.manager import ClusterManager
from memserve.cluster.membership import MemberState
from memserve.core.clock import MonotonicClock
from memserve.core.config import ClusterConfig
from memserve.core.errors import PeerLost, ProtocolError
from memserve.core.messages import (
    ControlMessage,
    GetStats,
    Heartbeat,
    Join,
    LoadProgress,
    LoadReport,
    Member,
    Members,
    Message,
    Ok,
    Ready,
    RequestClosed,
    SetRole,
    Stats,
)
from memserve.core.types import InstanceId, RequestId, Role
from memserve.wire import Connection, connect

NAME = InstanceId("prefill-0")


@dataclass
class Listener:
    """Writes down what the manager tells."""

    told: list[tuple[str, object]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def _tell(self, what: str, value: object) -> None:
        self.told.append((what, value))
        self.changed.set()

    def on_progress(self, progress: LoadProgress) -> None:
        self._tell("progress", progress.stage)

    def on_ready(self, member: Member, ready: Ready) -> None:
        self._tell("ready", member.instance)

    def on_suspected(self, instance: InstanceId) -> None:
        self._tell("suspected", instance)

    def on_recovered(self, instance: InstanceId) -> None:
        self._tell("recovered", instance)

    def on_draining(self, instance: InstanceId) -> None:
        self._tell("draining", instance)

    def on_role_changed(self, member: Member) -> None:
        self._tell("role", (member.instance, member.role))

    def on_lost(self, instance: InstanceId, reason: str) -> None:
        self._tell("lost", reason)

    def on_heartbeat(self, heartbeat: Heartbeat) -> None:
        self._tell("heartbeat", heartbeat.instance)

    def on_message(self, instance: InstanceId, message: Message) -> None:
        self._tell("message", (instance, message))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    def said(self, what: str) -> list[object]:
        return [value for kind, value in self.told if kind == what]


class Instance:
    """The other end of a control connection."""

    def __init__(self) -> None:
        self.members: list[Members] = []
        self.role: Role | None = None
        self.closed = asyncio.Event()

    def on_notify(self, connection: Connection, message: Any) -> None:
        if isinstance(message, Members):
            self.members.append(message)

    async def on_call(self, connection: Connection, message: Any) -> Message:
        if isinstance(message, SetRole):
            self.role = message.role
            return Ok()
        assert isinstance(message, GetStats)
        return Stats(NAME, LoadReport(), {})

    def on_close(self, connection: Connection, reason: str) -> None:
        self.closed.set()


@asynccontextmanager
async def managed(**settings: float) -> AsyncIterator[tuple[ClusterManager, Listener, str, list[InstanceId]]]:
    listener, killed = Listener(), []
    config = ClusterConfig(heartbeat=0.05, **({"dead_after": 30.0} | settings))  # type: ignore[arg-type]
    manager = ClusterManager(config, MonotonicClock(), listener, kill=killed.append)
    address = f"@memserve-test-{uuid.uuid4().hex}"
    await manager.start(address)
    try:
        yield manager, listener, address, killed
    finally:
        await manager.stop()


async def join(address: str, incarnation: int = 1, *, ready: bool = True) -> tuple[Connection, Instance]:
    instance = Instance()
    connection = await connect(address, ControlMessage, instance, 5)
    connection.notify(Join(NAME, incarnation, Role.PREFILL, 1))
    if ready:
        connection.notify(Ready(NAME, "@pool", "m", 512, 16, 64, 4096, "layout", "reference"))
    return connection, instance


def test_an_instance_joins_is_asked_and_told() -> None:
    async def scenario() -> None:
        async with managed() as (manager, listener, address, _):
            connection, instance = await join(address)
            await listener.until(lambda: listener.said("ready") == [NAME])
            assert isinstance(await manager.call(NAME, GetStats(), 5), Stats)
            connection.notify(RequestClosed(RequestId("r"), NAME))
            await listener.until(lambda: bool(listener.said("message")))
            assert instance.members[-1].members == (Member(NAME, 1, Role.PREFILL, "@pool"),)
            with pytest.raises(ProtocolError, match="does not answer"):
                await connection.call(GetStats(), 5)

    asyncio.run(scenario())


def test_a_new_role_is_agreed_with_the_instance_and_told_to_all() -> None:
    async def scenario() -> None:
        async with managed() as (manager, listener, address, _):
            connection, instance = await join(address)
            await listener.until(lambda: bool(listener.said("ready")))
            await manager.set_role(NAME, Role.DECODE, 5)
            assert instance.role is Role.DECODE
            assert listener.said("role") == [(NAME, Role.DECODE)]
            assert manager.view()[0].role is Role.DECODE
            assert isinstance(await manager.call(NAME, GetStats(), 5), Stats)
            assert instance.members[-1].members == (Member(NAME, 1, Role.DECODE, "@pool"),)
            connection.close()
            await listener.until(lambda: bool(listener.said("lost")))
            with pytest.raises(PeerLost, match="not a living member"):
                await manager.set_role(NAME, Role.PREFILL, 5)

    asyncio.run(scenario())


def test_a_broken_connection_is_a_loss() -> None:
    async def scenario() -> None:
        async with managed() as (manager, listener, address, killed):
            connection, _ = await join(address)
            await listener.until(lambda: bool(listener.said("ready")))
            connection.close()
            await listener.until(lambda: bool(listener.said("lost")))
            assert killed == [NAME], "a process that may still live is ended"
            assert manager.view()[0].state is MemberState.DEAD
            with pytest.raises(PeerLost, match="not a living member"):
                manager.send(NAME, GetStats())

    asyncio.run(scenario())


def test_silence_is_a_loss_and_heartbeats_prevent_it() -> None:
    async def scenario() -> None:
        async with managed(dead_after=0.4) as (_, listener, address, killed):
            _, instance = await join(address)
            await listener.until(lambda: bool(listener.said("ready")))
            heart = HeartbeatThread(address, NAME, 1, 0.05, LoadReport)
            heart.start()
            await listener.until(lambda: len(listener.said("heartbeat")) > 16)
            assert listener.said("lost") == []
            heart.stop()
            await listener.until(lambda: bool(listener.said("lost")))
            assert "no heartbeat" in str(listener.said("lost")[0])
            assert killed == [NAME]
            async with asyncio.timeout(5):
                await instance.closed.wait()

    asyncio.run(scenario())


def test_a_new_incarnation_replaces_and_an_old_one_is_turned_away() -> None:
    async def scenario() -> None:
        async with managed() as (manager, listener, address, _):
            await join(address, 5)
            await listener.until(lambda: len(listener.said("ready")) == 1)
            await join(address, 6)
            await listener.until(lambda: len(listener.said("ready")) == 2)
            assert "replaced by incarnation 6" in str(listener.said("lost")[0])
            _, late = await join(address, 5)
            async with asyncio.timeout(5):
                await late.closed.wait()
            link = manager.link(NAME)
            assert link is not None
            assert link.join.incarnation == 6

    asyncio.run(scenario())


def test_a_child_that_exits_before_it_is_ready_is_lost() -> None:
    async def scenario() -> None:
        async with managed() as (manager, listener, address, _):
            connection, _ = await join(address, ready=False)
            connection.notify(LoadProgress(NAME, "reading", 0.5))
            await listener.until(lambda: bool(listener.said("progress")))
            manager.process_exited(NAME, 1, "it exited with code 1")
            await listener.until(lambda: listener.said("lost") == ["it exited with code 1"])

    asyncio.run(scenario())


def test_messages_of_strangers_are_ignored() -> None:
    async def scenario() -> None:
        async with managed() as (manager, listener, address, _):
            stranger = await connect(address, ControlMessage, Instance(), 5)
            stranger.notify(RequestClosed(RequestId("r"), NAME))
            stranger.notify(Ready(NAME, "@pool", "m", 512, 16, 64, 4096, "layout", "reference"))
            stranger.notify(LoadProgress(NAME, "reading", 0.5))
            await listener.until(lambda: bool(listener.said("progress")))
            assert manager.view() == ()
            assert listener.said("message") == []

    asyncio.run(scenario())
