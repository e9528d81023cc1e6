"""Chunks from two instances in one order; losses, cancels and errors end a request everywhere, once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

import numpy as np
import pytest

from memserve.core.clock import VirtualClock
from memserve.core.errors import (
    InvalidRequest,
    NoInstance,
    Overloaded,
    PeerLost,
    RequestFailed,
)
from memserve.core.messages import (
    Cancel,
    GetSnapshot,
    Member,
    Message,
    PoolEvents,
    Ready,
    RequestClosed,
    RequestError,
    Snapshot,
    Stored,
    Submit,
    TokenChunk,
)
from memserve.core.types import (
    FinishReason,
    InstanceId,
    Ledger,
    Namespace,
    RequestId,
    Role,
    SamplingParams,
    pack_tokens,
)
from memserve.scheduler.policies import policy_by_name
from memserve.scheduler.service import GlobalScheduler
from memserve.scheduler.state import Work
from memserve.server.backend import Generated, GenerationRequest
from memserve.server.dispatch import Dispatcher

P, D = InstanceId("prefill-0"), InstanceId("decode-0")
R = RequestId("r")
PROMPT = np.arange(64, dtype=np.int32)


@dataclass
class Outbox:
    """Stands where the cluster manager does: keeps what is sent, answers calls as told."""

    sent: list[tuple[InstanceId, Message]] = field(default_factory=list)
    gone: set[InstanceId] = field(default_factory=set)
    snapshot: Snapshot | None = None

    def send(self, instance: InstanceId, message: Message) -> None:
        if instance in self.gone:
            raise PeerLost(f"{instance} is not a living member")
        self.sent.append((instance, message))

    async def call(self, instance: InstanceId, message: Message, timeout: float) -> Message:
        assert isinstance(message, GetSnapshot)
        assert self.snapshot is not None
        return self.snapshot

    def cancelled(self) -> list[tuple[InstanceId, FinishReason]]:
        return [(name, message.reason) for name, message in self.sent if isinstance(message, Cancel)]


class Quiet:
    """A start screen that nobody looks at."""

    def __init__(self) -> None:
        self.losses: list[str] = []

    def loading(self, instance: str, stage: str, fraction: float) -> None: ...

    def ready(self, url: str, model: str, lines: object = ()) -> None: ...

    def lost(self, instance: str, reason: str) -> None:
        self.losses.append(instance)

    def stopped(self) -> None: ...


def cluster(max_waiting: int = 8) -> tuple[Dispatcher, Outbox]:
    clock = VirtualClock()
    scheduler = GlobalScheduler(policy_by_name("prompt-tree"), clock)
    dispatcher = Dispatcher(scheduler, clock, Quiet(), model="m", max_waiting=max_waiting)
    outbox = Outbox()
    dispatcher.manager = outbox  # type: ignore[assignment]
    for name, role in ((P, Role.PREFILL), (D, Role.DECODE)):
        ready = Ready(name, f"@{name}", "m", 512, 16, 64, 4096, "layout", "reference")
        dispatcher.on_ready(Member(name, 1, role, f"@{name}"), ready)
    return dispatcher, outbox


def request(name: str = "r") -> GenerationRequest:
    return GenerationRequest(RequestId(name), PROMPT, SamplingParams(max_tokens=9))


def chunk(offset: int, *tokens: int, finish: FinishReason | None = None) -> TokenChunk:
    return TokenChunk(R, offset, tokens, finish=finish, ledger=Ledger(computed=64) if offset == 0 else None)


def run(scenario: Coroutine[None, None, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await scenario

    asyncio.run(bounded())


async def collect(dispatcher: Dispatcher, name: str = "r") -> list[Generated]:
    return [piece async for piece in dispatcher.generate(request(name))]


async def start(dispatcher: Dispatcher, outbox: Outbox) -> asyncio.Task[list[Generated]]:
    """Start a request and wait until it has been submitted."""
    task = asyncio.create_task(collect(dispatcher))
    while not any(isinstance(message, Submit) for _, message in outbox.sent):
        await asyncio.sleep(0)
    return task


def test_chunks_are_put_in_order_whoever_is_first() -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster()
        task = await start(dispatcher, outbox)
        name, submit = outbox.sent[0]
        assert (name, submit.decode_on) == (P, D)  # type: ignore[attr-defined]
        dispatcher.on_message(D, chunk(2, 12))
        dispatcher.on_message(D, chunk(1, 11))
        dispatcher.on_message(P, chunk(0, 10))
        dispatcher.on_message(D, chunk(3, 13, finish=FinishReason.LENGTH))
        pieces = await task
        assert [piece.tokens for piece in pieces] == [(10,), (11,), (12,), (13,)]
        assert pieces[0].ledger == Ledger(computed=64)
        assert pieces[-1].finish is FinishReason.LENGTH
        assert outbox.cancelled() == []

    run(scenario())


def test_a_repeated_chunk_is_not_shown_twice() -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster()
        task = await start(dispatcher, outbox)
        for message in (chunk(0, 10), chunk(0, 10), chunk(1, 11), chunk(0, 10), chunk(1, 11)):
            dispatcher.on_message(P, message)
        dispatcher.on_message(D, chunk(2, finish=FinishReason.STOP))
        assert [piece.tokens for piece in await task] == [(10,), (11,), ()]

    run(scenario())


@pytest.mark.parametrize(
    ("before", "lost", "fails"),
    [([], P, True), ([], D, True), ([0], P, True), ([0, 1], P, False), ([0, 1], D, True), ([1], P, False)],
)
def test_the_loss_of_an_instance_ends_what_needs_it(before: list[int], lost: InstanceId, fails: bool) -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster()
        task = await start(dispatcher, outbox)
        for offset in before:
            dispatcher.on_message(P, chunk(offset, 10 + offset))
        outbox.gone.add(lost)
        dispatcher.on_lost(lost, "it died")
        if fails:
            with pytest.raises(PeerLost, match=f"{lost} was lost .*it died"):
                await task
            assert [name for name, _ in outbox.cancelled()] == [D if lost == P else P]
        else:
            for offset in (0, 1):
                dispatcher.on_message(D, chunk(offset, 10 + offset))
            dispatcher.on_message(D, chunk(2, finish=FinishReason.STOP))
            assert [piece.tokens for piece in await task] == [(10,), (11,), ()]

    run(scenario())


def test_leaving_cancels_on_both_instances_and_unbooks() -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster()
        task = await start(dispatcher, outbox)
        dispatcher.on_message(P, chunk(0, 10))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        cancelled = FinishReason.CANCELLED
        assert sorted(outbox.cancelled()) == [(D, cancelled), (P, cancelled)]
        dispatcher.on_message(D, chunk(1, 11))
        load = [state.load for state in dispatcher._scheduler.state.instances()]
        assert load == [Work(), Work()]

    run(scenario())


def test_a_stop_string_keeps_the_kv() -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster()
        pieces = dispatcher.generate(request())
        asking = asyncio.ensure_future(anext(pieces))
        while not outbox.sent:
            await asyncio.sleep(0)
        dispatcher.on_message(P, chunk(0, 10))
        await asking
        dispatcher.stop(R)
        await pieces.aclose()
        assert sorted(outbox.cancelled()) == [(D, FinishReason.STOP), (P, FinishReason.STOP)]
        dispatcher.stop(R)
        assert len(outbox.cancelled()) == 2

    run(scenario())


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("InvalidRequest", InvalidRequest), ("Unheard", RequestFailed), ("Overloaded", Overloaded)],
)
def test_an_instances_error_ends_the_request(kind: str, expected: type[Exception]) -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster()
        task = await start(dispatcher, outbox)
        dispatcher.on_message(P, RequestError(R, kind, "no good"))
        dispatcher.on_message(P, RequestClosed(R, P))
        with pytest.raises(expected, match="no good"):
            await task

    run(scenario())


def test_too_many_or_nobody_or_twice_is_refused_at_once() -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster(max_waiting=1)
        task = await start(dispatcher, outbox)
        with pytest.raises(Overloaded, match="1 requests"):
            await collect(dispatcher, "another")
        with pytest.raises(InvalidRequest, match="in use"):
            await collect(dispatcher)
        dispatcher.on_message(P, chunk(0, 10, finish=FinishReason.LENGTH))
        await task
        dispatcher.on_lost(P, "it died")
        with pytest.raises(NoInstance, match="prefill"):
            await collect(dispatcher)

    run(scenario())


def test_closing_ends_requests_and_takes_no_more() -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster()
        task = await start(dispatcher, outbox)
        dispatcher.close()
        for attempt in (task, asyncio.create_task(collect(dispatcher, "late"))):
            with pytest.raises(NoInstance, match="stopping"):
                await attempt

    run(scenario())


def test_a_gap_in_the_events_asks_for_one_snapshot() -> None:
    async def scenario() -> None:
        dispatcher, outbox = cluster()
        space = Namespace("m")
        path = Stored(space, pack_tokens(PROMPT))
        outbox.snapshot = Snapshot(P, 1, 6, (path,))
        for seq in (4, 5):
            dispatcher.on_message(P, PoolEvents(P, 1, seq, (path,)))
        tree = dispatcher._scheduler.state.tree
        await until(lambda: tree.held_tokens(P) == 64)
        dispatcher._scheduler.state.check()

    run(scenario())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)
