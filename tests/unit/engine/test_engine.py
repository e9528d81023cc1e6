"""The engine on a tiny model and a small pool: answers, reuse, preemption, cancels; no block is ever lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from memserve.core.clock import Clock, MonotonicClock, VirtualClock
from memserve.core.errors import ConfigError
from memserve.core.messages import Message, RequestClosed, RequestError, Submit, TokenChunk, Trace
from memserve.core.types import (
    FinishReason,
    InstanceId,
    Ledger,
    Namespace,
    RequestId,
    SamplingParams,
    Tokens,
    pack_tokens,
)
from memserve.engine.batcher import Batcher
from memserve.engine.carrier import NoPeers
from memserve.engine.engine import Engine
from memserve.engine.models.tiny import tiny_weights
from memserve.engine.phases import PHASES
from memserve.engine.runners.base import ForwardBatch, LayerSignal
from memserve.engine.runners.reference import ReferenceRunner
from memserve.mempool.address import Addresses, Origin, Tier
from memserve.mempool.disk import DiskTier
from memserve.mempool.layout import Arrangement
from memserve.mempool.pool import MemPool
from memserve.mempool.stats import AbortCause

HERE = InstanceId("colocated-0")
SPACE = Namespace("tiny")
CONTEXT = 256
WEIGHTS = tiny_weights(3, context=CONTEXT)


@dataclass
class Bench:
    """An engine under test and what it has said."""

    engine: Engine
    pool: MemPool
    said: list[Message] = field(default_factory=list)
    heard: asyncio.Event = field(default_factory=asyncio.Event)

    def ask(self, name: str, prompt: Tokens, max_tokens: int = 8, **more: object) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, **more)  # type: ignore[arg-type]
        self.engine.submit(Submit(RequestId(name), SPACE, pack_tokens(prompt), sampling, trace=True))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                self.heard.clear()
                await self.heard.wait()

    async def closed(self, *names: str) -> None:
        wanted = set(names)
        await self.until(lambda: wanted <= {m.request for m in self.said if isinstance(m, RequestClosed)})

    def chunks(self, name: str) -> list[TokenChunk]:
        return [m for m in self.said if isinstance(m, TokenChunk) and m.request == name]

    def answer(self, name: str) -> list[int]:
        return [token for chunk in self.chunks(name) for token in chunk.tokens]

    def finish(self, name: str) -> FinishReason | None:
        return self.chunks(name)[-1].finish

    def ledger(self, name: str) -> Ledger:
        ledger = self.chunks(name)[0].ledger
        assert ledger is not None
        return ledger

    def error(self, name: str) -> RequestError:
        return next(m for m in self.said if isinstance(m, RequestError) and m.request == name)


@asynccontextmanager
async def bench(
    *,
    blocks: int = 64,
    phases: str = "colocated",
    step_tokens: int = 64,
    max_running: int = 8,
    runner: ReferenceRunner | None = None,
    host_blocks: int = 0,
    disk: DiskTier | None = None,
    pool_type: type[MemPool] = MemPool,
    clock: Clock | None = None,
) -> AsyncIterator[Bench]:
    runner = runner or ReferenceRunner(WEIGHTS)
    clock = clock or MonotonicClock()
    pool = pool_type(
        runner.layout,
        blocks,
        instance=HERE,
        incarnation=1,
        clock=clock,
        host_blocks=host_blocks,
        disk=disk,
    )
    made: list[Bench] = []

    def emit(message: Message) -> None:
        made[0].said.append(message)
        made[0].heard.set()

    engine = Engine(
        HERE,
        pool,
        runner,
        Batcher(step_tokens=step_tokens, max_running=max_running),
        PHASES[phases],
        NoPeers(),
        context=CONTEXT,
        vocabulary=WEIGHTS.spec.vocabulary,
        clock=clock,
        emit=emit,
    )
    made.append(Bench(engine, pool))
    running = asyncio.create_task(engine.run())
    try:
        yield made[0]
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await engine.close()
        engine.batcher.check()
        pool.check()
        stats = pool.stats()
        assert stats.active == 0, f"{stats.active} blocks are still held"
        pool.close()


def prompt(length: int, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(1, WEIGHTS.spec.vocabulary, length).astype(np.int32)


def alone(tokens: Tokens, max_tokens: int = 8) -> list[int]:
    """The answer of an engine that computes nothing but this, in one chunk, without any cache."""

    async def scenario() -> list[int]:
        async with bench(phases="pd-basic", step_tokens=4096) as one:
            one.ask("only", tokens, max_tokens)
            await one.closed("only")
            return one.answer("only")

    return asyncio.run(scenario())


def test_answers_do_not_depend_on_chunks_cache_or_batch() -> None:
    prompts = [prompt(length, seed=length) for length in (1, 15, 16, 17, 40, 130)]
    expected = [alone(tokens) for tokens in prompts]

    async def scenario() -> None:
        async with bench(step_tokens=16, max_running=4) as one:
            for turn in ("cold", "warm"):
                for at, tokens in enumerate(prompts):
                    one.ask(f"{turn}{at}", tokens)
                await one.closed(*(f"{turn}{at}" for at in range(len(prompts))))
                assert [one.answer(f"{turn}{at}") for at in range(len(prompts))] == expected
            assert one.ledger("cold5") == Ledger(computed=130)
            assert one.ledger("warm5") == Ledger(computed=2, local=128)
            assert one.ledger("warm2") == Ledger(computed=16), "the last prompt token is always computed"

    asyncio.run(scenario())


def test_the_second_turn_finds_prompt_and_answer() -> None:
    first = prompt(30)

    async def scenario() -> None:
        async with bench() as one:
            one.ask("one", first, max_tokens=20)
            await one.closed("one")
            history = np.concatenate([first, np.array(one.answer("one"), np.int32)])
            one.ask("two", np.concatenate([history, prompt(9, seed=9)]))
            await one.closed("two")
            # 50 tokens of history, of which the last has no KV: 49 rounded down to blocks.
            assert one.ledger("two") == Ledger(computed=59 - 48, local=48)

    asyncio.run(scenario())


def test_kv_in_lower_tiers_is_brought_up_and_accounted_for(tmp_path: Path) -> None:
    tokens, expected = prompt(100), alone(prompt(100))

    async def scenario() -> None:
        async with bench(blocks=10, host_blocks=2, disk=DiskTier(tmp_path, 10)) as one:
            one.ask("cold", tokens)
            await one.closed("cold")
            assert one.pool.swap_out(2) == 2
            assert one.pool.swap_out(2) == 2
            one.ask("warm", tokens)
            await one.closed("warm")
            assert one.ledger("warm") == Ledger(computed=4, local=32, host=32, disk=32)
            one.ask("hot", tokens)
            await one.closed("hot")
            assert one.ledger("hot") == Ledger(computed=4, local=96)
            answers = [one.answer(name) for name in ("cold", "warm", "hot")]
            assert answers == [expected] * 3

    asyncio.run(scenario())


def damage_third_of_ten(path: Path) -> None:
    """Flip a bit in the middle of the third block of a disk tier of ten."""
    (file,) = path.glob("*.kv")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 10 * 5 // 2] ^= 1
    file.write_bytes(raw)


def test_a_block_damaged_on_disk_is_computed_again(tmp_path: Path) -> None:
    tokens, expected = prompt(100), alone(prompt(100))

    async def scenario() -> None:
        async with bench(blocks=7, disk=DiskTier(tmp_path, 10)) as one:
            one.ask("cold", tokens)
            await one.closed("cold")
            one.pool.persist()
            damage_third_of_ten(tmp_path)
            one.ask("warm", tokens)
            await one.closed("warm")
            assert one.ledger("warm") == Ledger(computed=68, disk=32)
            assert one.answer("warm") == expected
            assert one.pool.stats().corrupt_blocks == 1

    asyncio.run(scenario())


def incoming(one: Bench, tokens: Tokens) -> None:
    """A peer has reserved room for the KV of ``tokens`` and is copying it."""
    blocks = len(tokens) // 16
    one.pool.begin_incoming("t", InstanceId("decode-0"), SPACE, tokens[: blocks * 16], blocks, 30.0)


def test_kv_on_its_way_here_is_waited_for() -> None:
    tokens = prompt(100)

    async def scenario() -> None:
        async with bench() as one:
            incoming(one, tokens)
            one.ask("r", tokens, 2)
            one.ask("other", prompt(20, seed=5), 2)
            await one.closed("other")
            assert one.chunks("r") == [], "it waits, others overtake"
            one.pool.complete_incoming("t", Origin.BACKFLOW)
            await one.closed("r")
            assert one.ledger("r") == Ledger(computed=4, backflow=96)

    asyncio.run(scenario())


def test_kv_that_does_not_come_is_computed() -> None:
    tokens = prompt(100)

    async def scenario() -> None:
        async with bench() as one:
            incoming(one, tokens)
            one.ask("r", tokens, 2)
            await one.closed("r")
            assert one.ledger("r") == Ledger(computed=100)
            one.pool.abort_incoming("t", AbortCause.SENDER_LOST, "it died")

    asyncio.run(scenario())


class CrowdedPool(MemPool):
    """Once armed, nothing comes up from below, and somebody else takes all blocks at the same moment."""

    armed = False
    taken: Addresses | None = None

    def swap_in(self, addrs: Addresses) -> Addresses:
        if not self.armed:
            return super().swap_in(addrs)
        self.armed = False
        self.taken = self.alloc_mem(self.stats().free)
        return super().swap_in(addrs[:0])


def test_admission_that_fails_half_way_keeps_nothing_and_is_tried_again() -> None:
    tokens = prompt(40)

    async def scenario() -> None:
        async with bench(blocks=16, pool_type=CrowdedPool) as one:
            pool = one.pool
            assert isinstance(pool, CrowdedPool)
            one.ask("first", tokens, 2)
            await one.closed("first")
            pool.armed = True
            one.ask("again", tokens, 2)
            while pool.taken is None:
                await asyncio.sleep(0)
            pool.check([pool.taken])
            pool.free_mem(pool.taken)
            await one.closed("again")
            assert one.answer("again") == one.answer("first")

    asyncio.run(scenario())


def test_no_phase_without_caching_reuses() -> None:
    async def scenario() -> None:
        async with bench(phases="pd-basic") as one:
            for name in ("a", "b"):
                one.ask(name, prompt(50))
                await one.closed(name)
            assert one.ledger("b") == Ledger(computed=50)
            assert one.pool.stats().historical == 0

    asyncio.run(scenario())


def test_a_pool_too_small_for_all_preempts_and_still_answers() -> None:
    prompts = [prompt(30, seed=at) for at in range(6)]
    expected = [alone(tokens, 60) for tokens in prompts]

    async def scenario() -> None:
        # 6 sequences end at 90 tokens = 6 blocks each; the pool has 10.
        async with bench(blocks=10) as one:
            for at, tokens in enumerate(prompts):
                one.ask(f"r{at}", tokens, 60)
            await one.closed(*(f"r{at}" for at in range(6)))
            assert [one.answer(f"r{at}") for at in range(6)] == expected
            for at in range(6):
                assert [chunk.offset for chunk in one.chunks(f"r{at}")] == list(range(60))
                assert one.ledger(f"r{at}").prompt == 30

    asyncio.run(scenario())


def test_stop_tokens_length_and_context_end_a_request() -> None:
    tokens = prompt(20)
    answer = alone(tokens)

    async def scenario() -> None:
        async with bench() as one:
            one.ask("stop", tokens, stop_token_ids=(answer[3],))
            one.ask("length", tokens, max_tokens=2)
            one.ask("context", prompt(CONTEXT - 2), max_tokens=50)
            await one.closed("stop", "length", "context")
            assert one.finish("stop") is FinishReason.STOP
            assert one.answer("stop") == answer[: answer.index(answer[3]) + 1]
            assert one.finish("length") is FinishReason.LENGTH
            assert len(one.answer("context")) == 2
            assert one.finish("context") is FinishReason.LENGTH

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "says"),
    [
        (prompt(0), 1, "the prompt has 0 tokens"),
        (prompt(CONTEXT), 1, f"1 to {CONTEXT - 1} are possible"),
        (np.array([1, 256], np.int32), 1, "within 0..255"),
        (np.array([-1], np.int32), 1, "within 0..255"),
        (prompt(5), 0, "max_tokens must be at least 1"),
        (prompt(100), 100, "13 KV blocks and the pool has 8"),
    ],
)
def test_bad_requests_are_refused_and_cost_nothing(tokens: Tokens, max_tokens: int, says: str) -> None:
    async def scenario() -> None:
        async with bench(blocks=8) as one:
            one.ask("bad", tokens, max_tokens)
            assert one.error("bad").kind == "InvalidRequest"
            assert says in one.error("bad").message
            one.ask("good", prompt(5), 2)
            await one.closed("good")
            assert len(one.answer("good")) == 2

    asyncio.run(scenario())


def test_cancel_frees_at_every_moment() -> None:
    async def scenario() -> None:
        async with bench(max_running=1) as one:
            one.ask("running", prompt(20), 200)
            one.ask("waiting", prompt(20, seed=1), 200)
            await one.until(lambda: len(one.chunks("running")) > 2)
            one.engine.cancel(RequestId("waiting"), FinishReason.CANCELLED)
            one.engine.cancel(RequestId("running"), FinishReason.CANCELLED)
            one.engine.cancel(RequestId("not yet here"), FinishReason.CANCELLED)
            await one.closed("running", "waiting")
            assert one.chunks("waiting") == []
            assert one.finish("running") is None
            one.ask("not yet here", prompt(20), 200)
            one.ask("next", prompt(20), 3)
            await one.closed("next")
            assert one.chunks("not yet here") == []
            assert one.pool.stats().active == 0

    asyncio.run(scenario())


def test_a_stop_from_outside_reports_the_end_and_keeps_the_kv() -> None:
    async def scenario() -> None:
        async with bench() as one:
            one.ask("stopped", prompt(40), 200)
            await one.until(lambda: len(one.chunks("stopped")) > 2)
            one.engine.cancel(RequestId("stopped"), FinishReason.STOP)
            await one.closed("stopped")
            assert one.finish("stopped") is FinishReason.STOP
            assert one.pool.stats().historical >= 2

    asyncio.run(scenario())


class BrokenRunner(ReferenceRunner):
    """Fails, or yields what is no number, on request."""

    def __init__(self) -> None:
        super().__init__(WEIGHTS)
        self.raises = False
        self.poison = False

    def forward(self, batch: ForwardBatch, signal: LayerSignal | None = None) -> NDArray[np.float32]:
        if self.raises:
            raise MemoryError("no memory for activations")
        logits = super().forward(batch, signal)
        return np.full_like(logits, np.nan) if self.poison else logits


def test_a_failing_step_fails_its_requests_only() -> None:
    runner = BrokenRunner()

    async def scenario() -> None:
        async with bench(runner=runner) as one:
            runner.raises = True
            one.ask("unlucky", prompt(20))
            await one.closed("unlucky")
            assert "no memory for activations" in one.error("unlucky").message
            runner.raises, runner.poison = False, True
            one.ask("poisoned", prompt(20))
            await one.closed("poisoned")
            assert "not numbers" in one.error("poisoned").message
            runner.poison = False
            one.ask("lucky", prompt(20))
            await one.closed("lucky")
            assert len(one.answer("lucky")) == 8

    asyncio.run(scenario())


def test_a_request_that_should_be_handed_over_without_peers_fails_cleanly() -> None:
    async def scenario() -> None:
        async with bench(phases="pd-caching-3") as one:
            sampling = SamplingParams(max_tokens=5, temperature=0.0)
            one.engine.submit(
                Submit(RequestId("r"), SPACE, pack_tokens(prompt(20)), sampling, InstanceId("decode-0"))
            )
            await one.closed("r")
            assert one.error("r").kind == "PeerLost"
            assert len(one.answer("r")) == 1
            assert one.pool.stats().historical == 1

    asyncio.run(scenario())


def test_rooms_are_traced_in_order() -> None:
    async def scenario() -> None:
        async with bench() as one:
            one.ask("r", prompt(20), 2)
            await one.closed("r")
            rooms = [m.room for m in one.said if isinstance(m, Trace)]
            assert rooms == ["mempool.match", "engine.prefill", "mempool.insert"]

    asyncio.run(scenario())


def test_a_sequence_that_outgrows_a_shrunk_pool_fails_and_the_others_go_on() -> None:
    async def scenario() -> None:
        async with bench(blocks=16) as at:
            at.ask("long", prompt(100, 1), max_tokens=100)
            await at.until(lambda: len(at.chunks("long")) > 2)
            at.pool.resize(Tier.DEVICE, 4)
            at.engine.capacity_changed()
            await at.closed("long")
            assert "shrunk" in at.error("long").message
            at.ask("short", prompt(20, 2), max_tokens=8)
            await at.closed("short")
            assert at.finish("short") is FinishReason.LENGTH
            assert (at.pool.blocks, at.pool.stats().draining) == (4, 0)

    asyncio.run(scenario())


def both(shared: int, own: int, seed: int) -> Tokens:
    """A prompt that begins like :func:`prompt` for ``shared`` tokens and goes on for ``own`` others."""
    return np.concatenate([prompt(200)[:shared], prompt(own, seed=seed)])


class CountingRunner(BrokenRunner):
    """Counts the rows it computes; ``fails`` passes to come fail."""

    rows = 0
    fails = 0

    def forward(self, batch: ForwardBatch, signal: LayerSignal | None = None) -> NDArray[np.float32]:
        if self.fails:
            self.fails -= 1
            raise MemoryError("no memory for activations")
        self.rows += len(batch.tokens)
        return super().forward(batch, signal)


def test_completions_of_one_prompt_prefill_once() -> None:
    runner, tokens = CountingRunner(), prompt(130)
    expected = alone(tokens, 4)

    async def scenario() -> None:
        async with bench(runner=runner, step_tokens=32) as one:
            for at in range(4):
                one.ask(f"r{at}", tokens, 4)
            await one.closed(*(f"r{at}" for at in range(4)))
            assert [one.answer(f"r{at}") for at in range(4)] == [expected] * 4
            assert one.ledger("r0") == Ledger(computed=130)
            assert [one.ledger(f"r{at}") for at in (1, 2, 3)] == [Ledger(computed=2, local=128)] * 3
            assert runner.rows == 130 + 3 * 2 + 4 * 3
            assert one.engine.counters()["shared_prefills"] == 3

    asyncio.run(scenario())


def test_a_prefix_that_another_is_computing_is_used_as_soon_as_it_is_there() -> None:
    long, short = both(200, 50, 1), both(96, 20, 2)
    expected = alone(long, 4), alone(short, 4)

    async def scenario() -> None:
        async with bench(step_tokens=16) as one:
            one.ask("long", long, 4)
            one.ask("short", short, 4)
            await one.closed("long", "short")
            assert (one.answer("long"), one.answer("short")) == expected
            assert one.ledger("short") == Ledger(computed=20, local=96)
            firsts = [m.request for m in one.said if isinstance(m, TokenChunk) and m.offset == 0]
            assert firsts == ["short", "long"], "it does not wait for all of the other prompt"

    asyncio.run(scenario())


def test_no_sharing_without_reuse() -> None:
    async def scenario() -> None:
        async with bench(phases="pd-basic", step_tokens=32) as one:
            one.ask("a", prompt(100), 2)
            one.ask("b", prompt(100), 2)
            await one.closed("a", "b")
            assert one.ledger("b") == Ledger(computed=100)

    asyncio.run(scenario())


async def computed(one: Bench, name: str, tokens: int) -> None:
    """Wait until so much of a prompt is computed."""
    async with asyncio.timeout(60):
        while (sequence := one.engine.batcher.find(RequestId(name))) and sequence.computed < tokens:
            await asyncio.sleep(0)


def test_when_the_one_that_others_wait_for_is_cancelled_they_go_on_from_there() -> None:
    tokens = prompt(200)
    expected = alone(tokens, 4)

    async def scenario() -> None:
        async with bench(step_tokens=16) as one:
            one.ask("first", tokens, 4)
            one.ask("second", tokens, 4)
            await computed(one, "first", 32)
            one.engine.cancel(RequestId("first"), FinishReason.CANCELLED)
            await one.closed("first", "second")
            assert one.chunks("first") == []
            assert one.answer("second") == expected
            ledger = one.ledger("second")
            assert 32 <= ledger.local < 192
            assert ledger.prompt == 200

    asyncio.run(scenario())


def test_when_the_step_of_the_one_that_others_wait_for_fails_they_compute_it() -> None:
    runner, tokens = CountingRunner(), prompt(200)
    expected = alone(tokens, 4)

    async def scenario() -> None:
        async with bench(runner=runner, step_tokens=16) as one:
            one.ask("first", tokens, 4)
            one.ask("second", tokens, 4)
            one.ask("third", tokens, 4)
            await computed(one, "first", 32)
            runner.fails = 1
            await one.closed("first", "second", "third")
            assert "no memory for activations" in one.error("first").message
            assert one.answer("second") == one.answer("third") == expected
            assert one.ledger("second") == Ledger(computed=200)
            assert one.ledger("third") == Ledger(computed=8, local=192)

    asyncio.run(scenario())


def preempting(pool_type: type[MemPool], clock: VirtualClock) -> tuple[dict[str, float], int]:
    """Six sequences in a pool for two, with a host tier. The counters, and blocks that came up from there."""
    prompts = [prompt(30, seed=at) for at in range(6)]
    expected = [alone(tokens, 60) for tokens in prompts]

    async def scenario() -> tuple[dict[str, float], int]:
        async with bench(blocks=10, host_blocks=60, pool_type=pool_type, clock=clock) as one:
            for at, tokens in enumerate(prompts):
                one.ask(f"r{at}", tokens, 60)
            await one.closed(*(f"r{at}" for at in range(6)))
            assert [one.answer(f"r{at}") for at in range(6)] == expected
            return dict(one.engine.counters()), one.pool.stats().swapped_in_blocks

    return asyncio.run(scenario())


def test_a_victims_kv_goes_to_a_lower_tier_and_comes_back() -> None:
    counters, up = preempting(MemPool, VirtualClock())
    assert counters["preempted_swap"] > 0
    assert counters["preempted_recompute"] == 0
    assert up > 0


class SlowPool(MemPool):
    """Bringing blocks up takes so long that computing is quicker."""

    def swap_in(self, addrs: Addresses) -> Addresses:
        if np.any(addrs.tiers != Tier.DEVICE):
            assert isinstance(self._clock, VirtualClock)
            self._clock.advance(1000.0)
        return super().swap_in(addrs)


def test_a_lower_tier_that_proved_slow_is_left_alone() -> None:
    counters, up = preempting(SlowPool, VirtualClock())
    assert counters["preempted_recompute"] > 0
    assert up < preempting(MemPool, VirtualClock())[1]


def test_without_a_lower_tier_victims_recompute() -> None:
    async def scenario() -> None:
        async with bench(blocks=10) as one:
            for at in range(6):
                one.ask(f"r{at}", prompt(30, seed=at), 60)
            await one.closed(*(f"r{at}" for at in range(6)))
            assert one.engine.counters()["preempted_recompute"] > 0
            assert one.engine.counters()["preempted_swap"] == 0

    asyncio.run(scenario())


def test_an_engine_refuses_blocks_in_pieces_and_says_what_to_do() -> None:
    runner = ReferenceRunner(WEIGHTS)
    pieces = replace(runner.layout, arrangement=Arrangement.DISCRETE)
    clock = MonotonicClock()
    pool = MemPool(pieces, 4, instance=HERE, incarnation=1, clock=clock)
    with pytest.raises(ConfigError, match=r"layout.arrangement is discrete.*arrangement aggregated"):
        Engine(
            HERE,
            pool,
            runner,
            Batcher(step_tokens=64, max_running=8),
            PHASES["colocated"],
            NoPeers(),
            context=CONTEXT,
            vocabulary=WEIGHTS.spec.vocabulary,
            clock=clock,
            emit=lambda message: None,
        )
    pool.close()
