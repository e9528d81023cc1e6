"""What is lost when several schedulers share the requests: hits and balance beside one scheduler, simulated.

    python benchmarks/sharded_schedulers.py --traces DIR [--trace conversation] [--instances 64]
        [--loads 0.75,0.95] [--requests 1500] [--shards 1,4,16,64] [--key-tokens 1024]
        [--policies cost,least-load] [--capacity TOKENS] [--owned-only] [--out FILE]

A request goes to the shard that its first --key-tokens tokens name; all of a trace begin with the same 512.
Shards hear of instances by heartbeats (one per second) and KV events, and of what others have booked by
heartbeats only; ``owned``: each shard has instances of its own. Cluster, prices and copies of the trace as in
``routing_policies.py``. ``spread``: standard deviation of the instances' busy time over its mean.
"""

from __future__ import annotations

import argparse
import statistics
from itertools import product
from pathlib import Path

import numpy as np

from memserve.sim.journey import InOrder, Outcome
from memserve.sim.shards import Sharding
from memserve.sim.simulation import Simulation
from memserve.sim.site import Site
from recording import write_result
from routing_policies import (
    CAPACITY,
    PER_COPY,
    SPEED,
    TRACES,
    WIRE,
    Request,
    load_trace,
    policy_of,
    requests_of,
    seconds_of,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True, help="the folder with the traces")
    parser.add_argument("--trace", default="conversation", choices=TRACES)
    parser.add_argument("--instances", type=int, default=64, help="that prefill, and as many that decode")
    parser.add_argument("--loads", default="0.75,0.95")
    parser.add_argument("--requests", type=int, default=1500, help="of the trace's beginning, per copy")
    parser.add_argument("--shards", default="1,4,16,64")
    parser.add_argument("--key-tokens", type=int, default=1024, help="that name a request's shard")
    parser.add_argument("--policies", default="cost,least-load")
    parser.add_argument("--capacity", type=int, default=CAPACITY, help="tokens of KV per instance")
    parser.add_argument("--owned-only", action="store_true", help="leave out shards that share all instances")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/sharded_schedulers.json")
    options = parser.parse_args()
    trace = load_trace(options.traces, options.trace)[: options.requests]
    rows: list[dict[str, str | float]] = []
    cells = product(
        map(float, options.loads.split(",")),
        options.policies.split(","),
        map(int, options.shards.split(",")),
        (False, True),
    )
    for load, policy, shards, owned in cells:
        if (shards == 1) if owned else (shards > 1 and options.owned_only):
            continue
        sharding = Sharding(shards, options.key_tokens, owned)
        row = measure(trace, policy, options.instances, load, sharding, options.capacity)
        rows.append({"load": load, "shards": shards, "owned": owned, **row})
        print(rows[-1], flush=True)
        figures = {
            "key_tokens": options.key_tokens,
            "trace": options.trace,
            "instances": options.instances,
            "requests": len(trace),
            "capacity": options.capacity,
        }
        write_result("sharded_schedulers", {**figures, "rows": rows}, options.out)


def measure(
    trace: list[Request], policy: str, instances: int, load: float, sharding: Sharding, capacity: int
) -> dict[str, str | float]:
    """One cell of the table."""
    copies = max(1, instances // PER_COPY)
    work = copies * sum(seconds_of(request.tokens) for request in trace)
    stretch = work / instances / load / trace[-1].at
    done: list[Outcome] = []
    site = Site(instances, instances, 0, SPEED, capacity // 16, WIRE)
    simulation = Simulation(site, policy_of(policy), done.append, sharding=sharding)
    simulation.run(InOrder(requests_of(trace, copies, stretch)))
    busy = [seconds for name, seconds in simulation.busy.items() if name.startswith("prefill")]
    simulation.close()
    ttft = np.array([one.ttft for one in done])
    return {
        "policy": policy,
        "ttft_mean": float(ttft.mean()),
        "ttft_p99": float(np.percentile(ttft, 99)),
        "hit": sum(one.cached_tokens for one in done) / sum(one.prompt_tokens for one in done),
        "spread": statistics.pstdev(busy) / statistics.mean(busy),
    }


if __name__ == "__main__":
    main()
