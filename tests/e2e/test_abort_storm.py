"""Clients that leave, stop strings, limits and deadlines by the hundred: nothing stays held anywhere."""

from __future__ import annotations

import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from e2e.serving import Served, serving

pytestmark = [pytest.mark.processes, pytest.mark.model, pytest.mark.timeout(300)]

WORKERS = 8
REQUESTS = 8
DEADLINE = "3"


def body(chooser: random.Random, **more: object) -> dict[str, object]:
    shared = random.Random(chooser.randrange(4))
    prompt = [shared.randrange(1000, 40000) for _ in range(chooser.choice((5, 100, 400)))]
    prompt += [chooser.randrange(1000, 40000) for _ in range(chooser.choice((0, 3, 90)))]
    return {"model": "smollm2-135m", "prompt": prompt, "temperature": 0, "max_tokens": 120} | more


def leave_a_stream(url: str, chooser: random.Random) -> str:
    asked, after = body(chooser, stream=True, n=chooser.choice((1, 2))), chooser.randrange(12)
    with httpx.stream("POST", url, json=asked, timeout=60) as answer:
        for at, _ in enumerate(answer.iter_lines()):
            if at >= after:
                break
    return "left a stream"


def leave_an_answer(url: str, chooser: random.Random) -> str:
    patience = httpx.Timeout(60, read=chooser.choice((0.005, 0.05, 0.3)))
    try:
        httpx.post(url, json=body(chooser, ignore_eos=True), timeout=patience)
    except httpx.ReadTimeout:
        return "left an answer"
    return "was answered"


def stop_early(url: str, chooser: random.Random) -> str:
    stop = [chr(code) for code in (101, 32, 97)]
    return reason_of(httpx.post(url, json=body(chooser, stop=stop, ignore_eos=True), timeout=60))


def ask_for_little(url: str, chooser: random.Random) -> str:
    limit = chooser.choice((1, 2, 20))
    return reason_of(httpx.post(url, json=body(chooser, max_tokens=limit, ignore_eos=True), timeout=60))


def miss_the_deadline(url: str, chooser: random.Random) -> str:
    prompt = [chooser.randrange(1000, 40000) for _ in range(50)]
    asked = body(chooser, prompt=prompt, max_tokens=900, ignore_eos=True, stream=chooser.random() < 0.5)
    return reason_of(httpx.post(url, json=asked, timeout=60))


def reason_of(answer: httpx.Response) -> str:
    """How it ended: a finish reason or an error's code."""
    events = answer.text.split("data: ")[1:] or [answer.text]
    read: list[dict[str, Any]] = [json.loads(event) for event in events if not event.startswith("[DONE]")]
    if "error" in read[-1]:
        return str(read[-1]["error"]["code"])
    return str(read[-1]["choices"][0]["finish_reason"])


KINDS = (leave_a_stream, leave_an_answer, stop_early, ask_for_little)


def work(served: Served, worker: int) -> Counter[str]:
    chooser, url = random.Random(worker), f"{served.url}/v1/completions"
    found = Counter([miss_the_deadline(url, chooser)]) if worker < 2 else Counter()
    for _ in range(REQUESTS):
        found[chooser.choice(KINDS)(url, chooser)] += 1
    return found


@pytest.mark.parametrize("phases", ["pd-basic", "pd-caching-3", "colocated"])
def test_after_a_storm_every_block_is_free_or_cached(phases: str) -> None:
    where = ("--colocated", "1") if phases == "colocated" else ()
    small = ("--kv-memory", "48MiB", "--context", "1024", "--request-timeout", DEADLINE)
    with serving(*where, "--phases", phases, *small) as served:
        with ThreadPoolExecutor(WORKERS) as threads:
            found = sum(threads.map(lambda at: work(served, at), range(WORKERS)), Counter())
        assert found.keys() >= {"left a stream", "left an answer", "stop", "length", "request_timeout"}
        for entry in served.wait_idle().values():
            blocks, counters = entry["blocks"], entry["counters"]
            assert blocks["free"] + blocks["historical"] == blocks["total"]
            assert [counters[f"pool_{name}"] for name in ("leases", "lent", "pinned")] == [0, 0, 0]
        # Both pools check themselves when they stop; ``serving`` looks for what they complain about.
        assert served.stop() == 0
