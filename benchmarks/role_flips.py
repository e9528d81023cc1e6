"""Roles that change every few seconds under load: failed turns, hit rate, answers against a steady run.

One prefill, one decode and one colocated instance of the real model serve multi-turn chats (ShareGPT) in a
closed loop. First a run in which all keep their roles, then one on a fresh server in which one changes every
--every seconds. Turns contain the recorded answers, so both runs send the same prompts, and greedy answers to
the same turn must be equal.

    python benchmarks/role_flips.py --data DIR [--seconds 180] [--every 10] [--concurrency 4] [--context 768]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import httpx

from memserve.bench.client import Asking, OpenAIClient
from memserve.bench.load import run_load
from memserve.bench.records import Record, Round, Sources
from memserve.bench.sources import Recorded, read_workload
from memserve.bench.target import Target, open_target
from memserve.bench.timeline import Pace, Timeline
from memserve.bench.workload import Endpoint, Workload
from recording import write_result

OPTIONS = (
    "--prefill",
    "1",
    "--decode",
    "1",
    "--colocated",
    "1",
    "--threads",
    "1",
    "--kv-memory",
    "768MiB",
    "--policy",
    "prompt-tree",
)
SESSIONS = 2000  # more than a run gets through
ANSWER_SECONDS = 300.0
FLIPS = (
    ("prefill-0", "decode"),
    ("decode-0", "prefill"),
    ("colocated-0", "decode"),
    ("prefill-0", "colocated"),
    ("decode-0", "decode"),
    ("prefill-0", "prefill"),
    ("colocated-0", "colocated"),
)


@dataclass(frozen=True, slots=True)
class Flip:
    """A change of roles: when it was asked for (s since the load began), and how long it took."""

    at: float
    instance: str
    role: str
    seconds: float


@dataclass(slots=True)
class Flipper:
    """Changes one role after the other, ``every`` seconds."""

    url: str
    every: float
    done: list[Flip] = field(default_factory=list)

    async def run(self) -> None:
        clock = asyncio.get_running_loop().time
        started = clock()
        async with httpx.AsyncClient(base_url=self.url, timeout=60, trust_env=False) as http:
            for instance, role in cycle(FLIPS):
                await asyncio.sleep(self.every)
                asked = clock()
                answer = await http.put(f"/v1/cluster/{instance}/role", json={"role": role})
                answer.raise_for_status()
                self.done.append(Flip(asked - started, instance, role, clock() - asked))


class Silent:
    """Nobody watches."""

    def turn_ended(self, record: Record) -> None: ...


async def measure(
    workload: Workload, options: argparse.Namespace, every: float | None
) -> tuple[Round, list[Flip]]:
    """One run on a server of its own; without ``every`` all instances keep their roles."""
    stop = asyncio.Event()
    async with open_target(Target("mixed", None, OPTIONS), stop) as url, OpenAIClient(url or "") as client:
        assert url is not None
        model = (await client.models()).data[0].id
        asking = Asking(Endpoint.CHAT, True, model, timeout=ANSWER_SECONDS)
        timeline = Timeline(workload, Pace(concurrency=options.concurrency), options.seed, real_answers=False)
        flipper = Flipper(url, every or 0.0)
        flipping = asyncio.create_task(flipper.run()) if every else None
        measured = await run_load(
            client,
            asking,
            timeline,
            number=0,
            turns=workload.turns,
            stop=stop,
            duration=options.seconds,
            progress=Silent(),
        )
        if flipping is not None:
            bug = flipping.exception() if flipping.done() else None
            flipping.cancel()
            await asyncio.gather(flipping, return_exceptions=True)
            if bug is not None:
                raise bug
        return measured, flipper.done


def hit_rate(records: Sequence[Record]) -> float:
    """Share of prompt tokens whose KV was there already."""
    total = sum((record.sources for record in records), Sources())
    return total.reused / total.total if total.total else 0.0


def describe(measured: Round) -> dict[str, object]:
    """Failures, hit rates and times of one run."""
    answered = [record for record in measured.records if not record.error]
    later = [record for record in answered if record.turn > 0]
    sources = sum((record.sources for record in answered), Sources())
    return {
        "seconds": measured.seconds,
        "answered": len(answered),
        "failed": len(measured.records) - len(answered),
        "errors": sorted({record.error for record in measured.records if record.error}),
        "ledgers_exact": all(record.exact for record in answered),
        "hit_rate": hit_rate(answered),
        "hit_rate_later_turns": hit_rate(later),
        "tokens": {name: getattr(sources, name) for name in ("computed", "local", "peer", "backflow")},
        "ttft_median": statistics.median(record.ttft for record in answered),
        "jct_median": statistics.median(record.jct for record in answered),
    }


def compare_answers(first: Round, second: Round) -> dict[str, int]:
    """How many turns both runs answered, and how many of these answers are equal."""
    known = {(record.session, record.turn): record.answer for record in first.records if not record.error}
    pairs = [
        (known[record.session, record.turn], record.answer)
        for record in second.records
        if not record.error and (record.session, record.turn) in known
    ]
    return {"compared": len(pairs), "equal": sum(one == other for one, other in pairs)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with sharegpt/conversations.json")
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--every", type=float, default=10.0)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--context", type=int, default=768)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file instead of results/role_flips.json")
    options = parser.parse_args()
    asked = Recorded("sharegpt", options.data, SESSIONS, options.context, options.seed, think=0.0)
    workload = read_workload(asked)
    steady, _ = asyncio.run(measure(workload, options, None))
    flipped, flips = asyncio.run(measure(workload, options, options.every))
    before = [record for record in flipped.records if not record.error and record.ended < options.every]
    figures: dict[str, object] = {
        "concurrency": options.concurrency,
        "context": options.context,
        "every": options.every,
        "steady": describe(steady),
        "flips": describe(flipped),
        "hit_rate_before_the_first_flip": hit_rate(before),
        "changes": len(flips),
        "change_seconds": {
            "median": statistics.median(flip.seconds for flip in flips),
            "max": max(flip.seconds for flip in flips),
        },
        "answers": compare_answers(steady, flipped),
    }
    path = write_result("role_flips", figures, options.output)
    print(path.read_text())


if __name__ == "__main__":
    main()
