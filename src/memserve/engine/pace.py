"""How much prefill a step may hold so that running streams keep their pace. Pure: times are arguments.

Knows what steps have cost so far; which sequences get the tokens is the batcher's business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import msgspec

from memserve.core.types import StepPrices
from memserve.engine.cost import LinearCost

FLOOR_TOKENS = 16
"""Prefill goes on by at least this much per step, however slow the streams are without it."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a step computes.

    ``decode_context`` is the sum of the tokens that decode rows attend to, ``prefill_context`` the same for
    prefill rows and for speculated ones: those share what they read with others of their sequence.
    """

    decode_rows: int = 0
    decode_context: int = 0
    speculated_rows: int = 0
    prefill_tokens: int = 0
    prefill_context: int = 0

    def decode(self, computed: int) -> Work:
        """One row more, for a stream that has ``computed`` tokens behind it."""
        return replace(self, decode_rows=self.decode_rows + 1, decode_context=self.decode_context + computed)

    def speculate(self, computed: int, count: int) -> Work:
        """``count`` proposed tokens more, of a stream that has ``computed`` tokens behind it."""
        return replace(
            self,
            speculated_rows=self.speculated_rows + count,
            prefill_context=self.prefill_context + count * computed + count * count // 2,
        )

    def prefill(self, computed: int, count: int) -> Work:
        """``count`` tokens more, of a prompt that has ``computed`` tokens behind it."""
        return replace(
            self,
            prefill_tokens=self.prefill_tokens + count,
            prefill_context=self.prefill_context + count * computed + count * count // 2,
        )

    @property
    def amounts(self) -> tuple[float, ...]:
        return (
            1,
            self.decode_rows,
            self.decode_context,
            self.speculated_rows,
            self.prefill_tokens,
            self.prefill_context,
        )


@dataclass(frozen=True, slots=True)
class PrefillPrices:
    """What prompt tokens add to a step, in seconds: each ``token``, and ``context`` for each before it."""

    token: float
    context: float

    def seconds_of(self, computed: int, count: int) -> float:
        """For ``count`` more tokens of a prompt with ``computed`` behind them."""
        return self.token * count + self.context * (count * computed + count * count // 2)

    def tokens_within(self, seconds: float, computed: int) -> int:
        """The most tokens that add at most ``seconds``, with ``computed`` behind them: >= 0."""
        linear, seconds = self.token + self.context * computed, max(seconds, 0)
        # Positive root of context/2 n^2 + linear n = seconds, in a form that is exact for context -> 0.
        return int(2 * seconds / (linear + math.sqrt(linear**2 + 2 * self.context * seconds)))


class StepTimes:
    """What a step costs: fixed + decode rows and context + proposed rows + prefill.

    The first step that is measured corrects the scale of the prices assumed before.
    """

    def __init__(self) -> None:
        self._cost = LinearCost(msgspec.structs.astuple(StepPrices()))

    def assume(self, prices: StepPrices) -> None:
        """Go on from what was measured before."""
        self._cost = LinearCost(msgspec.structs.astuple(prices), measured=True)

    @property
    def seen(self) -> int:
        """Steps that were learnt from, more where it began with measured prices."""
        return self._cost.seen

    @property
    def prices(self) -> StepPrices:
        """What it has come to believe."""
        return StepPrices(*self._cost.prices)

    def learn(self, work: Work, seconds: float) -> None:
        """A step of ``work`` has taken ``seconds``."""
        self._cost.learn(work.amounts, seconds)

    def seconds_of(self, work: Work) -> float:
        """How long a step of ``work`` will take."""
        return self._cost.predict(work.amounts)

    @property
    def prefill(self) -> PrefillPrices:
        """What prompt tokens add to a step."""
        *_, token, context = self._cost.prices
        return PrefillPrices(token, context)

    def prefill_seconds(self, computed: int, count: int) -> float:
        """What ``count`` more tokens of a prompt with ``computed`` behind them add to a step."""
        return self.prefill.seconds_of(computed, count)

    def speculation_seconds(self, computed: int) -> float:
        """What a proposed token of a stream with ``computed`` tokens behind it adds to a step."""
        return self.seconds_of(Work().speculate(computed, 1)) - self.seconds_of(Work())


class Pace:
    """``target`` is the time between two tokens of a stream, in seconds; None means: as it comes."""

    def __init__(self, target: float | None = None) -> None:
        assert target is None or target > 0, "a target time must be positive"
        self.target = target
        self.times = StepTimes()

    def seconds_left(self, decoding: Work, computed: int = 0) -> float:
        """What prefill may add to a step that decodes ``decoding``: at least ``FLOOR_TOKENS``' time.

        ``computed`` is what the prompt that gets them has behind it.
        """
        if self.target is None or decoding.decode_rows == 0:
            return math.inf
        return prefill_share(self.times.prefill, self.target, self.times.seconds_of(decoding), computed)


def prefill_share(prices: PrefillPrices, target: float, decoding: float, computed: int) -> float:
    """Seconds for prefill in a step that should take ``target`` and takes ``decoding`` without any.

    At least ``FLOOR_TOKENS``' time, of a prompt with ``computed`` tokens behind it.
    """
    return max(prices.seconds_of(computed, FLOOR_TOKENS), target - decoding)


@dataclass(slots=True)
class Budget:
    """What is left of a step for prefill: ``rows``, and ``seconds`` by ``prices``."""

    prices: PrefillPrices
    rows: int
    seconds: float

    def fit(self, computed: int, wanted: int, share: float = 1.0) -> int:
        """How many of ``wanted`` tokens, with ``computed`` behind them, fit into a ``share`` of the rest."""
        count = min(wanted, int(self.rows * share))
        if math.isinf(self.seconds):
            return count
        return min(count, self.prices.tokens_within(self.seconds * share, computed))

    def spend(self, computed: int, count: int) -> None:
        """Take ``count`` tokens, with ``computed`` behind them, out of the budget."""
        self.rows -= count
        self.seconds -= self.prices.seconds_of(computed, count)
