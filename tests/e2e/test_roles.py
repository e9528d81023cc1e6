"""Roles that change under load: no request fails, no answer changes, what was cached stays cached."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from e2e.serving import Served, serving

pytestmark = [pytest.mark.processes, pytest.mark.model]

MIXED = ("--prefill", "1", "--decode", "1", "--colocated", "1", "--threads", "1", "--kv-memory", "192MiB")
FLIPS = (
    ("prefill-0", "decode"),
    ("decode-0", "prefill"),
    ("colocated-0", "decode"),
    ("prefill-0", "colocated"),
    ("decode-0", "decode"),
    ("prefill-0", "prefill"),
)
WORKERS = 4
PROMPTS = 10
REQUESTS = 96


def prompt(number: int) -> list[int]:
    chooser = random.Random(number)
    return [chooser.randrange(1000, 40000) for _ in range(chooser.choice((5, 40, 120, 300)))]


def complete(served: Served, tokens: list[int], max_tokens: int = 12) -> dict[str, object]:
    body = {"model": "smollm2-135m", "prompt": tokens, "max_tokens": max_tokens, "temperature": 0}
    answer = httpx.post(f"{served.url}/v1/completions", json=body | {"ignore_eos": True}, timeout=110)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def text_of(answer: dict[str, object]) -> str:
    return str(answer["choices"][0]["text"])  # type: ignore[index]


def ledger_of(answer: dict[str, object]) -> dict[str, int]:
    usage = answer["usage"]
    ledger = usage["prompt_tokens_details"]["memserve"]  # type: ignore[index]
    assert sum(ledger.values()) == usage["prompt_tokens"]  # type: ignore[index]
    return dict(ledger)


def set_role(served: Served, instance: str, role: str) -> httpx.Response:
    return httpx.put(f"{served.url}/v1/cluster/{instance}/role", json={"role": role}, timeout=30)


def flip(served: Served, answered: threading.Semaphore) -> None:
    """Change a role after every twelfth answer."""
    for instance, role in FLIPS:
        for _ in range(REQUESTS // (len(FLIPS) + 2)):
            assert answered.acquire(timeout=60), "no request is answered"
        changed = set_role(served, instance, role)
        assert changed.status_code == 200, changed.text
        assert served.instances()[instance]["role"] == role


def test_roles_that_change_under_load_fail_no_request_and_change_no_answer() -> None:
    chooser = random.Random(5)
    numbers = [chooser.randrange(PROMPTS) for _ in range(REQUESTS)]
    with serving(*MIXED) as served, ThreadPoolExecutor(WORKERS + 1) as threads:
        answered = threading.Semaphore(0)

        def ask(number: int) -> str:
            answer = complete(served, prompt(number))
            ledger_of(answer)
            answered.release()
            return text_of(answer)

        flipping = threads.submit(flip, served, answered)
        found = list(threads.map(ask, numbers))
        flipping.result(60)
        served.wait_idle()
    with serving("--colocated", "1", "--kv-memory", "192MiB") as served:
        expected = {number: text_of(complete(served, prompt(number))) for number in set(numbers)}
    assert found == [expected[number] for number in numbers]


@pytest.fixture(scope="module")
def swapped() -> Iterator[tuple[Served, list[int]]]:
    """Prefill and decode have changed places after a prompt of 300 tokens and an answer of 20."""
    tokens = [2000 + 7 * at for at in range(300)]
    with serving("--kv-memory", "192MiB") as served:
        complete(served, tokens, 20)
        served.wait_idle()
        for instance, role in (("decode-0", "colocated"), ("prefill-0", "decode"), ("decode-0", "prefill")):
            changed = set_role(served, instance, role)
            assert (changed.status_code, changed.json()["role"]) == (200, role), changed.text
        yield served, tokens


def test_what_was_cached_before_a_change_is_found_after_it(swapped: tuple[Served, list[int]]) -> None:
    served, tokens = swapped
    assert ledger_of(complete(served, tokens, 4))["computed"] < 300 % 16 + 16
    [tree] = served.get("/v1/cluster")["trees"]
    assert tree["tokens"] >= 2 * 288, "one of the two is believed to hold less than it does"


def test_answers_flow_back_to_whoever_prefills_now(swapped: tuple[Served, list[int]]) -> None:
    served, _ = swapped
    first = [3000 + 11 * at for at in range(100)]
    complete(served, first, 60)
    served.wait_idle()
    [attempt] = served.get(f"/v1/cluster/why/{complete(served, first[:40], 1)['id']}")["attempts"]
    assert attempt["decision"]["prefill"] == "decode-0"
    received = served.instances()["decode-0"]["counters"]["pool_received"]
    assert received >= 1
    complete(served, [number + 1 for number in first], 60)
    served.wait_idle()
    assert served.instances()["decode-0"]["counters"]["pool_received"] > received


@pytest.mark.parametrize(
    ("instance", "role", "status", "remedy"),
    [
        ("other", "decode", 404, "decode-0"),
        ("decode-0", "both", 400, "colocated"),
        ("decode-0", "decode", 409, "colocated first"),
        ("decode-0", "prefill", 200, ""),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(
    swapped: tuple[Served, list[int]], instance: str, role: str, status: int, remedy: str
) -> None:
    served, _ = swapped
    answer = set_role(served, instance, role)
    assert answer.status_code == status
    assert remedy in answer.text
