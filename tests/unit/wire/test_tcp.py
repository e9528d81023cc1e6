"""Connections over TCP: the key, mutual TLS, and clear refusals on both sides."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from certificates import with_tls
from memserve.core.errors import ConfigError, NotAuthenticated, PeerLost
from memserve.core.messages import ControlMessage, GetStats, Message, Ok, Shutdown
from memserve.wire import Security, connect, listen, listening_address
from memserve.wire.connection import encode_notification
from memserve.wire.sockets import open_socket

KEY = b"0123456789abcdef"
RUNNERS = [asyncio.run, uvloop.run]


class Recorder:
    """Answers every call, and keeps what it is told."""

    def __init__(self) -> None:
        self.notes: asyncio.Queue[Message] = asyncio.Queue()
        self.connected = 0

    def on_notify(self, connection: Any, message: Any) -> None:
        self.notes.put_nowait(message)

    async def on_call(self, connection: Any, message: Any) -> Message:
        return Ok()

    def on_close(self, connection: Any, reason: str) -> None: ...


@asynccontextmanager
async def listening(security: Security) -> AsyncIterator[tuple[str, Recorder]]:
    recorder = Recorder()
    server = await listen("tcp://127.0.0.1:0", ControlMessage, lambda: recorder, security)
    try:
        yield listening_address(server, "tcp://127.0.0.1:0"), recorder
    finally:
        server.close()


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize("security", [Security(KEY), with_tls(KEY)], ids=["key", "key and TLS"])
def test_messages_go_both_ways(run: Any, security: Security) -> None:
    async def scenario() -> None:
        async with listening(security) as (address, recorder):
            client = await connect(address, ControlMessage, Recorder(), 5.0, security)
            assert await client.call(GetStats(), 5.0) == Ok()
            client.notify(Shutdown())
            async with asyncio.timeout(5.0):
                assert await recorder.notes.get() == Shutdown()
            client.close()

    run(scenario())


@pytest.mark.parametrize("security", [Security(KEY), with_tls(KEY)], ids=["key", "key and TLS"])
def test_threads_without_a_loop_are_let_in_too(security: Security) -> None:
    async def scenario() -> None:
        async with listening(security) as (address, recorder):
            opened = await asyncio.get_running_loop().run_in_executor(
                None, open_socket, address, 5.0, security
            )
            with opened:
                opened.sendall(encode_notification(Shutdown()))
                async with asyncio.timeout(5.0):
                    assert await recorder.notes.get() == Shutdown()

    asyncio.run(scenario())


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize(
    ("here", "there", "reason"),
    [
        (Security(KEY), Security(b"another cluster's key"), "another cluster key"),
        (with_tls(KEY, "strangers"), with_tls(KEY), "trusts this side's certificate"),
        (with_tls(KEY, trusted="strangers"), with_tls(KEY), "TLS was refused.*certificate"),
        (with_tls(KEY), Security(KEY), "TLS was refused"),
        (Security(KEY), with_tls(KEY), "closed it before the keys were compared"),
    ],
    ids=["other key", "stranger", "strange server", "TLS here only", "TLS there only"],
)
def test_refusals_are_clear_at_connect_time(run: Any, here: Security, there: Security, reason: str) -> None:
    async def scenario() -> None:
        async with listening(there) as (address, recorder):
            with pytest.raises((NotAuthenticated, PeerLost), match=reason):
                await connect(address, ControlMessage, Recorder(), 5.0, here)
            assert recorder.notes.empty()

    run(scenario())


def test_a_listener_with_another_key_is_refused_by_threads_too() -> None:
    async def scenario() -> None:
        async with listening(Security(b"another cluster's key")) as (address, _):
            with pytest.raises(NotAuthenticated, match="another cluster key"):
                await asyncio.get_running_loop().run_in_executor(
                    None, open_socket, address, 5.0, Security(KEY)
                )

    asyncio.run(scenario())


def test_messages_before_the_proof_are_not_read() -> None:
    async def scenario() -> None:
        async with listening(Security(KEY)) as (address, recorder):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
            writer.write(encode_notification(Shutdown()) * 20)
            async with asyncio.timeout(5.0):
                with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
                    await reader.readexactly(1)
            writer.close()
            assert recorder.notes.empty()

    asyncio.run(scenario())


def test_a_listener_that_says_nothing_is_given_up() -> None:
    async def scenario() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
            with pytest.raises((NotAuthenticated, PeerLost), match=r"no proof|no answer"):
                await connect(address, ControlMessage, Recorder(), 0.05, Security(KEY))

    asyncio.run(scenario())


def test_tcp_without_what_it_needs_is_never_tried() -> None:
    async def scenario() -> None:
        with pytest.raises(ConfigError, match="cluster key"):
            await connect("tcp://127.0.0.1:1", ControlMessage, Recorder(), 5.0)
        with pytest.raises(ConfigError, match="cluster key"):
            await listen("tcp://127.0.0.1:0", ControlMessage, Recorder)
        with pytest.raises(ConfigError, match="not loopback"):
            await listen("tcp://0.0.0.0:0", ControlMessage, Recorder, Security(KEY))
        with pytest.raises(PeerLost, match="cannot reach"):
            await connect("tcp://127.0.0.1:1", ControlMessage, Recorder(), 5.0, Security(KEY))

    asyncio.run(scenario())
