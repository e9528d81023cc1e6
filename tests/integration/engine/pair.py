"""Two engines with pools, a tiny model and real transfers, and ways to hold them at any moment."""

from __future__ import annotations

import asyncio
import math
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memserve.core.clock import MonotonicClock
from memserve.core.messages import Member, Message, RequestClosed, RequestError, Submit, TokenChunk
from memserve.core.types import (
    FinishReason,
    InstanceId,
    Ledger,
    Namespace,
    RequestId,
    Role,
    SamplingParams,
    Tokens,
    pack_tokens,
)
from memserve.engine.batcher import Batcher
from memserve.engine.carrier import PoolCarrier
from memserve.engine.engine import Engine
from memserve.engine.models.tiny import tiny_weights
from memserve.engine.overlap import Overlap
from memserve.engine.phases import PHASES, Handoff
from memserve.engine.runners.base import ForwardBatch
from memserve.engine.runners.native import NativeRunner
from memserve.engine.runners.reference import ReferenceRunner
from memserve.engine.sequence import Sequence
from memserve.mempool import MemPool, TransferEndpoint

P, D = InstanceId("prefill-0"), InstanceId("decode-0")
SPACE = Namespace("tiny")
CONTEXT = 256
WEIGHTS = tiny_weights(11, context=CONTEXT)
BLOCK_BYTES = ReferenceRunner(WEIGHTS).layout.block_bytes
SECONDS = 30.0
"""Longest that anything here may take."""


class Gate:
    """Holds the worker threads that come here while it is closed; ``held`` counts those that had to wait."""

    def __init__(self) -> None:
        self.held = 0
        self._permits = math.inf
        self._changed = threading.Condition()

    def close(self) -> None:
        self._set(0)

    def open(self) -> None:
        self._set(math.inf)

    def let_one_pass(self) -> None:
        self._set(1)

    def pass_through(self) -> None:
        with self._changed:
            self.held += self._permits <= 0
            opened = self._changed.wait_for(lambda: self._permits > 0, SECONDS)
            assert opened, "a test has forgotten to open a gate"
            self._permits -= 1

    def _set(self, permits: float) -> None:
        with self._changed:
            self._permits = permits
            self._changed.notify_all()


class Gated:
    """A runner that can be held before each forward pass, fails at the end of one, and counts rows."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.gate = Gate()
        self.rows = 0
        self.fails = False

    def forward(self, batch: ForwardBatch, *more: Any) -> NDArray[np.float32]:
        self.gate.pass_through()
        self.rows += len(batch.tokens)
        logits: NDArray[np.float32] = super().forward(batch, *more)  # type: ignore[misc]
        if self.fails:
            self.fails = False
            raise MemoryError("no memory for activations")
        return logits


class GatedReference(Gated, ReferenceRunner):
    """The oracle, gated."""


class GatedNative(Gated, NativeRunner):
    """The kernels, gated."""


GatedRunner = GatedReference | GatedNative


@dataclass
class Node:
    """An instance without a process around it. ``on_step`` hears of its transfers, ``copying`` holds them."""

    engine: Engine
    pool: MemPool
    endpoint: TransferEndpoint
    carrier: PoolCarrier
    member: Member
    runner: GatedRunner
    copying: Gate
    on_step: list[Callable[[str], None]]

    def find(self, name: str) -> Sequence | None:
        return self.engine.batcher.find(RequestId(name))

    def held(self) -> int:
        """Blocks that are in use, or in a transfer."""
        stats = self.pool.stats()
        return stats.active + stats.incoming

    def check_idle(self) -> None:
        """Nothing is held by anybody, and every block is free or cached."""
        stats = self.pool.stats()
        self.pool.check(())
        self.engine.batcher.check()
        assert list(self.engine.batcher) == []
        assert (stats.active, stats.incoming, stats.leases, stats.lent, stats.pinned) == (0, 0, 0, 0, 0)
        assert stats.free + stats.historical == stats.blocks


@dataclass
class Pair:
    """P and D, and all that they have said."""

    p: Node
    d: Node
    said: list[Message]
    decode_on: InstanceId | None = D
    heard: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def decoder(self) -> Node:
        """Where answers are decoded."""
        return self.p if self.decode_on is None else self.d

    def ask(
        self,
        name: str,
        prompt: Tokens,
        max_tokens: int = 8,
        stop: tuple[int, ...] = (),
        trace: bool = False,
    ) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_token_ids=stop)
        self.p.engine.submit(
            Submit(RequestId(name), SPACE, pack_tokens(prompt), sampling, self.decode_on, trace)
        )

    def cancel(self, name: str, reason: FinishReason, nodes: tuple[Node, ...]) -> None:
        """What the server does: tell both, in any order."""
        for node in nodes:
            node.engine.cancel(RequestId(name), reason)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Until something that was said makes it true."""
        async with asyncio.timeout(SECONDS):
            while not condition():
                self.heard.clear()
                await self.heard.wait()

    async def spin(self, condition: Callable[[], bool]) -> None:
        """Until it is true, where nobody says so."""
        async with asyncio.timeout(SECONDS):
            while not condition():
                await asyncio.sleep(0)

    async def closed(self, name: str) -> None:
        await self.until(
            lambda: any(
                isinstance(message, RequestClosed) and message.request == name for message in self.said
            )
        )

    def answer(self, name: str) -> list[int]:
        chunks = [m for m in self.said if isinstance(m, TokenChunk) and m.request == name]
        return [token for chunk in sorted(chunks, key=lambda chunk: chunk.offset) for token in chunk.tokens]

    def ledger(self, name: str) -> Ledger:
        return next(
            m.ledger for m in self.said if isinstance(m, TokenChunk) and m.request == name and m.ledger
        )

    def error(self, name: str) -> RequestError:
        return next(m for m in self.said if isinstance(m, RequestError) and m.request == name)


@asynccontextmanager
async def node(
    name: InstanceId,
    role: Role,
    phases: str,
    blocks: int,
    emit: Callable[[Message], None],
    *,
    timeout: float,
    host_blocks: int = 0,
    step_tokens: int = 64,
    max_running: int = 4,
    overlap: Overlap = Overlap.AUTO,
    backflow_tokens: int = 256,
    limits: Mapping[str, float] | None = None,
    make_runner: Callable[[], GatedRunner] = lambda: GatedReference(WEIGHTS),
) -> AsyncIterator[Node]:
    runner, clock, copying = make_runner(), MonotonicClock(), Gate()
    on_step: list[Callable[[str], None]] = []

    def observe(step: str) -> None:
        if step == "copying":
            copying.pass_through()
        else:
            for listener in on_step:
                listener(step)

    pool = MemPool(runner.layout, blocks, instance=name, incarnation=1, clock=clock, host_blocks=host_blocks)
    endpoint = TransferEndpoint(pool, clock, observe=observe, **(limits or {}))
    address = f"@memserve-test-{uuid.uuid4().hex}"
    await endpoint.start(address)
    carrier = PoolCarrier(name, pool, clock, timeout=timeout)
    engine = Engine(
        name,
        pool,
        runner,
        Batcher(step_tokens=step_tokens, max_running=max_running),
        PHASES[phases],
        carrier,
        context=CONTEXT,
        vocabulary=WEIGHTS.spec.vocabulary,
        clock=clock,
        emit=emit,
        overlap=overlap,
        backflow_tokens=backflow_tokens,
    )
    endpoint.on_adopt = engine.adopt
    running = asyncio.create_task(engine.run())
    try:
        yield Node(engine, pool, endpoint, carrier, Member(name, 1, role, address), runner, copying, on_step)
    finally:
        runner.gate.open()
        copying.open()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await engine.close()
        await endpoint.close()
        pool.check(())
        pool.close()
        runner.close()


@asynccontextmanager
async def pair(
    phases: str = "pd-caching-3",
    *,
    p_blocks: int = 64,
    d_blocks: int = 64,
    timeout: float = 20.0,
    host_blocks: int = 0,
    step_tokens: int = 64,
    max_running: int = 4,
    overlap: Overlap = Overlap.AUTO,
    backflow_tokens: int = 256,
    limits: Mapping[str, float] | None = None,
    make_runner: Callable[[], GatedRunner] = lambda: GatedReference(WEIGHTS),
) -> AsyncIterator[Pair]:
    made: list[Pair] = []

    def emit(message: Message) -> None:
        made[0].said.append(message)
        made[0].heard.set()

    more: dict[str, Any] = {
        "timeout": timeout,
        "host_blocks": host_blocks,
        "step_tokens": step_tokens,
        "max_running": max_running,
        "overlap": overlap,
        "backflow_tokens": backflow_tokens,
        "limits": limits,
        "make_runner": make_runner,
    }
    async with AsyncExitStack() as stack:
        p = await stack.enter_async_context(node(P, Role.PREFILL, phases, p_blocks, emit, **more))
        d = await stack.enter_async_context(node(D, Role.DECODE, phases, d_blocks, emit, **more))
        handed_over = PHASES[phases].handoff is not Handoff.NONE
        made.append(Pair(p, d, [], D if handed_over else None))
        for each in (p, d):
            each.carrier.set_members((p.member, d.member))
        yield made[0]


def prompt(length: int, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(1, WEIGHTS.spec.vocabulary, length).astype(np.int32)


def run(scenario: Coroutine[None, None, None]) -> None:
    asyncio.run(scenario)
