"""The measurements, equal for all engines: what is timed, from when to when. Standard library only.

An engine is asked for no more than to take prompts, to step, and to say who got a token.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Protocol

from peers.protocol import Decode, Mixed, MixedTimed, Prefill, Timed

SETTLE_TOKENS = 2  # tokens that each stream has had before timing begins
SPARE_TOKENS = 512  # that a stream may get while others are still prefilled
MIXED_TOKENS = 1000  # of a stream in the mixed load; it is cancelled long before
FIRST_TOKEN, LAST_TOKEN = 1000, 40_000  # plain words in every vocabulary used here
PATIENCE_STEPS = 100_000

Clock = Callable[[], float]


class EngineError(Exception):
    """The engine did not do what a measurement needs."""


class StepEngine(Protocol):
    """A continuous-batching engine that does nothing between two calls."""

    def prepare(self, streams: int, longest: int) -> None:
        """Get ready for at most ``streams`` sequences of at most ``longest`` tokens; never timed."""
        ...

    def add(self, prompt: Sequence[int], max_tokens: int) -> int:
        """Queue a prompt, greedy, end-of-turn tokens ignored; returns the request's number."""
        ...

    def step(self) -> Iterable[int]:
        """Run until something is done; the requests that got a token, once per token."""
        ...

    def cancel(self, requests: Sequence[int]) -> None:
        """End requests, and return when nothing of them is under way any more."""
        ...


class Bench:
    """Runs measurements on one engine. Prompts are random and never the same twice, so no cache helps."""

    def __init__(self, engine: StepEngine, vocabulary: int, clock: Clock = time.perf_counter) -> None:
        self._engine = engine
        self._last = min(vocabulary - 1, LAST_TOKEN)
        self._first = min(FIRST_TOKEN, self._last)
        self._random = random.Random()
        self._clock = clock

    def prefill(self, asked: Prefill) -> Timed:
        self._engine.prepare(1, asked.tokens + 1)
        return Timed(asked.tokens, [self._time_prompts(1, asked.tokens) for _ in range(asked.repeats)])

    def decode(self, asked: Decode) -> Timed:
        most = asked.steps + SPARE_TOKENS
        self._engine.prepare(asked.streams, asked.context + most)
        streams = self._start_streams(asked.streams, asked.context, most)
        counts = dict.fromkeys(streams, 0)
        started = self._clock()
        self._step_until(counts, asked.steps)
        seconds = self._clock() - started
        self._engine.cancel(streams)
        return Timed(sum(counts.values()), [seconds])

    def mixed(self, asked: Mixed) -> MixedTimed:
        most = max(asked.stream_prompt + MIXED_TOKENS, asked.prompt_tokens + 1)
        self._engine.prepare(asked.streams + asked.prompts, most)
        alone = self._time_prompts(asked.prompts, asked.prompt_tokens)
        streams = self._start_streams(asked.streams, asked.stream_prompt, MIXED_TOKENS)
        idle = self._record(streams, lambda times: _least(times) > asked.idle_tokens)
        started = self._clock()
        prompts = [self._engine.add(self._prompt(asked.prompt_tokens), 1) for _ in range(asked.prompts)]
        both = self._record([*streams, *prompts], lambda times: all(times[prompt] for prompt in prompts))
        finished = max(both[prompt][0] for prompt in prompts)
        self._engine.cancel(streams)
        begun = {stream: [idle[stream][-1], *both[stream]] for stream in streams}
        gaps, busy = _gaps(idle.values()), _gaps(begun.values())
        return MixedTimed(
            idle_p50=quantile(gaps, 0.5),
            idle_p99=quantile(gaps, 0.99),
            mixed_p50=quantile(busy, 0.5),
            mixed_p99=quantile(busy, 0.99),
            alone_seconds=alone,
            mixed_seconds=finished - started,
        )

    def _prompt(self, tokens: int) -> list[int]:
        return self._random.choices(range(self._first, self._last + 1), k=tokens)

    def _time_prompts(self, prompts: int, tokens: int) -> float:
        """Seconds from the first prompt's arrival to the last one's first token."""
        texts = [self._prompt(tokens) for _ in range(prompts)]
        started = self._clock()
        counts = dict.fromkeys((self._engine.add(text, 1) for text in texts), 0)
        self._step_until(counts, 1)
        return self._clock() - started

    def _start_streams(self, streams: int, context: int, max_tokens: int) -> list[int]:
        counts = {self._engine.add(self._prompt(context), max_tokens): 0 for _ in range(streams)}
        self._step_until(counts, SETTLE_TOKENS)
        if max(counts.values()) > SPARE_TOKENS:
            raise EngineError("the first streams ran so far ahead of the last that they may end too early")
        return list(counts)

    def _step_until(self, counts: dict[int, int], least: int) -> None:
        """Step and count tokens until each request of ``counts`` has got ``least``."""
        for _ in range(PATIENCE_STEPS):
            if min(counts.values()) >= least:
                return
            for request in self._engine.step():
                if request in counts:
                    counts[request] += 1
        raise EngineError(f"{PATIENCE_STEPS} steps did not bring {least} tokens to each of {len(counts)}")

    def _record(
        self, requests: Sequence[int], done: Callable[[dict[int, list[float]]], bool]
    ) -> dict[int, list[float]]:
        """When each request got its tokens, until ``done``."""
        times: dict[int, list[float]] = {request: [] for request in requests}
        for _ in range(PATIENCE_STEPS):
            if done(times):
                return times
            got = list(self._engine.step())
            now = self._clock()
            for request in got:
                if request in times:
                    times[request].append(now)
        raise EngineError(f"{PATIENCE_STEPS} steps were not enough")


def quantile(values: Sequence[float], fraction: float) -> float:
    """The value that ``fraction`` of all do not exceed, interpolated."""
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _least(times: dict[int, list[float]]) -> int:
    return min(len(each) for each in times.values())


def _gaps(streams: Iterable[Sequence[float]]) -> list[float]:
    return [late - early for times in streams for early, late in pairwise(times)]
