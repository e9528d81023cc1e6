"""What it brings that answers flow back to P (pd-caching-3 against pd-caching-2), and in which pieces.

chats   Multi-turn ShareGPT chats at 1P1D, each configuration in turn, several rounds: time to first token of
        second and later turns, prompt tokens by source, bytes from P to D and from D to P.
pieces  One long answer at a time from 1P1D servers that differ in ``engine.backflow_tokens``, in turn: time
        between tokens as the client sees it, and how long after the last token all KV is back at P.

    python benchmarks/backflow.py --data DIR [--rounds 3] [--sessions 16] [--answer 768]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path

import httpx

from memserve.bench.comparison import Plan, compare_targets
from memserve.bench.records import Record, Round
from memserve.bench.sources import Recorded, read_workload
from memserve.bench.target import Target, open_target
from memserve.bench.timeline import Pace
from recording import summarise, write_result

ROWS = ("pd-caching-2", "pd-caching-3")
PIECES = (0, 64, 256, 1024)
ONE_EACH = ("--prefill", "1", "--decode", "1", "--policy", "prompt-tree")
PATIENCE = 300.0
PROMPT = 64


class Quiet:
    """Says which round runs, no more."""

    def starting(self, target: str, number: int) -> None:
        print(f"round {number}: {target}", flush=True)

    def running(self, target: str, number: int) -> None:
        pass

    def turn_ended(self, record: Record) -> None:
        if record.error:
            raise SystemExit(f"a turn failed: {record.error}")


async def measure_chats(options: argparse.Namespace) -> dict[str, object]:
    asked = Recorded("sharegpt", options.data, options.sessions, options.context, seed=3, think=options.think)
    plan = Plan(
        workload=read_workload(asked),
        context=options.context,
        pace=Pace(concurrency=options.concurrency),
        rounds=options.rounds,
        fixed=True,
        real_answers=True,
        timeout=PATIENCE,
    )
    targets = [Target(row, None, (*ONE_EACH, "--phases", row)) for row in ROWS]
    comparison = await compare_targets(targets, plan, Quiet(), asyncio.Event())
    if comparison.failure is not None:
        raise comparison.failure
    two, three = (result.rounds for result in comparison.results)
    return {
        "sessions": options.sessions,
        "context": options.context,
        "concurrency": options.concurrency,
        "think_s": options.think,
        **{result.target.name: describe_rounds(result.rounds) for result in comparison.results},
        "caching_3_over_2": {
            "later_ttft_median": summarise(
                [c / b for b, c in zip(medians(two), medians(three), strict=True)]
            ),
            "computed_tokens": summarise(
                [c / b for b, c in zip(computed(two), computed(three), strict=True)]
            ),
        },
    }


def later(one: Round) -> list[Record]:
    return [record for record in one.records if record.turn > 0]


def medians(rounds: Sequence[Round]) -> list[float]:
    return [statistics.median(record.ttft for record in later(one)) for one in rounds]


def computed(rounds: Sequence[Round]) -> list[float]:
    return [float(sum(record.sources.computed for record in later(one))) for one in rounds]


def describe_rounds(rounds: Sequence[Round]) -> dict[str, object]:
    sent = [{entry.role: entry.bytes for entry in one.sent or ()} for one in rounds]
    records = [record for one in rounds for record in later(one)]
    names = ("computed", "local", "host", "disk", "peer", "backflow")
    return {
        "later_turns": len(records),
        "later_ttft_s_median": summarise(medians(rounds)),
        "later_ttft_s_mean": summarise([statistics.mean(x.ttft for x in later(one)) for one in rounds]),
        "later_prompt_tokens": {name: sum(getattr(x.sources, name) for x in records) for name in names},
        "ledgers_that_add_up": sum(record.exact for record in records),
        "bytes_p_to_d": summarise([float(one.get("prefill", 0)) for one in sent]),
        "bytes_d_to_p": summarise([float(one.get("decode", 0)) for one in sent]),
    }


async def measure_pieces(options: argparse.Namespace) -> dict[str, object]:
    found: dict[int, list[dict[str, float]]] = {tokens: [] for tokens in PIECES}
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        clients = {}
        for tokens in PIECES:
            file = folder / f"{tokens}.toml"
            file.write_text(f"[engine]\nbackflow_tokens = {tokens}\n")
            memory = ("--kv-memory", "256MiB", "--threads", "1", "--config", str(file))
            target = Target(f"pieces of {tokens}", None, (*ONE_EACH, *memory))
            url = await stack.enter_async_context(open_target(target, asyncio.Event()))
            assert url is not None, "nobody stops it"
            http = httpx.AsyncClient(base_url=url, timeout=PATIENCE)
            clients[tokens] = await stack.enter_async_context(http)
            await ask_long(clients[tokens], seed=-1, tokens=32)
        for number in range(options.rounds):
            for tokens, client in clients.items():
                found[tokens].append(await ask_long(client, number, options.answer))
            print(f"pieces, round {number}: {found_now(found)}", flush=True)
    return {
        "answer_tokens": options.answer,
        **{
            f"backflow_tokens_{tokens}": {
                name: summarise([one[name] for one in rounds]) for name in rounds[0]
            }
            for tokens, rounds in found.items()
        },
    }


def found_now(found: dict[int, list[dict[str, float]]]) -> str:
    return ", ".join(f"{tokens}: {rounds[-1]['tail_s'] * 1e3:.1f} ms" for tokens, rounds in found.items())


async def ask_long(client: httpx.AsyncClient, seed: int, tokens: int) -> dict[str, float]:
    """One streamed answer: times between its tokens, and from its end to the end of the backflow."""
    chooser = random.Random(seed)
    body = {
        "prompt": [chooser.randrange(1000, 40000) for _ in range(PROMPT)],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    arrivals, request = [], ""
    headers = {"x-memserve-trace": "1"}
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                request = request or json.loads(line.removeprefix("data: "))["id"]
                arrivals.append(time.perf_counter())
    at = await times_of(client, request)
    gaps = sorted(after - before for before, after in pairwise(arrivals[2:]))
    return {
        "gap_s_median": statistics.median(gaps),
        "gap_s_p99": gaps[int(0.99 * len(gaps))],
        "gap_s_max": gaps[-1],
        "tail_s": at["mempool.backflow"] - at["server.finish"],
    }


async def times_of(client: httpx.AsyncClient, request: str) -> dict[str, float]:
    """When the request entered each room, once it has left the last one."""
    async with asyncio.timeout(PATIENCE):
        while True:
            entries = (await client.get(f"/v1/traces/{request}")).json()["entries"]
            at = {entry["room"]: entry["at"] for entry in entries}
            if "mempool.backflow" in at and "server.finish" in at:
                return at
            await asyncio.sleep(0.02)


async def measure(options: argparse.Namespace) -> dict[str, object]:
    return {"chats": await measure_chats(options), "pieces": await measure_pieces(options)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sessions", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument(
        "--think", type=float, default=0.3, help="mean seconds between an answer and the next turn"
    )
    parser.add_argument("--answer", type=int, default=768, help="tokens of a long answer")
    options = parser.parse_args()
    figures = asyncio.run(measure(options))
    path = write_result("backflow", {"rounds": options.rounds, **figures})
    print(json.dumps(figures, indent=2))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
