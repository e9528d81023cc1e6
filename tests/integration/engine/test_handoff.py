"""Two engines, two pools, real transfers: P to D and back in every phase, and when that cannot be done."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest

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
from memserve.engine.phases import PHASES
from memserve.engine.runners.base import Runner
from memserve.engine.runners.native import NativeRunner
from memserve.engine.runners.reference import ReferenceRunner
from memserve.mempool import MemPool, TransferEndpoint

P, D = InstanceId("prefill-0"), InstanceId("decode-0")
SPACE = Namespace("tiny")
CONTEXT = 256
WEIGHTS = tiny_weights(11, context=CONTEXT)


@dataclass
class Node:
    """An instance without a process around it."""

    engine: Engine
    pool: MemPool
    endpoint: TransferEndpoint
    carrier: PoolCarrier
    member: Member
    said: list[Message]


@dataclass
class Pair:
    """P and D, and all that they have said."""

    p: Node
    d: Node
    said: list[Message]
    heard: asyncio.Event = field(default_factory=asyncio.Event)

    decode_on: InstanceId | None = D

    def ask(self, name: str, prompt: Tokens, max_tokens: int = 8) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        self.p.engine.submit(Submit(RequestId(name), SPACE, pack_tokens(prompt), sampling, self.decode_on))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                self.heard.clear()
                await self.heard.wait()

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
    timeout: float,
    make_runner: Callable[[], Runner] = lambda: ReferenceRunner(WEIGHTS),
    step_tokens: int = 64,
) -> AsyncIterator[Node]:
    runner, clock = make_runner(), MonotonicClock()
    pool = MemPool(runner.layout, blocks, instance=name, incarnation=1, clock=clock)
    endpoint = TransferEndpoint(pool, clock)
    address = f"@memserve-test-{uuid.uuid4().hex}"
    await endpoint.start(address)
    carrier = PoolCarrier(name, pool, clock, timeout=timeout)
    engine = Engine(
        name,
        pool,
        runner,
        Batcher(step_tokens=step_tokens, max_running=4),
        PHASES[phases],
        carrier,
        context=CONTEXT,
        vocabulary=WEIGHTS.spec.vocabulary,
        clock=clock,
        emit=emit,
    )
    endpoint.on_adopt = engine.adopt
    running = asyncio.create_task(engine.run())
    try:
        yield Node(engine, pool, endpoint, carrier, Member(name, 1, role, address), [])
    finally:
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
    d_blocks: int = 64,
    timeout: float = 20.0,
    make_runner: Callable[[], Runner] = lambda: ReferenceRunner(WEIGHTS),
) -> AsyncIterator[Pair]:
    made: list[Pair] = []

    def emit(message: Message) -> None:
        made[0].said.append(message)
        made[0].heard.set()

    async with AsyncExitStack() as stack:
        p, d = [
            await stack.enter_async_context(node(name, role, phases, blocks, emit, timeout, make_runner))
            for name, role, blocks in ((P, Role.PREFILL, 64), (D, Role.DECODE, d_blocks))
        ]
        made.append(Pair(p, d, []))
        for each in (p, d):
            each.carrier.set_members((p.member, d.member))
        yield made[0]


def prompt(length: int, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(1, WEIGHTS.spec.vocabulary, length).astype(np.int32)


def run(scenario: Coroutine[None, None, None]) -> None:
    asyncio.run(scenario)


def turns(phases: str) -> tuple[list[list[int]], list[Ledger], tuple[int, int], int]:
    """Two turns of a chat: answers, ledgers, historical blocks on P and D, bytes that went P to D."""
    result: list[tuple[list[list[int]], list[Ledger], tuple[int, int], int]] = []

    async def scenario() -> None:
        async with pair(phases) as both:
            history = prompt(40)
            answers, ledgers = [], []
            for turn in ("one", "two"):
                both.ask(turn, history, 30)
                await both.closed(turn)
                answers.append(both.answer(turn))
                ledgers.append(both.ledger(turn))
                history = np.concatenate([history, np.array(answers[-1], np.int32), prompt(10, seed=5)])
            kept = (both.p.pool.stats().historical, both.d.pool.stats().historical)
            result.append((answers, ledgers, kept, both.p.pool.stats().sent_bytes))

    run(scenario())
    return result[0]


BLOCK_BYTES = ReferenceRunner(WEIGHTS).layout.block_bytes


@pytest.mark.parametrize(
    ("phases", "second", "kept", "sent_blocks"),
    [
        # Turn one: 40 tokens in 3 blocks, 30 sampled, KV of 69. Turn two: 80 in 5 blocks, KV of 109.
        ("pd-basic", Ledger(computed=80), (0, 0), 3 + 5),
        ("pd-caching-1", Ledger(computed=48, local=32), (5, 0), 3 + 5),
        ("pd-caching-2", Ledger(computed=48, local=32), (5, 6), 3 + 1),
        ("pd-caching-3", Ledger(computed=16, local=32, backflow=32), (6, 6), 3 + 1),
    ],
)
def test_each_phase_moves_and_keeps_what_the_table_says(
    phases: str, second: Ledger, kept: tuple[int, int], sent_blocks: int
) -> None:
    answers, ledgers, found, sent = turns(phases)
    assert answers == turns("pd-basic")[0], "the answer does not depend on the phases"
    assert ledgers == [Ledger(computed=40), second]
    assert found == kept
    assert sent == sent_blocks * BLOCK_BYTES


def test_a_request_that_ends_with_its_first_token_is_not_handed_over() -> None:
    async def scenario() -> None:
        async with pair() as both:
            both.ask("short", prompt(20), 1)
            await both.closed("short")
            assert len(both.answer("short")) == 1
            assert both.d.pool.stats().received == 0

    run(scenario())


def test_p_waits_for_room_on_d() -> None:
    async def scenario() -> None:
        async with pair(d_blocks=4) as both:
            hog = both.d.pool.alloc_mem(4)
            both.ask("patient", prompt(40))
            await both.until(lambda: bool(both.answer("patient")))
            await asyncio.sleep(0.1)
            assert len(both.answer("patient")) == 1
            both.d.pool.free_mem(hog)
            await both.closed("patient")
            assert len(both.answer("patient")) == 8

    run(scenario())


def test_p_gives_up_when_d_stays_full_and_keeps_the_prompt() -> None:
    async def scenario() -> None:
        async with pair(d_blocks=4, timeout=0.1) as both:
            hog = both.d.pool.alloc_mem(4)
            both.ask("unlucky", prompt(40))
            await both.closed("unlucky")
            assert both.error("unlucky").kind == "Overloaded"
            assert "decode-0 had no room" in both.error("unlucky").message
            assert both.p.pool.stats().historical == 2
            both.d.pool.free_mem(hog)

    run(scenario())


def test_a_cancel_that_overtakes_the_handover_stops_it_on_d() -> None:
    async def scenario() -> None:
        async with pair() as both:
            both.d.engine.cancel(RequestId("gone"), FinishReason.CANCELLED)
            both.ask("gone", prompt(40))
            await both.closed("gone")
            assert "cancelled before" in both.error("gone").message
            assert both.d.pool.stats().active == 0

    run(scenario())


def test_a_cancel_during_the_handover_frees_both_sides() -> None:
    async def scenario() -> None:
        async with pair(d_blocks=4) as both:
            hog = both.d.pool.alloc_mem(4)
            both.ask("left", prompt(40))
            await both.until(lambda: bool(both.answer("left")))
            both.p.engine.cancel(RequestId("left"), FinishReason.CANCELLED)
            await both.closed("left")
            assert both.p.pool.stats().active == 0
            both.d.pool.free_mem(hog)

    run(scenario())


def test_a_lost_d_fails_the_request_and_a_lost_p_only_the_backflow() -> None:
    async def scenario() -> None:
        async with pair() as both:
            both.p.carrier.set_members((both.p.member,))
            both.ask("no d", prompt(40))
            await both.closed("no d")
            assert both.error("no d").kind == "PeerLost"
            both.p.carrier.set_members((both.p.member, both.d.member))
            both.d.carrier.set_members((both.d.member,))
            both.ask("no p", prompt(40), 30)
            await both.closed("no p")
            assert len(both.answer("no p")) == 30
            assert both.p.pool.stats().received == 0

    run(scenario())


def test_decode_preempts_and_recovers_when_its_pool_is_small() -> None:
    async def scenario() -> None:
        async with pair(d_blocks=12) as both:
            for at in range(4):
                both.ask(f"r{at}", prompt(40, seed=at), 100)
            for at in range(4):
                await both.closed(f"r{at}")
            found = [both.answer(f"r{at}") for at in range(4)]
        async with pair() as roomy:
            for at in range(4):
                roomy.ask(f"r{at}", prompt(40, seed=at), 100)
                await roomy.closed(f"r{at}")
            assert found == [roomy.answer(f"r{at}") for at in range(4)]

    run(scenario())


# --- KV in int8 -----------------------------------------------------------------------------------------


@asynccontextmanager
async def alone(make_runner: Callable[[], Runner], step_tokens: int) -> AsyncIterator[Pair]:
    """One instance that does both, in the words of a pair."""
    made: list[Pair] = []

    def emit(message: Message) -> None:
        made[0].said.append(message)
        made[0].heard.set()

    parts = (InstanceId("colocated-0"), Role.COLOCATED, "colocated", 64, emit, 20.0, make_runner, step_tokens)
    async with node(*parts) as both:
        made.append(Pair(both, both, [], decode_on=None))
        yield made[0]


def native_int8() -> Runner:
    return NativeRunner(WEIGHTS, threads=1, context=CONTEXT, kv_dtype="int8")


def reference_int8() -> Runner:
    return ReferenceRunner(WEIGHTS, layout_dtype="int8")


@pytest.mark.parametrize("make_runner", [native_int8, reference_int8])
def test_int8_kv_gives_the_same_tokens_wherever_it_is_computed(make_runner: Callable[[], Runner]) -> None:
    """Two turns: each on an instance of its own; in chunks beside others, from the cache; P to D and back."""

    async def turns_on(there: Pair, beside: Sequence[int]) -> tuple[list[list[int]], list[Ledger]]:
        history, answers, ledgers = prompt(70), [], []
        for turn in ("one", "two"):
            for mate in beside:
                there.ask(f"{turn} beside {mate}", prompt(mate, seed=mate), 20)
            there.ask(turn, history, 30)
            for name in (turn, *(f"{turn} beside {mate}" for mate in beside)):
                await there.closed(name)
            answers.append(there.answer(turn))
            ledgers.append(there.ledger(turn))
            history = np.concatenate([history, np.array(answers[-1], np.int32), prompt(10, seed=5)])
        return answers, ledgers

    async def scenario() -> None:
        expected = []
        history = prompt(70)
        for _ in range(2):
            async with alone(make_runner, 4096) as fresh:
                fresh.ask("only", history, 30)
                await fresh.closed("only")
                expected.append(fresh.answer("only"))
                history = np.concatenate([history, np.array(expected[-1], np.int32), prompt(10, seed=5)])
        async with alone(make_runner, 16) as chunked:
            answers, ledgers = await turns_on(chunked, (33, 17))
            assert (answers, ledgers[1].local) == (expected, 96)
        async with pair(make_runner=make_runner) as both:
            answers, ledgers = await turns_on(both, ())
            assert (answers, ledgers[1].backflow) == (expected, 32)
            assert both.d.pool.stats().received > 0

    run(scenario())
