"""Whatever is guessed, right or wrong, answers are those of plain decoding, and no block is lost or wrong.

A batcher that guesses as hypothesis says takes the place of lookup; the rest is the engine, on the reference
runner and on the native one with KV in bf16 and int8.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memserve.core.clock import MonotonicClock
from memserve.core.messages import Message, RequestClosed, Submit, TokenChunk
from memserve.core.types import (
    FinishReason,
    InstanceId,
    Namespace,
    RequestId,
    SamplingParams,
    TokenLogprob,
    Tokens,
    pack_tokens,
)
from memserve.engine.batcher import Batcher, Chunk
from memserve.engine.carrier import NoPeers
from memserve.engine.engine import Engine
from memserve.engine.models.tiny import tiny_weights
from memserve.engine.phases import PHASES
from memserve.engine.runners.base import Runner
from memserve.engine.runners.native import NativeRunner
from memserve.engine.runners.reference import ReferenceRunner
from memserve.engine.speculation import Lookup
from memserve.mempool.pool import MemPool

HERE, SPACE = InstanceId("colocated-0"), Namespace("tiny")
CONTEXT = 96
WEIGHTS = tiny_weights(5, layers=1, context=CONTEXT, vocabulary=64)
ANSWER = 40


@dataclass(frozen=True)
class Asked:
    """A request, and when to cancel it: after so many tokens, if at all."""

    prompt: Tokens
    sampling: SamplingParams
    cancel_after: int | None = None


@dataclass
class Said:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    chunks: int = 0


class GuessingBatcher(Batcher):
    """Proposes, per step, so many right tokens of the known answers and then so many others."""

    def __init__(self, answers: dict[str, list[int]], guesses: Iterator[tuple[int, int]]) -> None:
        super().__init__(step_tokens=32, max_running=4)
        self._answers = answers
        self._guesses = guesses

    def plan(self) -> tuple[Chunk, ...]:
        return tuple(map(self._guess, super().plan()))

    def _guess(self, chunk: Chunk) -> Chunk:
        sequence = chunk.sequence
        if not chunk.last:
            return chunk
        right, wrong = next(self._guesses)
        guesses = self._answers[sequence.request][sequence.sampled :][:right]
        guesses += [(token + 1) % 64 for token in self._answers[sequence.request][:wrong]]
        return replace(chunk, proposed=tuple(guesses[: max(0, sequence.wanted - 1)]))


def answer(
    runner: Runner, asked: Sequence[Asked], batcher: Batcher, blocks: int
) -> tuple[list[Said], dict[str, float]]:
    """What an engine says to all requests at once, and its counters."""
    pool = MemPool(runner.layout, blocks, instance=HERE, incarnation=1, clock=MonotonicClock())
    said, closed, done = [Said() for _ in asked], set[str](), asyncio.Event()
    made: list[Engine] = []

    def hear(message: Message) -> None:
        if isinstance(message, TokenChunk):
            at = int(message.request)
            one = said[at]
            assert message.offset == len(one.tokens), "chunks are in order and without gaps"
            one.tokens += message.tokens
            one.logprobs += message.logprobs
            one.finish = message.finish
            one.chunks += 1
            limit = asked[at].cancel_after
            if limit is not None and len(one.tokens) >= limit and message.finish is None:
                made[0].cancel(message.request, FinishReason.CANCELLED)
        elif isinstance(message, RequestClosed):
            closed.add(message.request)
            if len(closed) == len(asked):
                done.set()

    async def play() -> dict[str, float]:
        engine = Engine(
            HERE,
            pool,
            runner,
            batcher,
            PHASES["colocated"],
            NoPeers(),
            context=CONTEXT,
            vocabulary=WEIGHTS.spec.vocabulary,
            clock=MonotonicClock(),
            emit=hear,
        )
        made.append(engine)
        running = asyncio.create_task(engine.run())
        for at, one in enumerate(asked):
            engine.submit(Submit(RequestId(str(at)), SPACE, pack_tokens(one.prompt), one.sampling))
        async with asyncio.timeout(60):
            await done.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await engine.close()
        return dict(engine.counters())

    counters = asyncio.run(play())
    pool.check(())
    pool.close()
    return said, counters


@contextmanager
def runner_of(kind: str) -> Iterator[Runner]:
    runner: Runner
    if kind == "reference":
        runner = ReferenceRunner(WEIGHTS)
    else:
        runner = NativeRunner(WEIGHTS, threads=1, context=CONTEXT, kv_dtype=kind)
    yield runner
    runner.close()


@pytest.fixture(scope="module", params=["reference", "bf16", "int8"])
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    with runner_of(request.param) as made:
        yield made


def requests() -> st.SearchStrategy[list[Asked]]:
    sampling = st.builds(
        SamplingParams,
        max_tokens=st.integers(1, ANSWER),
        temperature=st.sampled_from([0.0, 0.0, 0.8, 2.0]),
        top_p=st.sampled_from([1.0, 0.7]),
        top_k=st.sampled_from([0, 5]),
        seed=st.integers(0, 99),
        stop_token_ids=st.lists(st.integers(0, 63), max_size=4).map(tuple),
        logprobs=st.sampled_from([None, 0, 3]),
    )
    prompts = st.lists(st.integers(0, 63), min_size=1, max_size=CONTEXT - 10).map(
        lambda tokens: np.array(tokens, np.int32)
    )
    one = st.builds(Asked, prompts, sampling, st.none() | st.integers(1, ANSWER))
    return st.lists(one, min_size=1, max_size=4)


guesses = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4)), min_size=1, max_size=40)


@given(asked=requests(), guesses=guesses, blocks=st.sampled_from([6, 8, 40]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_answers_are_those_of_plain_decoding(
    runner: Runner, asked: list[Asked], guesses: list[tuple[int, int]], blocks: int
) -> None:
    whole = [replace(one, cancel_after=None) for one in asked]
    plain, _ = answer(runner, whole, Batcher(step_tokens=32, max_running=4), 40)
    known = {str(at): one.tokens for at, one in enumerate(plain)}
    turns = (guesses[at % len(guesses)] for at in iter(int, 1) for at in range(len(guesses)))
    guessed, counters = answer(runner, asked, GuessingBatcher(known, turns), blocks)
    for one, expected, request in zip(guessed, plain, asked, strict=True):
        if request.cancel_after is None or one.finish is not None:
            assert (one.tokens, one.logprobs, one.finish) == (
                expected.tokens,
                expected.logprobs,
                expected.finish,
            )
        else:
            assert len(one.tokens) >= request.cancel_after
            assert one.tokens == expected.tokens[: len(one.tokens)]
    assert counters["spec_decode_num_accepted_tokens"] <= counters["spec_decode_num_draft_tokens"]


def test_what_follows_in_the_cache_is_right_after_wrong_guesses(runner: Runner) -> None:
    """Rejected rows have left their KV in the blocks; none of it may be found by the next turn."""
    rng = np.random.default_rng(4)
    first = rng.integers(0, 64, 20).astype(np.int32)
    sampling = SamplingParams(max_tokens=30, temperature=0.0)
    [said], _ = answer(runner, [Asked(first, sampling)], Batcher(step_tokens=32, max_running=4), 40)
    second = np.concatenate([first, np.array(said.tokens, np.int32), first[:5]])
    both = [Asked(first, sampling), Asked(second, sampling)]
    plain, _ = answer(runner, both, Batcher(step_tokens=32, max_running=1), 40)
    known = {str(at): one.tokens for at, one in enumerate(plain)}
    turns = ((right, 4) for right in iter(lambda: int(rng.integers(0, 3)), -1))
    batcher = GuessingBatcher(known, turns)
    guessed, counters = answer(runner, both, batcher, 40)
    assert [one.tokens for one in guessed] == [one.tokens for one in plain]
    assert counters["spec_decode_num_accepted_tokens"] > 10


def test_lookup_answers_faster_and_alike(runner: Runner) -> None:
    """A text that goes round in circles, as this model's answers do sooner or later."""
    prompt = np.tile(np.arange(8, dtype=np.int32), 4)
    asked = [Asked(prompt, SamplingParams(max_tokens=60, temperature=0.0, logprobs=1))]
    plain, _ = answer(runner, asked, Batcher(step_tokens=32, max_running=4), 40)
    lookup = Lookup(4, longest=3, shortest=1)
    looked, counters = answer(runner, asked, Batcher(step_tokens=64, max_running=4, lookup=lookup), 40)
    assert [one.tokens for one in looked] == [one.tokens for one in plain]
    assert [one.logprobs for one in looked] == [one.logprobs for one in plain]
    assert counters["spec_decode_num_accepted_tokens"] == 60 - looked[0].chunks
