"""What moving KV and prefilling take, in seconds. Pure arithmetic; all places at once: ``native/weigh.cpp``.

Source: the paper, section 5.3 (cost model and the condition for moving KV).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from memserve.core.types import StepPrices


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


def prefill_work(prices: StepPrices, step_tokens: int, prompt: int, computed: float) -> float:
    """Seconds to prefill ``prompt`` tokens of which the first ``computed`` are there, if nothing else ran.

    As ``native/weigh.cpp`` has it, to the last bit.
    """
    token = prices.token + prices.step / step_tokens
    return (prompt - computed) * (token + prices.token_context * (0.5 * (prompt + computed)))


def use_lowered_at(
    prices: StepPrices, step_tokens: int, swap: float, held: int, on_device: int, fetched: int
) -> tuple[int, float]:
    """How many tokens need not be computed, and seconds to swap in those of them below the device.

    Of ``held`` tokens only ``on_device`` are there, and ``swap`` is what bringing one up takes. As engines
    do: all of it, or, where computing is quicker, what is on the device. ``fetched`` tokens come from a peer,
    0 or more than ``held``; who receives KV swaps in first what it has. As ``native/weigh.cpp`` has it, to
    the last bit.
    """
    if fetched > held or on_device >= held:
        return max(fetched, held), swap * max(held - on_device, 0)
    seconds = swap * (held - on_device)
    leave = seconds > prefill_work(prices, step_tokens, held, on_device)
    return (on_device, 0.0) if leave else (held, seconds)
