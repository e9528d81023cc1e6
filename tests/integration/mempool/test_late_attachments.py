"""A transfer whose layers and attachment come late: messages that are lost, attachments that never come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from memserve.core.clock import VirtualClock
from memserve.core.errors import LeaseExpired, MemServeError, PeerLost, TransferAborted
from memserve.core.types import InstanceId
from memserve.mempool import Addresses, Arrangement, LayerGate, MemPool, TransferMode, Transferred

from .conftest import DEADLINE, serving, until
from .message_proxy import Line, line_to
from .peer_process import LAYOUTS, NS, SECURITY, fill_blocks, holds_pattern, member, tokens_of

B = InstanceId("b")
LAYOUT = LAYOUTS[Arrangement.AGGREGATED]
BLOCKS = 6
PATIENCE = 0.3
ATTACHMENT = b"the first token"
each_way = pytest.mark.parametrize("backend", ["shm", "tcp"])
each_mode = pytest.mark.parametrize("mode", [TransferMode.BY_LAYER, TransferMode.BY_REQUEST_AGGREGATED])


@dataclass
class Computing:
    """A pool whose blocks are being computed, the peer that is to have them, and the line between."""

    pool: MemPool
    there: MemPool
    line: Line
    src: Addresses
    gate: LayerGate
    attachment: asyncio.Future[bytes]
    adopted: list[tuple[bytes, Addresses]]
    steps: list[str] = field(default_factory=list)

    def send(self, mode: TransferMode) -> asyncio.Task[Transferred]:
        return asyncio.ensure_future(
            self.pool.transfer_with_insert(
                B,
                tokens_of(1, BLOCKS),
                self.src,
                NS,
                mode=mode,
                ready=self.gate,
                attachment=self.attachment,
            )
        )

    async def at_step(self, step: str) -> None:
        await until(lambda: step in self.steps)

    async def compute(self) -> None:
        for layer in range(LAYOUT.layers):
            self.gate.open(layer + 1)
            await asyncio.sleep(0)

    def found(self) -> int:
        with self.there.match(tokens_of(1, BLOCKS), NS) as match:
            assert holds_pattern(self.there, match.addrs, 1)
            return len(match.addrs)

    async def nothing_is_held(self) -> None:
        for _, addrs in self.adopted:
            self.there.free_mem(addrs)
        await until(lambda: self.there.stats().incoming == 0)
        self.there.check([])
        self.pool.check([self.src])


@asynccontextmanager
async def computing(backend: str, **options: Any) -> AsyncIterator[Computing]:
    limits = {"security": SECURITY, "backends": (backend,)}
    steps: list[str] = []
    adopted: list[tuple[bytes, Addresses]] = []
    async with (
        serving("b", layout=LAYOUT, blocks=64, **limits) as (there, other, address),
        line_to(address) as line,
        serving("a", layout=LAYOUT, blocks=64, observe=steps.append, **limits, **options) as (
            pool,
            endpoint,
            _,
        ),
    ):
        other.on_adopt = lambda attachment, addrs: adopted.append((attachment, addrs))
        endpoint.set_peers((member("b", line.address),))
        await endpoint.connect(member("b", line.address))
        src = pool.alloc_mem(BLOCKS)
        fill_blocks(pool, src, 1)
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        yield Computing(pool, there, line, src, LayerGate(), future, adopted, steps)


@each_way
@each_mode
def test_nothing_is_published_before_the_attachment_is_there(backend: str, mode: TransferMode) -> None:
    async def scenario() -> None:
        async with computing(backend) as one:
            sending = one.send(mode)
            await one.at_step("reserved")
            await one.compute()
            await one.at_step("copied")
            assert (one.found(), one.adopted, sending.done()) == (0, [], False)
            one.attachment.set_result(ATTACHMENT)
            async with asyncio.timeout(DEADLINE):
                done = await sending
            assert (done.sent, done.mode, done.backend) == (BLOCKS, mode, backend)
            assert one.found() == BLOCKS
            assert [attachment for attachment, _ in one.adopted] == [ATTACHMENT]
            await one.nothing_is_held()

    asyncio.run(scenario())


@each_way
@each_mode
@pytest.mark.parametrize("message", ["Reserve", "Reserved", "Copied", "Publish", "Published"])
@pytest.mark.parametrize("fault", ["lose", "late", "double", "overtaken"])
def test_each_message_lost_late_doubled_or_overtaken(
    backend: str, mode: TransferMode, message: str, fault: str
) -> None:
    """All or nothing, adopted once or never; with what was lost goes the transfer, and it can be repeated."""
    if (backend, message) == ("tcp", "Copied"):
        pytest.skip("a stream announces nothing")

    async def scenario() -> None:
        # A message that is only overtaken waits for the next one, which may not come.
        quick = fault in ("lose", "late", "overtaken")
        async with computing(backend, **({"call_seconds": PATIENCE} if quick else {})) as one:
            one.line.fault, one.line.strikes = fault, message
            sending = one.send(mode)
            await one.compute()
            one.attachment.set_result(ATTACHMENT)
            async with asyncio.timeout(DEADLINE):
                (done,) = await asyncio.gather(sending, return_exceptions=True)
            assert one.line.struck.is_set()
            one.line.release.set()
            if fault == "double" or message == "Copied":
                assert isinstance(done, Transferred)
            else:
                assert isinstance(done, PeerLost)
            published = isinstance(done, Transferred) or message == "Published"
            await until(lambda: one.there.stats().incoming == 0)
            assert (one.found(), len(one.adopted)) == ((BLOCKS, 1) if published else (0, 0))
            if not published:
                async with asyncio.timeout(DEADLINE):
                    assert (await one.send(mode)).sent == BLOCKS
                assert (one.found(), len(one.adopted)) == (BLOCKS, 1)
            await one.nothing_is_held()

    asyncio.run(scenario())


@each_way
@each_mode
@pytest.mark.parametrize("how", ["called off", "never comes", "cancelled", "receiver gives up"])
def test_an_attachment_that_does_not_come_costs_no_block(backend: str, mode: TransferMode, how: str) -> None:
    async def scenario() -> None:
        seconds = 30.0 if how in ("called off", "cancelled") else PATIENCE
        async with computing(backend, reserve_seconds=seconds) as one:
            sending = one.send(mode)
            await one.compute()
            await one.at_step("copied")
            if how == "called off":
                one.attachment.cancel()
            elif how == "cancelled":
                sending.cancel()
            async with asyncio.timeout(DEADLINE):
                (error,) = await asyncio.gather(sending, return_exceptions=True)
            if how == "cancelled":
                assert isinstance(error, asyncio.CancelledError)
                assert not one.attachment.cancelled(), "it is the caller's"
            else:
                assert isinstance(error, (TransferAborted, LeaseExpired))
            assert isinstance(error, (asyncio.CancelledError, MemServeError))
            await one.nothing_is_held()
            assert one.found() == 0
            assert one.adopted == []

    asyncio.run(scenario())


@each_way
@each_mode
def test_waiting_does_not_count_as_work(backend: str, mode: TransferMode) -> None:
    clock = VirtualClock()

    async def scenario() -> None:
        async with computing(backend, clock=clock) as one:
            sending = one.send(mode)
            await one.at_step("reserved")
            clock.advance(5.0)
            await one.compute()
            await one.at_step("copied")
            clock.advance(7.0)
            one.attachment.set_result(ATTACHMENT)
            async with asyncio.timeout(DEADLINE):
                assert (await sending).seconds == 0.0
            await one.nothing_is_held()

    asyncio.run(scenario())
