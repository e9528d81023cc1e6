"""A dispatcher whose instances are an outbox: what is sent is kept, what they say is said by the test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

import numpy as np

from memserve.core.clock import VirtualClock
from memserve.core.errors import PeerLost
from memserve.core.messages import Cancel, GetSnapshot, Member, Message, Ready, Snapshot, Submit, TokenChunk
from memserve.core.types import FinishReason, InstanceId, Ledger, RequestId, Role, SamplingParams
from memserve.scheduler.admission import LineLimits
from memserve.scheduler.policies import policy_by_name
from memserve.scheduler.prompt_trees import TreeOptions
from memserve.scheduler.service import GlobalScheduler
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

    def submitted(self) -> list[tuple[InstanceId, Submit]]:
        return [(name, message) for name, message in self.sent if isinstance(message, Submit)]

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

    def back(self, instance: str) -> None: ...

    def stopped(self) -> None: ...


def cluster(
    limits: LineLimits | None = None,
    trees: TreeOptions | None = None,
    weight: Callable[[str], float] = lambda tenant: 1.0,
    policy: str = "prompt-tree",
) -> tuple[Dispatcher, Outbox]:
    clock = VirtualClock()
    scheduler = GlobalScheduler(policy_by_name(policy), clock, trees=trees)
    dispatcher = Dispatcher(scheduler, clock, Quiet(), model="m", limits=limits, weight=weight)
    outbox = Outbox()
    dispatcher.manager = outbox  # type: ignore[assignment]
    for name in (P, D):
        add(dispatcher, name)
    return dispatcher, outbox


def add(dispatcher: Dispatcher, name: InstanceId, incarnation: int = 1) -> None:
    """An instance becomes ready; its name says its role."""
    ready = Ready(name, f"@{name}", "m", 512, 16, 64, 4096, "layout", "reference")
    role = Role(name.partition("-")[0])
    dispatcher.on_ready(Member(name, incarnation, role, f"@{name}"), ready)


def request(name: str = "r", start: int = 0) -> GenerationRequest:
    """Its prompt counts up from ``start``."""
    return GenerationRequest(RequestId(name), PROMPT + start, SamplingParams(max_tokens=9))


def chunk(offset: int, *tokens: int, finish: FinishReason | None = None) -> TokenChunk:
    return TokenChunk(R, offset, tokens, finish=finish, ledger=Ledger(computed=64) if offset == 0 else None)


def run(scenario: Coroutine[None, None, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await scenario

    asyncio.run(bounded())


async def collect(dispatcher: Dispatcher, name: str = "r", start: int = 0) -> list[Generated]:
    return [piece async for piece in dispatcher.generate(request(name, start))]


async def start(dispatcher: Dispatcher, outbox: Outbox) -> asyncio.Task[list[Generated]]:
    """Start a request and wait until it has been submitted."""
    task = asyncio.create_task(collect(dispatcher))
    while not any(isinstance(message, Submit) for _, message in outbox.sent):
        await asyncio.sleep(0)
    return task


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)
