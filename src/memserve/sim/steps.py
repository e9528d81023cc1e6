"""The steps that a simulated engine will run if nobody comes, as its batcher would plan them. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memserve.core.types import StepPrices
from memserve.engine.pace import Budget, PrefillPrices, prefill_share
from memserve.engine.share_out import fit_alone, share_out

_AHEAD = 6
"""Steps with prompts that are planned at a time; whoever comes has the plan made anew."""
_DONE = 1e-9
"""Seconds that count as nothing: times are sums."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What an instance can do: its steps' prices, the most rows in one, the pace of its streams (0: none)."""

    prices: StepPrices
    step_tokens: int = 512
    target_tpot: float = 0.0


@dataclass(slots=True)
class Span:
    """``count`` steps of ``seconds`` each from ``start`` on, of which ``done`` are over.

    ``chunks``: which prompt (its number) gets how many tokens; then it is one step.
    """

    start: float
    seconds: float
    count: int
    chunks: tuple[tuple[int, int], ...] = ()
    done: int = 0

    @property
    def end(self) -> float:
        return self.start + self.seconds * self.count

    def finish(self, now: float) -> int:
        """How many more steps are over by ``now``, counted once."""
        over = self.count
        if now < self.end - _DONE:
            over = int((now - self.start + _DONE) / self.seconds)
        fresh, self.done = over - self.done, over
        return fresh

    def cut(self, now: float) -> None:
        """Let it end with the step that runs at ``now``; it has at least one."""
        self.count = min(self.count, max(math.ceil((now - self.start - _DONE) / self.seconds), 1))


@dataclass(slots=True, eq=False)
class _Planned:
    """A prompt as it will be after the steps planned so far."""

    number: int
    computed: int
    pending: int


def plan_steps(
    speed: Speed, prompts: Sequence[tuple[int, int]], streams: int, context: float, lasting: int, now: float
) -> Iterator[Span]:
    """Spans until a prompt is prefilled or ``lasting`` steps are over, from ``now`` on.

    ``prompts``: computed and pending tokens of each, in order of arrival. ``context``: tokens that
    ``streams`` attend to.
    """
    prices = speed.prices
    decoding = prices.step + prices.row * streams + prices.row_context * context
    if not prompts:
        if lasting > 0:
            yield Span(now, decoding, lasting)
        return
    costs = PrefillPrices(prices.token, prices.token_context)
    rows = max(speed.step_tokens - streams, 1)
    if len(prompts) == 1:
        # Most steps are like this: the general way would make lists of one.
        computed, pending = prompts[0]
        for _ in range(min(lasting, _AHEAD)):
            budget = Budget(costs, rows, _seconds_left(speed, costs, streams, decoding, computed))
            count = fit_alone(computed, pending, budget)
            seconds = decoding + costs.seconds_of(computed, count)
            yield Span(now, seconds, 1, ((0, count),))
            computed, pending, now = computed + count, pending - count, now + seconds
            if not pending:
                break
        return
    planned = [_Planned(number, *prompt) for number, prompt in enumerate(prompts)]
    for _ in range(min(lasting, _AHEAD)):
        budget = Budget(costs, rows, _seconds_left(speed, costs, streams, decoding, planned[0].computed))
        seconds, chunks = decoding, []
        for one, count in share_out(planned, budget):
            seconds += costs.seconds_of(one.computed, count)
            one.computed += count
            one.pending -= count
            chunks.append((one.number, count))
        yield Span(now, seconds, 1, tuple(chunks))
        now += seconds
        if any(one.pending == 0 for one in planned):
            return


def _seconds_left(speed: Speed, costs: PrefillPrices, streams: int, decoding: float, computed: int) -> float:
    if speed.target_tpot <= 0 or not streams:
        return math.inf
    return prefill_share(costs, speed.target_tpot, decoding, computed)
