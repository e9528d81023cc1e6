"""Frames, calls, deadlines and the ways in which a connection ends."""

from __future__ import annotations

import asyncio
import struct
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from memserve.core.errors import NoInstance, PeerLost, ProtocolError
from memserve.core.messages import (
    Cancel,
    ControlMessage,
    GetStats,
    LoadReport,
    Message,
    Ok,
    PeerMessage,
    Shutdown,
    Stats,
)
from memserve.core.types import FinishReason, InstanceId, RequestId
from memserve.wire import Connection, connect, listen
from memserve.wire.connection import MAX_FRAME, encode_notification
from memserve.wire.sockets import open_socket


class Recorder:
    """A handler that keeps what it got and answers as told."""

    def __init__(self, answer: Message | Exception | None = None) -> None:
        self.answer = answer
        self.notes: list[Message] = []
        self.noted = asyncio.Event()
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def on_notify(self, connection: Connection, message: Any) -> None:
        self.notes.append(message)
        self.noted.set()

    async def on_call(self, connection: Connection, message: Any) -> Message:
        if self.answer is None:
            await asyncio.Event().wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        assert self.answer is not None
        return self.answer

    def on_close(self, connection: Connection, reason: str) -> None:
        self.closed.set_result(reason)


@asynccontextmanager
async def pair(answer: Message | Exception | None = None) -> AsyncIterator[tuple[Connection, Recorder, str]]:
    address = f"@memserve-test-{uuid.uuid4().hex}"
    recorder = Recorder(answer)
    server = await listen(address, ControlMessage, lambda: recorder)
    client = await connect(address, ControlMessage, Recorder(), 5)
    try:
        yield client, recorder, address
    finally:
        client.close()
        server.close()


def test_notifications_arrive_in_order() -> None:
    async def scenario() -> None:
        async with pair() as (client, recorder, _):
            sent = [Cancel(RequestId(f"r{at}"), FinishReason.STOP) for at in range(100)]
            for message in sent:
                client.notify(message)
            async with asyncio.timeout(5):
                while len(recorder.notes) < len(sent):
                    recorder.noted.clear()
                    await recorder.noted.wait()
            assert recorder.notes == sent

    asyncio.run(scenario())


def test_call_returns_the_answer() -> None:
    answer = Stats(InstanceId("p0"), LoadReport(waiting=3), {"steps": 1.0})

    async def scenario() -> None:
        async with pair(answer) as (client, _, _):
            assert await client.call(GetStats(), 5) == answer

    asyncio.run(scenario())


def test_error_of_the_other_side_keeps_its_type() -> None:
    async def scenario() -> None:
        async with pair(NoInstance("nobody home")) as (client, _, _):
            with pytest.raises(NoInstance, match="nobody home"):
                await client.call(GetStats(), 5)

    asyncio.run(scenario())


def test_a_bug_while_answering_does_not_leak_its_text() -> None:
    async def scenario() -> None:
        async with pair(ValueError("secret")) as (client, _, _):
            with pytest.raises(ProtocolError, match="internal error while handling GetStats"):
                await client.call(GetStats(), 5)

    asyncio.run(scenario())


def test_a_silent_peer_is_lost_at_the_deadline() -> None:
    async def scenario() -> None:
        async with pair(None) as (client, _, _):
            with pytest.raises(PeerLost, match="did not answer GetStats"):
                await client.call(GetStats(), 0.05)

    asyncio.run(scenario())


def test_calls_under_way_fail_when_the_peer_goes() -> None:
    async def scenario() -> None:
        async with pair(None) as (client, recorder, _):
            calling = asyncio.create_task(client.call(GetStats(), 30))
            await asyncio.sleep(0)
            client.close("gone")
            with pytest.raises(PeerLost, match="gone"):
                await calling
            with pytest.raises(PeerLost):
                client.notify(Shutdown())
            async with asyncio.timeout(5):
                await recorder.closed

    asyncio.run(scenario())


def frame(body: bytes, kind: int = 0) -> bytes:
    return struct.pack("<IIB", len(body), 0, kind) + body


@pytest.mark.parametrize(
    "garbage",
    [
        frame(b"\xff\xff\xff"),
        struct.pack("<IIB", MAX_FRAME + 1, 0, 0),
        frame(msgspec.msgpack.encode(Ok()), kind=9),
        frame(msgspec.msgpack.encode(["Unheard"])),
        frame(msgspec.msgpack.encode(["Reserve", 1, 2])),
    ],
    ids=["not msgpack", "frame too long", "unknown kind", "unknown message", "wrong types"],
)
def test_garbage_closes_the_connection(garbage: bytes) -> None:
    async def scenario() -> None:
        recorder = Recorder()
        address = f"@memserve-test-{uuid.uuid4().hex}"
        server = await listen(address, PeerMessage, lambda: recorder)
        with open_socket(address, 5) as raw:
            raw.sendall(garbage)
            async with asyncio.timeout(5):
                await recorder.closed
        server.close()
        assert recorder.notes == []

    asyncio.run(scenario())


def test_a_frame_in_single_bytes_is_understood() -> None:
    async def scenario() -> None:
        recorder = Recorder()
        address = f"@memserve-test-{uuid.uuid4().hex}"
        server = await listen(address, ControlMessage, lambda: recorder)
        with open_socket(address, 5) as raw:
            for byte in encode_notification(Shutdown()):
                raw.sendall(bytes([byte]))
                await asyncio.sleep(0)
            async with asyncio.timeout(5):
                await recorder.noted.wait()
        assert recorder.notes == [Shutdown()]
        async with asyncio.timeout(5):
            await recorder.closed
        server.close()

    asyncio.run(scenario())


def test_nobody_listening_is_a_lost_peer() -> None:
    async def scenario() -> None:
        with pytest.raises(PeerLost, match="cannot reach @memserve-nowhere"):
            await connect("@memserve-nowhere", ControlMessage, Recorder(), 1)
        with pytest.raises(ProtocolError, match="write @name"):
            await connect("udp://somewhere:1", ControlMessage, Recorder(), 1)

    asyncio.run(scenario())
