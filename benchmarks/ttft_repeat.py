"""Claim: a repeated 1,500-token prompt is answered at least 8 times faster than a cold one, at 1P1D.

Starts ``memserve serve`` as a user would and asks for a fresh random prompt, then for the same again, in
turn. TTFT is seen by the client: from sending the HTTP request to the first streamed text. Prompts are token
ids, so tokenising costs nothing in either case.

    python benchmarks/ttft_repeat.py [--pairs 10] [--tokens 1500]
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from recording import summarise, write_result

MODEL = "smollm2-135m"
BLOCK = 16
VOCABULARY = 49152
_URL = re.compile(r"http://127\.0\.0\.1:\d+")


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds to the first token and to the end; prompt tokens that were cached."""

    ttft: float
    total: float
    cached: int


@contextmanager
def served() -> Iterator[str]:
    """The base URL of a server with its default settings."""
    command = [sys.executable, "-m", "memserve.cli", "serve", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        yield next(found[0] for found in map(_URL.search, process.stdout) if found)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


def ask(client: httpx.Client, prompt: list[int]) -> Answer:
    body = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": 4,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    ttft, usage = 0.0, {}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            ttft = ttft or time.perf_counter() - started
            usage = event.get("usage") or usage
    return Answer(ttft, time.perf_counter() - started, usage["prompt_tokens_details"]["cached_tokens"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=1500)
    options = parser.parse_args()
    chooser = random.Random(7)
    pairs: list[tuple[Answer, Answer]] = []
    with served() as url, httpx.Client(base_url=url, timeout=120) as client:
        ask(client, [5] * 64)
        for _ in range(options.pairs):
            prompt = [chooser.randrange(1000, VOCABULARY) for _ in range(options.tokens)]
            cold, warm = ask(client, prompt), ask(client, prompt)
            assert cold.cached < BLOCK * 2, f"a fresh prompt was cached: {cold}"
            assert warm.cached == (options.tokens - 1) // BLOCK * BLOCK, f"not all was cached: {warm}"
            pairs.append((cold, warm))
            print(f"cold {cold.ttft * 1e3:7.1f} ms   repeat {warm.ttft * 1e3:6.1f} ms", flush=True)
    ratio = summarise([cold.ttft / warm.ttft for cold, warm in pairs])
    figures = {
        "prompt_tokens": options.tokens,
        "pairs": options.pairs,
        "cold_ttft_s": summarise([cold.ttft for cold, _ in pairs]),
        "repeat_ttft_s": summarise([warm.ttft for _, warm in pairs]),
        "cold_over_repeat": ratio,
    }
    path = write_result("ttft_repeat", figures)
    print(f"a repeat is {ratio['median']:.1f} times faster (target: 8); written to {path}")


if __name__ == "__main__":
    main()
