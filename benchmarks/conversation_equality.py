"""Claim: whatever is cached or moved, greedy answers are the same, token by token.

Real conversations (ShareGPT) go through HTTP to 1P1D in every row of the phases table, and to a colocated
instance that keeps nothing; several clients at a time, each waiting for its answer. Every answer, with the
log probability of every token, must equal that of the instance that keeps nothing; its ledger must add up.

Pools are small, so that KV is evicted; answers flow back in pieces of one block while they are decoded. Every
other conversation streams.

    python benchmarks/conversation_equality.py --data DIR [--conversations 500] [--clients 6] [--tokens 16]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from memserve.bench.content import Text, render_text
from memserve.bench.sources import Recorded, read_workload
from memserve.bench.target import Target, open_target
from memserve.bench.workload import Session, Workload, compose_prompt
from recording import write_result

ROWS = ("pd-basic", "pd-caching-1", "pd-caching-2", "pd-caching-3")
PLAIN = Target("keeps nothing", None, ("--prefill", "0", "--decode", "0", "--colocated", "1"))
MEMORY = "96MiB"
PATIENCE = 300.0
CONFIG = "[engine]\nbackflow_tokens = 16\n"


@dataclass(frozen=True, slots=True)
class Answer:
    """Tokens as text, their log probabilities, and the ledger of the prompt."""

    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    prompt_tokens: int
    ledger: dict[str, int]


@dataclass(slots=True)
class Run:
    """The answers of one configuration, by conversation and turn."""

    seconds: float = 0.0
    answers: dict[int, list[Answer]] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)


class Client:
    """Asks one server; ``tokens`` bounds each answer."""

    def __init__(self, http: httpx.AsyncClient, tokens: int) -> None:
        self._http = http
        self._tokens = tokens

    async def converse(self, workload: Workload, session: Session, *, stream: bool) -> list[Answer]:
        """All turns of a conversation, each with the answers that were given before."""
        said: list[tuple[Text, ...]] = []
        answers = []
        for turn in session.turns:
            prompt = compose_prompt(workload, session, said)
            messages = [{"role": one.role, "content": render_text(one.content)} for one in prompt]
            text, answer = await self._ask(messages, min(turn.max_tokens, self._tokens), stream=stream)
            answers.append(answer)
            said.append((Text(text),))
        return answers

    async def _ask(
        self, messages: list[dict[str, str]], max_tokens: int, *, stream: bool
    ) -> tuple[str, Answer]:
        body = {
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "logprobs": True,
            "stream": stream,
            "stream_options": {"include_usage": True} if stream else None,
        }
        response = await self._http.post("/v1/chat/completions", json=body)
        if response.status_code != httpx.codes.OK:
            raise SystemExit(f"status {response.status_code}: {response.text}")
        parts = list(read_parts(response.text))
        choices = [choice for part in parts for choice in part["choices"]]
        text = "".join(message_of(choice).get("content") or "" for choice in choices)
        shown = [one for choice in choices for one in (choice["logprobs"] or {}).get("content", [])]
        usage = parts[-1]["usage"]
        return text, Answer(
            tuple(one["token"] for one in shown),
            tuple(one["logprob"] for one in shown),
            usage["prompt_tokens"],
            usage["prompt_tokens_details"]["memserve"],
        )


def read_parts(body: str) -> Iterator[dict]:
    """The one answer, or all chunks of a stream."""
    if not body.startswith("data: "):
        yield json.loads(body)
        return
    for event in body.split("data: ")[1:]:
        if not event.startswith("[DONE]"):
            yield json.loads(event)


def message_of(choice: dict) -> dict:
    return choice.get("message") or choice["delta"]


async def run_target(
    target: Target, workload: Workload, numbers: list[int], clients: int, tokens: int
) -> Run:
    """Have ``clients`` clients hold the conversations ``numbers`` with a server started for it."""
    result, waiting = Run(), list(reversed(numbers))
    async with open_target(target, asyncio.Event()) as url:
        if url is None:
            raise SystemExit(f"{target.name} did not start")
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as http:
            client, started = Client(http, tokens), time.perf_counter()

            async def work() -> None:
                while waiting:
                    number = waiting.pop()
                    session = workload.sessions[number]
                    result.answers[number] = await client.converse(workload, session, stream=number % 2 == 1)

            await asyncio.gather(*(work() for _ in range(clients)))
            result.seconds = time.perf_counter() - started
            cluster = (await http.get("/v1/cluster")).json()
            for instance in cluster["instances"]:
                result.counters.update(
                    {f"{instance['instance']} {name}": value for name, value in instance["counters"].items()}
                )
    return result


def compare(plain: Run, run: Run) -> dict[str, object]:
    """Counts over all answers, and the first few that differ."""
    turns = tokens = equal_tokens = equal_logprobs = exact = 0
    sources: Counter[str] = Counter()
    different = []
    for number, answers in run.answers.items():
        for turn, (ours, theirs) in enumerate(zip(answers, plain.answers[number], strict=True)):
            turns += 1
            tokens += len(theirs.tokens)
            equal_tokens += ours.tokens == theirs.tokens
            equal_logprobs += ours.logprobs == theirs.logprobs
            exact += sum(ours.ledger.values()) == ours.prompt_tokens == theirs.prompt_tokens
            sources.update(ours.ledger)
            if ours.tokens != theirs.tokens:
                different.append(
                    {"conversation": number, "turn": turn, "ours": ours.tokens, "is": theirs.tokens}
                )
    return {
        "conversations": len(run.answers),
        "answers": turns,
        "tokens": tokens,
        "answers_with_equal_tokens": equal_tokens,
        "answers_with_equal_logprobs": equal_logprobs,
        "ledgers_that_add_up": exact,
        "prompt_tokens_by_source": dict(sources),
        "seconds": run.seconds,
        "counters": {name: value for name, value in run.counters.items() if wanted(name)},
        "different": different[:5],
    }


def wanted(counter: str) -> bool:
    names = ("sent_bytes", "spared_bytes", "evicted_blocks", "backflow", "preempted", "handoffs")
    return (
        any(f"pool_{name}" in counter or f" {name}" in counter for name in names) and "_bytes_" not in counter
    )


async def measure(options: argparse.Namespace, config: Path) -> dict[str, object]:
    workload = read_workload(
        Recorded("sharegpt", options.data, options.conversations, options.context, seed=1, think=0.0)
    )
    common = ("--kv-memory", MEMORY, "--context", str(options.context + 64), "--config", str(config))
    rows = [row for row in options.phases.split(",") if row]
    results: dict[str, object] = {}
    for at, row in enumerate(rows):
        numbers = list(range(at, len(workload.sessions), len(rows)))
        plain_target = Target(PLAIN.name, None, (*PLAIN.options, "--phases", "pd-basic", *common))
        roles = ("--prefill", "1", "--decode", "1", "--policy", "prompt-tree")
        target = Target(row, None, (*roles, "--phases", row, *common))
        plain = await run_target(plain_target, workload, numbers, options.clients, options.tokens)
        run = await run_target(target, workload, numbers, options.clients, options.tokens)
        found = results[row] = compare(plain, run) | {"seconds_keeping_nothing": plain.seconds}
        print(
            f"{row:13} {found['conversations']} conversations, {found['answers_with_equal_tokens']} of "
            f"{found['answers']} answers equal ({found['answers_with_equal_logprobs']} in every log "
            f"probability), {found['ledgers_that_add_up']} ledgers add up, {run.seconds:.0f} s",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--conversations", type=int, default=500)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=16, help="longest answer")
    parser.add_argument("--context", type=int, default=384, help="longest conversation, tokens")
    parser.add_argument("--phases", default=",".join(ROWS))
    options = parser.parse_args()
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as config:
        config.write(CONFIG)
        config.flush()
        results = asyncio.run(measure(options, Path(config.name)))
    settings = {name: getattr(options, name) for name in ("conversations", "clients", "tokens", "context")}
    path = write_result("conversation_equality", {**settings, "kv_memory": MEMORY, "phases": results})
    print(f"written to {path}")
    if any(found["different"] for found in results.values()):
        sys.exit("answers differ")


if __name__ == "__main__":
    main()
