"""What a request would cost at each place, in seconds. Pure arithmetic on the fleet's columns.

Source: the paper, section 5.3 (cost model and the condition for moving KV), extended by what the request
does to others: those who wait behind it and the streams beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from memserve.core.types import StepPrices
from memserve.scheduler.fleet import Columns, Flags, Floats
from memserve.scheduler.holdings import Holdings, Tier


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
    work : to compute what is missing then, if nothing else ran, and to swap in what lies below the device.
    prefill : the same beside the streams that are decoded there; they stand still while KV is swapped in.
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
    places: Columns, prompt: int, computed: Floats, fetch: Floats, now: float, swap: Floats
) -> PrefillCosts:
    """Prefill of ``prompt`` tokens of which the first ``computed`` are there, ``fetch`` seconds from now.

    Of these some must be swapped in first, which takes ``swap`` seconds. ``computed``, and ``fetch`` and
    ``swap``, which are nowhere negative: float64[places].
    """
    work = (prompt - computed) * (places.token + places.token_context * (0.5 * (prompt + computed)))
    wait = np.maximum(places.free_at - now, fetch)
    return PrefillCosts(wait, fetch, work + swap, work * places.stretch + swap)


def prefill_work(prices: StepPrices, step_tokens: int, prompt: int, computed: float) -> float:
    """The ``work`` of :func:`prefill_costs` at one place, to the last bit."""
    token = prices.token + prices.step / step_tokens
    return (prompt - computed) * (token + prices.token_context * (0.5 * (prompt + computed)))


def use_lowered(places: Columns, held: Floats, on_device: Floats) -> tuple[Floats, Floats]:
    """How many tokens of ``held`` are used where only ``on_device`` are there, and seconds to swap them in.

    As engines do: all of it, or, where computing is quicker than swapping in, what is on the device.
    """
    below = held - on_device
    seconds = places.swap * below
    leave = seconds > below * (places.token + places.token_context * (0.5 * (held + on_device)))
    return np.where(leave, on_device, held), np.where(leave, 0.0, seconds)


def use_lowered_at(
    prices: StepPrices, step_tokens: int, swap: float, held: int, on_device: int, fetched: int
) -> tuple[int, float]:
    """The same at one place, to the last bit. ``fetched`` tokens come from a peer: 0, or more than ``held``.

    Who receives KV swaps in first what it has of the prompt.
    """
    if fetched > held or on_device >= held:
        return max(fetched, held), swap * max(held - on_device, 0)
    seconds = swap * (held - on_device)
    leave = seconds > prefill_work(prices, step_tokens, held, on_device)
    return (on_device, 0.0) if leave else (held, seconds)


def decode_costs(
    places: Columns, prompt: int, answer: float, own: float = 1.0, others: float = 1.0
) -> tuple[Floats, Floats]:
    """Seconds that the answer takes beside what is decoded there, and what it costs the other streams.

    Times the weights ``own`` and ``others``.
    """
    alone = places.row + places.row_context * (prompt + answer / 2)
    before = places.step + places.row * places.streams + places.row_context * places.context
    return (own * answer) * (before + alone), (others * answer * places.streams) * alone


def tokens_by_slot(held: Holdings, rows: int, most: int) -> Floats:
    """What each row's instance holds of the prompt, at most ``most`` tokens: float64[rows]."""
    return _spread(np.zeros(rows), held.tiers, most)


def on_device_by_slot(held: Holdings, tokens: Floats, most: int) -> Floats:
    """What of ``tokens``, those that :func:`tokens_by_slot` gives, lies on devices."""
    return _spread(tokens.copy(), held.lowered, most) if held.lowered else tokens


def _spread(tokens: Floats, tiers: Sequence[Tier], most: int) -> Floats:
    rows = len(tokens)
    for tier in reversed(tiers):
        mask = np.frombuffer(tier.mask.to_bytes(-(-rows // 8), "little"), np.uint8)
        tokens[np.unpackbits(mask, count=rows, bitorder="little").view(bool)] = min(tier.tokens, most)
    return tokens
