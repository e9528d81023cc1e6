"""Routing policies on running clusters of this machine: the same workload, each policy on servers of its own.

    python benchmarks/policies_live.py --data DIR [--workloads sharegpt,loogle,react] [--sessions 12]
                                       [--rate 0.4] [--think 0.5] [--rounds 1] [--out FILE]

Two colocated instances under every policy, and one prefill and one decode instance under those that can do
more there than follow the roles: ``cost`` lets D prefill what little it lacks. All servers are up, one is
asked at a time, in turns; sessions begin as a Poisson process, the same for all. For ``cost`` also how far
off its predictions of the time to first token were, as its own metrics say.
"""

from __future__ import annotations

import argparse
import asyncio
import re
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path

import httpx

from bench_command import Row, row_of, run_bench, table_of
from memserve.bench.target import Target, open_target
from recording import write_result

COLOCATED = ("--colocated", "2")
APART = ("--prefill", "1", "--decode", "1")
CLUSTERS = {
    "colocated": (COLOCATED, ("round-robin", "least-load", "session-id", "prompt-tree", "cost")),
    "1P1D": (APART, ("prompt-tree", "cost")),
}
KV_MEMORY = "384MiB"
_ERROR = re.compile(r'^memserve_ttft_prediction_error\{.*quantile="([\d.]+)".*\} (\S+)$', re.MULTILINE)


def main() -> None:
    parser = load_parser(__doc__, "policies_live")
    parser.add_argument("--rounds", type=int, default=1)
    asyncio.run(compare(parser.parse_args()))


def load_parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """Options of the sessions that are sent, for a benchmark with results of that name."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with the data sets")
    parser.add_argument("--workloads", default="sharegpt,loogle,react")
    parser.add_argument("--sessions", type=int, default=12)
    parser.add_argument("--rate", type=float, default=0.4, help="sessions that begin per second")
    parser.add_argument(
        "--think", type=float, default=0.5, help="mean seconds between an answer and the next turn"
    )
    parser.add_argument("--out", type=Path, help=f"default: benchmarks/results/{name}.json")
    return parser


async def compare(options: argparse.Namespace) -> None:
    rows: list[Row] = []
    async with AsyncExitStack() as stack:
        urls: dict[str, str] = {}
        for cluster, (roles, policies) in CLUSTERS.items():
            for policy in policies:
                own = (*roles, "--policy", policy, "--kv-memory", KV_MEMORY)
                target = Target(f"{cluster}:{policy}", None, own)
                url = await stack.enter_async_context(open_target(target, asyncio.Event()))
                assert url is not None, "nobody asks it to stop"
                urls[target.name] = url
        shown = ",".join(f"{name}={url}" for name, url in urls.items())
        errors: dict[str, dict[str, float]] = {}
        for workload in options.workloads.split(","):
            report = await asyncio.to_thread(
                run_bench,
                *("--url", shown, "--workload", workload, "--data", str(options.data)),
                *("--sessions", str(options.sessions), "--rate", str(options.rate)),
                *("--think", str(options.think), "--rounds", str(options.rounds)),
                *("--recorded-answers", "--fixed-length"),
            )
            rows += [row_of(workload, entry) for entry in report["entries"]]
            print(table_of(rows[-len(urls) :]), flush=True)
            errors[workload] = {
                f"{name} p{100 * float(share):.0f}": error
                for name, url in urls.items()
                if name.endswith("cost")
                for share, error in await read_errors(url)
            }
            print(errors[workload], flush=True)
            figures = {name: getattr(options, name) for name in ("sessions", "rate", "think", "rounds")}
            write_result(
                "policies_live",
                {**figures, "rows": [asdict(row) for row in rows], "prediction_errors": errors},
                options.out,
            )


async def read_errors(url: str) -> list[tuple[str, float]]:
    """Quantiles of the relative error of the last predictions."""
    async with httpx.AsyncClient(trust_env=False) as http:
        text = (await http.get(f"{url}/metrics")).raise_for_status().text
    return [(share, float(error)) for share, error in _ERROR.findall(text)]


if __name__ == "__main__":
    main()
