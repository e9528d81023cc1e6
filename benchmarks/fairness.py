"""What one tenant's burst does to another's time to the first token, on a running server of this machine.

    python benchmarks/fairness.py [--burst 150] [--burst-tokens 100] [--calm 12] [--gap 1.0] [--rounds 3]
                                  [--url URL] [--out FILE]

In turns: a calm tenant's short requests alone; the same beside a burst under one tenant's name, as if there
were no tenants; and beside it under another tenant's name. Reported are the calm requests' times to the first
token and the time that the burst takes. ``--url`` asks a server that runs already, for example an older one.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import numpy as np

from memserve.bench.target import Target, open_target
from recording import write_result

CALM_TOKENS, ANSWER = 100, 16
VOCABULARY = 20_000
ARMS = {"alone": None, "one tenant": "calm", "two tenants": "bursting"}
"""Whose name the burst has; None: there is no burst."""


class Asker:
    """Sends requests whose prompts nobody has seen, and measures."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._random = np.random.default_rng(time.time_ns())

    async def ask(self, tenant: str, tokens: int, answer: int) -> float:
        """Seconds to the first token of a new prompt."""
        prompt = self._random.integers(100, VOCABULARY, tokens).tolist()
        body = {
            "prompt": prompt, "max_tokens": answer, "temperature": 0, "ignore_eos": True, "stream": True
        }  # fmt: skip
        sent = time.perf_counter()
        headers = {"x-memserve-tenant": tenant}
        first = 0.0
        async with self._http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line and not first:
                    first = time.perf_counter() - sent
        return first

    async def ask_calmly(self, count: int, gap: float) -> list[float]:
        """One request every ``gap`` seconds."""
        tasks = []
        for _ in range(count):
            tasks.append(asyncio.create_task(self.ask("calm", CALM_TOKENS, ANSWER)))
            await asyncio.sleep(gap)
        return list(await asyncio.gather(*tasks))

    async def ask_in_a_burst(self, tenant: str, count: int, tokens: int) -> float:
        """All at once; the seconds until the last answer is complete."""
        began = time.perf_counter()
        await asyncio.gather(*(self.ask(tenant, tokens, ANSWER) for _ in range(count)))
        return time.perf_counter() - began


async def measure(options: argparse.Namespace) -> None:
    async with AsyncExitStack() as stack:
        url = options.url
        if url is None:
            target = Target("fair", None, ("--colocated", "1", "--kv-memory", "512MiB"))
            url = await stack.enter_async_context(open_target(target, asyncio.Event()))
        http = httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=1000))
        asker = Asker(await stack.enter_async_context(http))
        await asker.ask_in_a_burst("calm", 2, options.burst_tokens)
        calm: dict[str, list[float]] = {arm: [] for arm in ARMS}
        bursts: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for _ in range(options.rounds):
            for arm, tenant in ARMS.items():
                burst = None
                if tenant is not None:
                    burst = asyncio.create_task(
                        asker.ask_in_a_burst(tenant, options.burst, options.burst_tokens)
                    )
                    await asyncio.sleep(0.3)
                calm[arm] += await asker.ask_calmly(options.calm, options.gap)
                bursts[arm] += [] if burst is None else [await burst]
    rows = {arm: show(arm, calm[arm], bursts[arm]) for arm in ARMS}
    asked = {name: getattr(options, name) for name in ("burst", "burst_tokens", "calm", "gap", "rounds")}
    write_result("fairness", {**asked, "rows": rows}, options.out)


def show(arm: str, calm: list[float], bursts: list[float]) -> dict[str, float]:
    """Print a row and return it; seconds."""
    row = {
        "ttft_median": statistics.median(calm),
        "ttft_p90": float(np.quantile(calm, 0.9)),
        "ttft_max": max(calm),
        "burst_median": statistics.median(bursts) if bursts else 0.0,
    }
    print(f"{arm:12}", "  ".join(f"{name} {value:7.3f}" for name, value in row.items()), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--burst", type=int, default=150, help="requests")
    parser.add_argument("--burst-tokens", type=int, default=100)
    parser.add_argument("--calm", type=int, default=12, help="requests")
    parser.add_argument("--gap", type=float, default=1.0, help="seconds between them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--url")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/fairness.json")
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
