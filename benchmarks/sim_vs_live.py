"""The simulator beside running clusters of this machine: the same trace, arrivals and policy.

    python benchmarks/sim_vs_live.py --trace FILE [--requests 80] [--rates 0.5,1.0] [--context 2048]
                                     [--policy cost] [--clusters "2 colocated,1P1D"] [--out FILE]

Each cluster (two colocated instances; one prefill and one decode instance) answers the beginning of a
Mooncake-format trace, then the simulator does, with the default link and the prices that the instances
believed while they had work (``/v1/cluster`` once a second, medians of those that had changed): after a run
they describe its last requests, which share the machine with nobody. ``ratio`` is simulated over live. The
simulator has no HTTP, no tokenizer and no processes that share a machine.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Coroutine
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import msgspec

from bench_command import row_of, run_bench
from memserve.bench.records import Record
from memserve.bench.sources import read_replay
from memserve.bench.target import Target, open_target
from memserve.bench.timeline import Pace
from memserve.bench.workload import Workload
from memserve.server.views import ClusterBody
from memserve.sim.site import Site
from memserve.sim.speeds import profile_of_cluster
from memserve.sim.trial import Load, run_trial
from recording import write_result

_LOOK_SECONDS = 1.0
CLUSTERS = {"2 colocated": (0, 0, 2), "1P1D": (1, 1, 0)}


@dataclass(frozen=True, slots=True)
class Pair:
    """One figure of a cluster at a rate, live and simulated, in seconds (``hit``: share of prompt tokens)."""

    cluster: str
    rate: float
    figure: str
    live: float
    simulated: float

    @property
    def ratio(self) -> float:
        return self.simulated / self.live if self.live else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=80, help="of the trace's beginning")
    parser.add_argument("--rates", default="0.5,1.0", help="requests per second")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--policy", default="cost")
    parser.add_argument("--clusters", default=",".join(CLUSTERS))
    parser.add_argument("--kv-memory", default="384MiB")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/sim_vs_live.json")
    asyncio.run(compare(parser.parse_args()))


async def compare(options: argparse.Namespace) -> None:
    workload = read_replay(options.trace, options.requests, options.context)
    pairs: list[Pair] = []
    for cluster in options.clusters.split(","):
        prefill, decode, colocated = CLUSTERS[cluster]
        roles = ("--prefill", prefill, "--decode", decode) if prefill else ("--colocated", colocated)
        own = (*map(str, roles), "--policy", options.policy, "--kv-memory", options.kv_memory)
        for rate in (float(text) for text in options.rates.split(",")):
            # A server of its own: nothing is cached, as in the simulator.
            async with open_target(Target(cluster, None, own), asyncio.Event()) as url:
                assert url is not None, "nobody asks it to stop"
                live, shown = await watch(url, asyncio.to_thread(ask, url, rate, options))
            done = simulate(shown, (prefill, decode, colocated), workload, rate, options.policy)
            pairs += pairs_of(cluster, rate, live, done)
            for pair in pairs[-3:]:
                print(
                    f"{cluster:12s} {rate:4.2f}/s {pair.figure:5s} live {pair.live:7.3f} "
                    f"simulated {pair.simulated:7.3f} ratio {pair.ratio:.2f}",
                    flush=True,
                )
    rows = [{**asdict(pair), "ratio": pair.ratio} for pair in pairs]
    write_result(
        "sim_vs_live", {"requests": options.requests, "policy": options.policy, "rows": rows}, options.out
    )


def ask(url: str, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """The report's entry of a run against ``url``."""
    report = run_bench(
        *(
            "--url",
            url,
            "--workload",
            "mooncake",
            "--trace",
            str(options.trace),
            "--sessions",
            str(options.requests),
        ),
        *("--context", str(options.context), "--rate", str(rate)),
    )
    entry: dict[str, Any] = report["entries"][0]
    return entry


async def watch(url: str, asked: Coroutine[Any, Any, dict[str, Any]]) -> tuple[dict[str, Any], ClusterBody]:
    """What ``asked`` returns, and the cluster with the prices that its instances had meanwhile."""
    asking = asyncio.create_task(asked)
    seen = [await read_cluster(url)]
    while not asking.done():
        await asyncio.wait([asking], timeout=_LOOK_SECONDS)
        seen.append(await read_cluster(url))
    return await asking, busy_prices(seen)


def busy_prices(seen: list[ClusterBody]) -> ClusterBody:
    """The last look, each instance with medians of those prices that its steps had changed since the last."""
    instances = []
    for looks in zip(*(body.instances for body in seen), strict=True):
        changed = [new.prices for old, new in pairwise(looks) if new.prices and new.prices != old.prices]
        names = changed[0] if changed else {}
        prices = {name: statistics.median(one[name] for one in changed) for name in names}
        instances.append(msgspec.structs.replace(looks[-1], prices=prices or looks[-1].prices))
    return msgspec.structs.replace(seen[-1], instances=tuple(instances))


async def read_cluster(url: str) -> ClusterBody:
    async with httpx.AsyncClient(trust_env=False) as http:
        answer = (await http.get(f"{url}/v1/cluster")).raise_for_status()
        return msgspec.json.decode(answer.content, type=ClusterBody)


def simulate(
    shown: ClusterBody, roles: tuple[int, int, int], workload: Workload, rate: float, policy: str
) -> list[Record]:
    """The same load on a cluster of the shown instances' prices."""
    profile = profile_of_cluster(shown, "the cluster")
    blocks = profile.kv_tokens // shown.block_tokens
    site = Site(*roles, profile.speed, blocks, profile.wire, profile.decode_speed)
    return list(run_trial(Load(workload, Pace(rate)), site, policy).measured.records)


def pairs_of(cluster: str, rate: float, live: dict[str, Any], done: list[Record]) -> list[Pair]:
    row = row_of("mooncake", live)
    assert not row.failed, f"{row.failed} requests failed"
    hit = sum(one.sources.reused for one in done) / sum(one.prompt_tokens for one in done)
    return [
        Pair(cluster, rate, "ttft", row.ttft, statistics.mean(one.ttft for one in done)),
        Pair(cluster, rate, "jct", row.jct, statistics.mean(one.jct for one in done)),
        Pair(cluster, rate, "hit", row.cached_share, hit),
    ]


if __name__ == "__main__":
    main()
