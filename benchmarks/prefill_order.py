"""Which prompts a step's prefill tokens go to: mean and tail time to first token of four orders, simulated.

Prompts arrive at random (exponential gaps, lognormal lengths with a long tail), a step computes 512 prompt
tokens, time is counted in steps. ``half`` is what the batcher does: half of a step to the oldest prompt, the
rest to the shortest.

    python benchmarks/prefill_order.py [--prompts N]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import numpy as np

from recording import write_result

STEP_TOKENS = 512
SHORT, LONG = 500, 4000  # tokens


class Prompt:
    """``left`` tokens are to be computed; times are in steps."""

    def __init__(self, arrival: float, length: int) -> None:
        self.arrival = arrival
        self.length = length
        self.left = length
        self.finish = 0.0


Order = Callable[[list[Prompt]], Iterator[tuple[Prompt, int]]]


def arrival(prompts: list[Prompt]) -> Iterator[tuple[Prompt, int]]:
    yield from ((prompt, STEP_TOKENS) for prompt in prompts)


def shortest(prompts: list[Prompt]) -> Iterator[tuple[Prompt, int]]:
    yield from ((prompt, STEP_TOKENS) for prompt in sorted(prompts, key=lambda each: each.left))


def turns(prompts: list[Prompt]) -> Iterator[tuple[Prompt, int]]:
    share = -(-STEP_TOKENS // len(prompts))
    yield from ((prompt, share) for prompt in prompts)
    yield from arrival(prompts)


def half(prompts: list[Prompt]) -> Iterator[tuple[Prompt, int]]:
    yield prompts[0], STEP_TOKENS // 2
    yield from shortest(prompts)


ORDERS: dict[str, Order] = {"arrival": arrival, "shortest": shortest, "turns": turns, "half": half}


def simulate(order: Order, arrivals: np.ndarray, lengths: np.ndarray) -> list[Prompt]:
    coming = [Prompt(float(at), int(length)) for at, length in zip(arrivals, lengths, strict=True)]
    waiting: list[Prompt] = []
    done: list[Prompt] = []
    now, upcoming = 0.0, 0
    while len(done) < len(coming):
        while upcoming < len(coming) and coming[upcoming].arrival <= now:
            waiting.append(coming[upcoming])
            upcoming += 1
        if not waiting:
            now = coming[upcoming].arrival
            continue
        now += compute(order(list(waiting))) / STEP_TOKENS
        for prompt in [each for each in waiting if each.left == 0]:
            prompt.finish = now
            done.append(prompt)
            waiting.remove(prompt)
    return done


def compute(shares: Iterator[tuple[Prompt, int]]) -> int:
    """Tokens computed in one step."""
    rest = STEP_TOKENS
    for prompt, most in shares:
        count = min(prompt.left, most, rest)
        prompt.left -= count
        rest -= count
        if rest == 0:
            break
    return STEP_TOKENS - rest


def summarise_waits(done: list[Prompt]) -> dict[str, float]:
    """Times to first token, in steps."""

    def waits(low: int, high: int) -> np.ndarray:
        return np.array([each.finish - each.arrival for each in done if low <= each.length < high])

    return {
        "mean": float(waits(0, 1 << 30).mean()),
        "short_mean": float(waits(0, SHORT).mean()),
        "short_p99": float(np.quantile(waits(0, SHORT), 0.99)),
        "long_mean": float(waits(LONG, 1 << 30).mean()),
        "long_max": float(waits(LONG, 1 << 30).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=20_000)
    asked = parser.parse_args()
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6.0, 1.2, asked.prompts), 16, 8000).astype(int)
    gaps = rng.exponential(1.0, asked.prompts)
    figures: dict[str, object] = {}
    for load in (0.7, 0.9):
        arrivals = np.cumsum(gaps) * lengths.mean() / STEP_TOKENS / load
        for name, order in ORDERS.items():
            found = summarise_waits(simulate(order, arrivals, lengths))
            figures[f"load {load} {name}"] = found
            print(
                f"load {load} {name:>9}: " + ", ".join(f"{key} {value:.1f}" for key, value in found.items())
            )
    print(write_result("prefill_order", {"unit": "steps of 512 tokens", **figures}))


if __name__ == "__main__":
    main()
