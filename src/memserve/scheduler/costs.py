"""What a request would cost at each place, in seconds. Pure arithmetic on the fleet's columns.

Source: the paper, section 5.3 (cost model and the condition for moving KV), extended by what the request
does to others: those who wait behind it and the streams beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from memserve.core.types import StepPrices
from memserve.scheduler.fleet import Flags, Fleet, Floats, Slots
from memserve.scheduler.holdings import Holdings


@dataclass(frozen=True, slots=True)
class Wire:
    """How KV travels between instances: bytes of KV per token, ``bandwidth`` in bytes/s, ``latency`` in s."""

    bytes_per_token: float = 0.0
    bandwidth: float = 2e9
    latency: float = 2e-3

    @property
    def token(self) -> float:
        """Seconds per token of KV."""
        return self.bytes_per_token / self.bandwidth

    def learn(self, moved: int, seconds: float) -> Wire:
        """What is believed after ``moved`` bytes took ``seconds``.

        Latency and bandwidth answer for their parts of the error; one transfer moves neither by more than an
        eighth.
        """
        if moved <= 0 or seconds <= 0:
            return self
        flight = moved / self.bandwidth
        predicted = self.latency + flight
        error = min(max(seconds / predicted - 1, -0.5), 0.5) / 4
        latency = self.latency * (1 + error * self.latency / predicted)
        return replace(self, latency=latency, bandwidth=self.bandwidth / (1 + error * flight / predicted))

    def seconds(self, tokens: int) -> float:
        """To move the KV of ``tokens`` tokens; none for none."""
        return self.latency + self.token * tokens if tokens > 0 else 0.0


class PrefillCosts(NamedTuple):
    """One entry per place, in seconds, float64[n].

    wait : until the prompt's turn comes, or until fetched KV is there, whichever is later.
    fetch : to bring KV from a peer; 0 where nothing is fetched. Part of ``wait``.
    work : to compute what is missing then, if nothing else ran.
    prefill : the same beside the streams that are decoded there.
    """

    wait: Floats
    fetch: Floats
    work: Floats
    prefill: Floats

    @property
    def ttft(self) -> Floats:
        """Until the first token."""
        return self.wait + self.prefill

    def where(self, better: Flags, other: PrefillCosts) -> PrefillCosts:
        """``other`` where ``better``, else this."""
        return PrefillCosts(*(np.where(better, b, a) for a, b in zip(self, other, strict=True)))


def prefill_costs(
    fleet: Fleet, slots: Slots, prompt: int, computed: Floats, fetch: Floats | float, now: float
) -> PrefillCosts:
    """Prefill of ``prompt`` tokens of which the first ``computed`` are there, ``fetch`` seconds from now."""
    work = fleet.token[slots] * (prompt - computed) + fleet.token_context[slots] * (
        0.5 * (prompt * prompt - computed * computed)
    )
    line = np.maximum(fleet.free_at[slots] - now, 0.0)
    fetching = fetch if isinstance(fetch, np.ndarray) else np.full(len(slots), fetch)
    return PrefillCosts(np.maximum(line, fetching), fetching, work, work * fleet.stretch[slots])


def prefill_work(prices: StepPrices, step_tokens: int, prompt: int, computed: float) -> float:
    """The ``work`` of :func:`prefill_costs` at one place, to the last bit."""
    token = prices.token + prices.step / step_tokens
    return token * (prompt - computed) + prices.token_context * (
        0.5 * (prompt * prompt - computed * computed)
    )


def decode_costs(fleet: Fleet, slots: Slots, prompt: int, answer: float) -> tuple[Floats, Floats]:
    """Seconds that the answer takes beside what is decoded there, and what it costs the other streams."""
    alone = fleet.row[slots] + fleet.row_context[slots] * (prompt + answer / 2)
    streams = fleet.streams[slots]
    before = fleet.step[slots] + fleet.row[slots] * streams + fleet.row_context[slots] * fleet.context[slots]
    return answer * (before + alone), answer * streams * alone


def tokens_by_slot(held: Holdings, rows: int, most: int) -> Floats:
    """What each row's instance holds of the prompt, at most ``most`` tokens: float64[rows]."""
    tokens = np.zeros(rows)
    for tier in reversed(held.tiers):
        mask = np.frombuffer(tier.mask.to_bytes(-(-rows // 8), "little"), np.uint8)
        tokens[np.unpackbits(mask, count=rows, bitorder="little").view(bool)] = min(tier.tokens, most)
    return tokens
