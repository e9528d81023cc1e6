"""How far off predictions of the time to the first token are, on one running cluster after the other.

    python benchmarks/predictions_live.py --data DIR [--workloads sharegpt,loogle,react] [--sessions 12]
                                          [--rate 0.4] [--think 0.5] [--out FILE]

Each workload runs on servers of its own: two colocated instances, then one prefill and one decode instance,
under the policy ``cost``. Step prices are measured or kept, the rest is learnt from first tokens on the way:
the errors of that time are in it. The server's own metrics tell.
"""

from __future__ import annotations

import argparse
import asyncio
from contextlib import AsyncExitStack

from bench_command import row_of, run_bench
from memserve.bench.target import Target, open_target
from policies_live import APART, COLOCATED, KV_MEMORY, load_parser, read_errors
from recording import write_result

CLUSTERS = {"2 colocated": COLOCATED, "1P1D": APART}


def main() -> None:
    options = load_parser(__doc__, "predictions_live").parse_args()
    rows = []
    print("| workload | cluster | turns (failed) | TTFT mean s | error p50 | p90 |")
    print("|---|---|---|---|---|---|")
    for workload in options.workloads.split(","):
        for cluster, roles in CLUSTERS.items():
            row = asyncio.run(measure(options, workload, roles))
            rows.append({"workload": workload, "cluster": cluster, **row})
            print(
                f"| {workload} | {cluster} | {row['turns']:.0f} ({row['failed']:.0f}) | {row['ttft']:.3f} "
                f"| {row['error_p50']:.0%} | {row['error_p90']:.0%} |",
                flush=True,
            )
            figures = {name: getattr(options, name) for name in ("sessions", "rate", "think")}
            write_result("predictions_live", {**figures, "rows": rows}, options.out)


async def measure(options: argparse.Namespace, workload: str, roles: tuple[str, ...]) -> dict[str, float]:
    async with AsyncExitStack() as stack:
        target = Target("cost", None, (*roles, "--policy", "cost", "--kv-memory", KV_MEMORY))
        url = await stack.enter_async_context(open_target(target, asyncio.Event()))
        assert url is not None, "nobody asks it to stop"
        report = await asyncio.to_thread(
            run_bench,
            *("--url", f"cost={url}", "--workload", workload, "--data", str(options.data)),
            *("--sessions", str(options.sessions), "--rate", str(options.rate)),
            *("--think", str(options.think), "--recorded-answers", "--fixed-length"),
        )
        errors = {f"error_p{100 * float(share):.0f}": error for share, error in await read_errors(url)}
    row = row_of(workload, report["entries"][0])
    return {"turns": row.turns, "failed": row.failed, "ttft": row.ttft, **errors}


if __name__ == "__main__":
    main()
