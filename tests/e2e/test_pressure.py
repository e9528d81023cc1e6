"""Many requests, a small pool, clients that leave: answers stay right, ledgers add up, nothing stays held."""

from __future__ import annotations

import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from e2e.serving import Served, serving

pytestmark = [pytest.mark.processes, pytest.mark.model]

WORKERS = 6
REQUESTS = 10
PROMPTS = 12
BLOCK_BYTES = 368_640


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


def resize(served: Served, stop: threading.Event) -> None:
    """Shrink and grow both instances as fast as they can until told to stop, then give all back."""
    sizes = [8 << 20, 200 << 20, 24 << 20, 64 << 20]
    for memory in itertools.chain.from_iterable(itertools.repeat(sizes)):
        for name in ("prefill-0", "decode-0"):
            answer = httpx.put(f"{served.url}/v1/cluster/{name}/memory", json={"device": memory}, timeout=60)
            assert answer.status_code == 200, answer.text
        if stop.is_set() and memory == sizes[-1]:
            return


def test_pools_resized_under_load_lose_no_request_and_change_no_answer() -> None:
    with serving("--kv-memory", "64MiB") as served:
        stop = threading.Event()
        with ThreadPoolExecutor(WORKERS + 1) as threads:
            resizing = threads.submit(resize, served, stop)
            numbers = [number for number in range(PROMPTS) if len(prompt(number)) <= 200] * 4
            found = list(zip(numbers, threads.map(lambda number: ask(served, number), numbers), strict=True))
            stop.set()
            resizing.result(60)
        instances = served.wait_idle()
        assert {entry["blocks"]["total"] for entry in instances.values()} == {(64 << 20) // BLOCK_BYTES}
        expected = {number: ask(served, number) for number in set(numbers)}
        assert [text for _, text in found] == [expected[number] for number, _ in found]
        served.wait_idle()


def test_a_request_that_a_shrunk_pool_cannot_take_is_refused_with_the_remedy() -> None:
    with serving("--colocated", "1", "--kv-memory", "64MiB") as served:
        resized = httpx.put(
            f"{served.url}/v1/cluster/colocated-0/memory", json={"device": 4 << 20}, timeout=60
        )
        assert resized.json()["tiers"][0]["blocks"] == (4 << 20) // BLOCK_BYTES
        long = {"model": "smollm2-135m", "prompt": list(range(1000, 1400)), "max_tokens": 4}
        answer = httpx.post(f"{served.url}/v1/completions", json=long, timeout=60)
        assert answer.status_code == 400
        assert "memory" in answer.json()["error"]["message"]
        missing = httpx.put(f"{served.url}/v1/cluster/other/memory", json={"device": 1}, timeout=60)
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
        none = httpx.put(f"{served.url}/v1/cluster/colocated-0/memory", json={"disk": 1 << 30}, timeout=60)
        assert (none.status_code, none.json()["error"]["param"]) == (400, "disk")
        vast = httpx.put(f"{served.url}/v1/cluster/colocated-0/memory", json={"device": 1 << 44}, timeout=60)
        assert (vast.status_code, vast.json()["error"]["param"]) == (400, "device")
        assert "left" in vast.json()["error"]["message"]
        zero = httpx.put(f"{served.url}/v1/cluster/colocated-0/memory", json={"device": 1}, timeout=60)
        assert (zero.status_code, zero.json()["error"]["param"]) == (400, "device")
