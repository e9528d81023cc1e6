"""Which routing policy serves a trace best: time to first token, by the real scheduler in simulation.

    python benchmarks/routing_policies.py --traces DIR [--trace conversation,synthetic,azure]
        [--instances 8,64] [--loads 0.75,0.95] [--requests 4000] [--policies NAMES] [--step-tokens 8192]
        [--out FILE]

``--instances`` prefill and as many decode. Engines are modelled by the prices of a 70 B dense model on
eight A800-class GPUs at half of their peak (2 x 70e9 FLOP per token, attention 2 x 80 x 8192 FLOP per pair
of tokens); KV of 320 KiB per token travels at 100 Gb/s. Steps have up to ``--step-tokens`` tokens; 100000 are
whole prompts, as without chunked prefill. A load of 1 is what the prefill instances would get done without
any cache. Larger clusters get copies of the trace with other tokens. ``azure`` has arrivals and lengths of a
chat service, and no prefixes in common. ``cost-without-fetch`` never brings a prefix from a peer,
``cost-line-W`` gives prompts of an instance's own line the weight W. ``bound``
is no policy: one queue for all in order of arrival, and whatever anybody has computed is everywhere at once.
``shortest`` is the same with the shortest prompt first, and each prompt bears a step of its own.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import time
from collections.abc import Iterator
from datetime import datetime
from itertools import product
from pathlib import Path

import numpy as np

import mooncake
from memserve.core.config import POLICIES
from memserve.core.types import StepPrices
from memserve.scheduler.costs import Wire
from memserve.scheduler.policies import Policy, policy_by_name
from memserve.scheduler.policies.cost import LeastCost, Weights
from memserve.sim.journey import InOrder, Outcome, SimRequest
from memserve.sim.simulation import Simulation
from memserve.sim.site import Site
from memserve.sim.steps import Speed
from mooncake import Request
from recording import write_result

PRICES = StepPrices(step=0.02, row=1e-5, row_context=1e-9, token=1.12e-4, token_context=2.1e-9)
WIRE = Wire(bytes_per_token=320 * 1024, bandwidth=12.5e9, latency=2e-3)
STEP_TOKENS = 8192
SPEED = Speed(PRICES, STEP_TOKENS)
CAPACITY = 3_000_000
"""Tokens of KV per instance."""
COPY = 100_000_000
"""What the ids of a copy of the trace are apart; id 0 is the system prompt, common to all."""
PER_COPY = 8
AZURE = "azure"
TRACES = (*mooncake.NAMES, AZURE)
_AZURE_IDS = 1 << 40
ALONE = "cost-without-fetch"
LINE = "cost-line-"
BOUND = "bound"
SHORTEST = "shortest"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="the folder with the traces")
    parser.add_argument("--trace", default=",".join(TRACES), help="several: by commas")
    parser.add_argument("--instances", default="8", help="several: by commas")
    parser.add_argument("--loads", default="0.75,0.95")
    parser.add_argument("--requests", type=int, default=4000, help="of the trace's beginning")
    parser.add_argument("--policies", default=",".join((*POLICIES, ALONE, BOUND, SHORTEST)))
    parser.add_argument("--step-tokens", type=int, default=STEP_TOKENS)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/routing_policies.json")
    options = parser.parse_args()
    rows: list[dict[str, str | float]] = []
    loads = [float(text) for text in options.loads.split(",")]
    speed = Speed(PRICES, options.step_tokens)
    for name, size in product(options.trace.split(","), map(int, options.instances.split(","))):
        trace = load_trace(options.traces, name)[: options.requests]
        for load, policy in product(loads, options.policies.split(",")):
            row = measure(trace, policy, size, load, speed)
            rows.append({"trace": name, "instances": size, "load": load, **row})
            print(rows[-1], flush=True)
            settings = {"requests": options.requests, "step_tokens": options.step_tokens}
            write_result("routing_policies", {**settings, "rows": rows}, options.out)


def load_trace(folder: Path, name: str) -> list[Request]:
    """A trace by name. ``azure`` tells no prefixes: there all prompts are different."""
    if name != AZURE:
        return mooncake.load(folder, name)
    with (folder / "azure_conv.csv").open() as file:
        rows = list(csv.DictReader(file))
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
    return [
        Request(at - times[0], tokens, tuple(range(first, first - (-tokens // mooncake.HASHED))))
        for n, (at, tokens) in enumerate(zip(times, (int(row["ContextTokens"]) for row in rows), strict=True))
        for first in (_AZURE_IDS + n * 1000,)
    ]


def measure(
    trace: list[Request], name: str, instances: int, load: float, speed: Speed
) -> dict[str, str | float]:
    """One policy under one load."""
    if name in (BOUND, SHORTEST):
        return bound(trace, name, instances, load, speed)
    stretch = stretch_of(trace, instances, load, speed)
    done: list[Outcome] = []
    site = Site(instances, instances, 0, speed, CAPACITY // 16, WIRE)
    simulation = Simulation(site, policy_of(name), done.append)
    started = time.process_time()
    simulation.run(InOrder(requests_of(trace, copies_for(instances), stretch)))
    seconds = time.process_time() - started
    simulation.close()
    ttft = np.array([one.ttft for one in done])
    errors = np.abs(np.array([one.decision.predicted_ttft for one in done]) - ttft) / ttft
    return {
        "policy": name,
        "ttft_mean": float(ttft.mean()),
        "ttft_p50": float(np.median(ttft)),
        "ttft_p99": float(np.percentile(ttft, 99)),
        "hit": sum(one.cached_tokens for one in done) / sum(one.prompt_tokens for one in done),
        "error_p50": float(np.median(errors)),
        "error_p90": float(np.percentile(errors, 90)),
        "requests_per_cpu_second": len(done) / seconds,
    }


def bound(
    trace: list[Request], name: str, instances: int, load: float, speed: Speed
) -> dict[str, str | float]:
    """The same figures where nobody ever chooses wrongly, forgets or sends."""
    stretch, copies = stretch_of(trace, instances, load, speed), copies_for(instances)
    known: set[tuple[int, int, int]] = set()
    jobs, hit, total = [], 0, 0
    for at, copy, request in in_order(trace, copies, stretch):
        depth = next(
            (n for n, name in enumerate(request.ids) if (copy, n, name) not in known), len(request.ids)
        )
        known.update((copy, n, name) for n, name in enumerate(request.ids))
        cached = min(depth * mooncake.HASHED, request.tokens - 1)
        jobs.append((at, seconds_of(request.tokens, speed) - seconds_of(cached, speed)))
        hit, total = hit + cached, total + request.tokens
    if name == SHORTEST:
        ttft = serve_shortest([(at, work + speed.prices.step) for at, work in jobs], instances)
    else:
        ttft = serve_in_order(jobs, instances)
    return {
        "policy": name,
        "ttft_mean": float(np.mean(ttft)),
        "ttft_p50": float(np.median(ttft)),
        "ttft_p99": float(np.percentile(ttft, 99)),
        "hit": hit / total,
    }


def serve_in_order(jobs: list[tuple[float, float]], places: int) -> list[float]:
    """From the arrival of each job (when, seconds of work) to its end, one after the other."""
    free_at, took = [0.0] * places, []
    for at, work in jobs:
        done = max(at, heapq.heappop(free_at)) + work
        heapq.heappush(free_at, done)
        took.append(done - at)
    return took


def serve_shortest(jobs: list[tuple[float, float]], places: int) -> list[float]:
    """The same, always the shortest of those that wait."""
    free_at, took, come, now = [0.0] * places, [], 0, 0.0
    waiting: list[tuple[float, float]] = []
    while come < len(jobs) or waiting:
        # Whoever was free earlier had nothing to do.
        now = max(now, heapq.heappop(free_at))
        if not waiting:
            now = max(now, jobs[come][0])
        while come < len(jobs) and jobs[come][0] <= now:
            heapq.heappush(waiting, jobs[come][::-1])
            come += 1
        work, at = heapq.heappop(waiting)
        heapq.heappush(free_at, now + work)
        took.append(now + work - at)
    return took


def policy_of(name: str) -> Policy:
    if name.startswith(LINE):
        return LeastCost(Weights(line=float(name.removeprefix(LINE))))
    return LeastCost(fetches=False) if name == ALONE else policy_by_name(name)


def seconds_of(prompt: int, speed: Speed = SPEED) -> float:
    """To prefill a prompt alone."""
    prices = speed.prices
    token = prices.token + prices.step / speed.step_tokens
    return token * prompt + prices.token_context * prompt**2 / 2


def copies_for(instances: int) -> int:
    """Of the trace: larger clusters get more."""
    return max(1, instances // PER_COPY)


def stretch_of(trace: list[Request], instances: int, load: float, speed: Speed) -> float:
    """What its times are to be multiplied with so that it is that load."""
    work = copies_for(instances) * sum(seconds_of(request.tokens, speed) for request in trace)
    return work / instances / load / trace[-1].at


def in_order(trace: list[Request], copies: int, stretch: float) -> list[tuple[float, int, Request]]:
    """When which copy of which request comes."""
    gap = trace[-1].at * stretch / len(trace)
    order = [
        (request.at * stretch + copy * gap / copies, copy, request)
        for copy in range(copies)
        for request in trace
    ]
    return sorted(order, key=lambda one: one[:2])


def requests_of(trace: list[Request], copies: int, stretch: float) -> Iterator[SimRequest]:
    """The trace, each copy a little later than the one before."""
    for number, (at, copy, request) in enumerate(in_order(trace, copies, stretch)):
        ids = np.array([name + copy * COPY if name else 0 for name in request.ids], np.uint64)
        prompt = np.ascontiguousarray(mooncake.expand(ids).reshape(-1)[: request.tokens])
        answer = mooncake.expand(np.array([(1 << 50) + number], np.uint64)).reshape(-1)[:256]
        session = str(request.ids[1] if len(request.ids) > 1 else request.ids[0])
        yield SimRequest(at, prompt, answer, f"{copy}-{session}")


if __name__ == "__main__":
    main()
