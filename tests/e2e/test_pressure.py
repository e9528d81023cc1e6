"""Many requests, a small pool, clients that leave: answers stay right, ledgers add up, nothing stays held."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from e2e.serving import Served, serving

pytestmark = [pytest.mark.processes, pytest.mark.model]

WORKERS = 6
REQUESTS = 10
PROMPTS = 12


def prompt(number: int) -> list[int]:
    chooser = random.Random(number)
    return [chooser.randrange(1000, 40000) for _ in range(chooser.choice((5, 40, 200, 500)))]


def body(number: int, max_tokens: int, *, stream: bool = False) -> dict[str, object]:
    return {
        "model": "smollm2-135m",
        "prompt": prompt(number),
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": stream,
    }


def ask(served: Served, number: int) -> str:
    answer = httpx.post(f"{served.url}/v1/completions", json=body(number, 12), timeout=110)
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    assert sum(usage["prompt_tokens_details"]["memserve"].values()) == usage["prompt_tokens"]
    return str(answer.json()["choices"][0]["text"])


def leave(served: Served, number: int, after: int) -> None:
    content = body(number, 400, stream=True)
    with httpx.stream("POST", f"{served.url}/v1/completions", json=content, timeout=110) as answer:
        for at, _ in enumerate(answer.iter_lines()):
            if at >= after:
                return


def work(served: Served, worker: int) -> list[tuple[int, str]]:
    chooser, answers = random.Random(worker), []
    for _ in range(REQUESTS):
        number = chooser.randrange(PROMPTS)
        if chooser.random() < 0.3:
            leave(served, number, chooser.randrange(8))
        else:
            answers.append((number, ask(served, number)))
    return answers


def test_a_small_pool_under_load_with_leaving_clients() -> None:
    with serving("--kv-memory", "32MiB") as served:
        with ThreadPoolExecutor(WORKERS) as threads:
            found = [
                pair for pairs in threads.map(lambda at: work(served, at), range(WORKERS)) for pair in pairs
            ]
        instances = served.wait_idle()
        assert all(entry["counters"]["pool_evicted_blocks"] > 0 for entry in instances.values())
        expected = {number: ask(served, number) for number in {number for number, _ in found}}
        assert [text for _, text in found] == [expected[number] for number, _ in found]
        served.wait_idle()
