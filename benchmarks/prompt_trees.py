"""What the scheduler's prompt trees should believe: by events or by time, with or without promises.

    python benchmarks/prompt_trees.py --traces DIR [--workload bursts|conversation|synthetic]
        [--instances 8] [--load 0.75] [--requests 2000] [--policies prompt-tree,cost] [--out FILE]

Simulated with the prices and the cluster of ``routing_policies.py``; ``--colocated`` has no decode instances.
``bursts``: every few seconds 16 requests within half a second share a new prefix of 8,000 tokens.
Reported per mode: time to the first token, and of all tokens believed to be cached where a request went, the
share that was not found (stale); likewise found tokens that were not believed (missed).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np

import mooncake
from memserve.core.config import TreeSource
from memserve.scheduler.prompt_trees import TreeOptions
from memserve.sim.journey import InOrder, Outcome, SimRequest
from memserve.sim.simulation import Simulation
from memserve.sim.site import Site
from recording import write_result
from routing_policies import CAPACITY, PRICES, SPEED, WIRE, policy_of, requests_of, seconds_of

BURST = 16
PREFIX = 8000
TAIL = 200
ANSWER = 256
MODES = {
    "events": TreeOptions(speculative=False),
    "events+speculative": TreeOptions(),
    **{
        f"ttl {ttl:g} s{'+speculative' * speculative}": TreeOptions(
            TreeSource.TTL, ttl=ttl, speculative=speculative
        )
        for ttl, speculative in ((300.0, False), (30.0, True), (300.0, True), (3000.0, True))
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="the folder with the traces")
    parser.add_argument("--workload", default="bursts", choices=("bursts", *mooncake.NAMES))
    parser.add_argument("--instances", type=int, default=8)
    parser.add_argument("--colocated", action="store_true")
    parser.add_argument("--capacity", type=int, default=CAPACITY, help="tokens of KV per instance")
    parser.add_argument("--loads", default="0.75")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--policies", default="prompt-tree,cost")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/prompt_trees.json")
    options = parser.parse_args()
    n = options.instances
    shape = (0, 0, n) if options.colocated else (n, n, 0)
    site = Site(*shape, SPEED, options.capacity // 16, WIRE)
    rows: list[dict[str, str | float]] = []
    for load, policy, mode in product(
        map(float, options.loads.split(",")), options.policies.split(","), options.modes.split(",")
    ):
        requests = workload(options, load)
        row = measure(site, requests, policy, MODES[mode])
        setting = {"workload": options.workload, "instances": n, "colocated": options.colocated}
        rows.append({**setting, "capacity": options.capacity, "load": load, "mode": mode, **row})
        print(rows[-1], flush=True)
    write_result("prompt_trees", {"rows": rows}, options.out)


def workload(options: argparse.Namespace, load: float) -> Iterator[SimRequest]:
    """Requests in order of time, at ``load`` of what the instances could prefill without any cache."""
    if options.workload == "bursts":
        yield from bursts(options.requests // BURST, options.instances, load)
        return
    trace = mooncake.load(options.traces, options.workload)[: options.requests]
    work = sum(seconds_of(request.tokens) for request in trace)
    yield from requests_of(trace, 1, work / options.instances / load / trace[-1].at)


def bursts(count: int, instances: int, load: float) -> Iterator[SimRequest]:
    """As far apart as the load says, if one instance in four computes the prefix of each burst."""
    random = np.random.default_rng(1)
    work = seconds_of(PREFIX) * max(1, instances // 4) + BURST * (PRICES.step + PRICES.token * TAIL)
    for number in range(count):
        prefix = random.integers(0, 128_000, PREFIX, np.int32)
        start = number * work / instances / load
        for at in np.sort(random.uniform(0, 0.5, BURST)):
            prompt = np.concatenate((prefix, random.integers(0, 128_000, TAIL, np.int32)))
            answer = random.integers(0, 128_000, ANSWER, np.int32)
            yield SimRequest(start + float(at), prompt, answer, f"burst-{number}")


def measure(
    site: Site, requests: Iterator[SimRequest], policy: str, trees: TreeOptions
) -> dict[str, str | float]:
    """One policy, believing what ``trees`` says."""
    done: list[Outcome] = []
    simulation = Simulation(site, policy_of(policy), done.append, trees)
    simulation.run(InOrder(sorted(requests, key=lambda request: request.at)))
    simulation.close()
    accuracy = simulation.accuracy
    ttft = np.array([one.ttft for one in done])
    return {
        "policy": policy,
        "ttft_mean": float(ttft.mean()),
        "ttft_p99": float(np.percentile(ttft, 99)),
        "jct_mean": float(np.mean([one.jct for one in done])),
        "hit": sum(one.cached_tokens for one in done) / sum(one.prompt_tokens for one in done),
        "believed": accuracy.believed / accuracy.prompt,
        "promised": accuracy.promised / accuracy.prompt,
        "stale_rate": accuracy.stale_rate,
        "missed": accuracy.missed / accuracy.prompt,
        "busy": sum(simulation.busy.values()),
    }


if __name__ == "__main__":
    main()
