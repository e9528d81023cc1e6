"""The ledger of every answer of a mixed run adds up, and metrics, instances and traces tell the same."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from e2e.serving import Served, serving

pytestmark = [pytest.mark.processes, pytest.mark.model, pytest.mark.timeout(300)]

SOURCES = ("computed", "local", "host", "disk", "peer", "backflow")
SESSIONS = 6
TURNS = 3
_METRIC = re.compile(r'^memserve_prompt_tokens_total\{source="(\w+)"\} ([\d.]+)$', re.MULTILINE)


def ask(served: Served, prompt: list[int], *, stream: bool, n: int) -> tuple[dict[str, Any], list[int]]:
    """The usage, and tokens made of what the first choice says, whichever way it came."""
    body = {
        "model": "smollm2-135m",
        "prompt": prompt,
        "max_tokens": 24,
        "temperature": 0,
        "ignore_eos": True,
        "n": n,
        "stream": stream,
        "stream_options": {"include_usage": True} if stream else None,
    }
    headers = {"x-memserve-trace": "1"}
    answer = httpx.post(f"{served.url}/v1/completions", json=body, headers=headers, timeout=110)
    assert answer.status_code == 200, answer.text
    events = [answer.text] if not stream else answer.text.split("data: ")[1:-1]
    read = [json.loads(event) for event in events]
    text = "".join(choice["text"] for each in read for choice in each["choices"] if choice["index"] == 0)
    usage = read[-1]["usage"]
    details = usage["prompt_tokens_details"]
    assert usage["prompt_tokens"] == len(prompt) == sum(details["memserve"].values())
    assert details["cached_tokens"] == len(prompt) - details["memserve"]["computed"] < len(prompt)
    assert traced(served, read[0]["id"]) == details["memserve"]
    return usage, [ord(char) % 1000 + 1000 for char in text[:20]]


def traced(served: Served, request: str) -> dict[str, int]:
    entries = served.get(f"/v1/traces/{request}")["entries"]
    (ledger,) = [entry["ledger"] for entry in entries if "ledger" in entry]
    return dict(ledger)


def converse(served: Served, session: int) -> Counter[str]:
    """A session of several turns; some begin like others. What all its ledgers say together."""
    chooser = random.Random(session)
    shared = random.Random(session % 2)
    prompt = [shared.randrange(1000, 40000) for _ in range(120)]
    total: Counter[str] = Counter()
    for turn in range(TURNS):
        prompt += [chooser.randrange(1000, 40000) for _ in range(chooser.choice((7, 60, 150)))]
        usage, said = ask(served, prompt, stream=(session + turn) % 2 == 0, n=1 + (session + turn) % 3 // 2)
        total.update(usage["prompt_tokens_details"]["memserve"])
        prompt += said
    return total


def metered(served: Served) -> dict[str, int]:
    text = httpx.get(f"{served.url}/metrics", timeout=30).text
    return {source: int(float(value)) for source, value in _METRIC.findall(text)}


@pytest.mark.parametrize(
    "options",
    [
        ("--kv-memory", "24MiB", "--host-memory", "64MiB"),
        ("--kv-memory", "64MiB", "--phases", "pd-basic"),
        ("--kv-memory", "16MiB", "--colocated", "1"),
    ],
    ids=["disaggregated in a small pool", "without caching", "colocated in a small pool"],
)
def test_every_ledger_adds_up_and_all_tell_the_same(options: tuple[str, ...]) -> None:
    with serving("--context", "640", *options) as served:
        with ThreadPoolExecutor(SESSIONS) as threads:
            totals = sum(threads.map(lambda at: converse(served, at), range(SESSIONS)), Counter())
        assert metered(served) == {source: totals[source] for source in SOURCES}
        # An instance counts each choice of a request, the answer only the first of each prompt.
        instances = served.wait_idle().values()
        counted = {
            source: sum(entry["counters"][f"prompt_tokens_{source}"] for entry in instances)
            for source in SOURCES
        }
        assert all(counted[source] >= totals[source] for source in SOURCES)
        if "pd-basic" in options:
            assert totals.keys() - {source for source in SOURCES if not totals[source]} == {"computed"}


def test_a_turn_counts_what_flowed_back_from_the_last() -> None:
    with serving() as served:
        text = "Once upon a time there was a lighthouse keeper who counted ships. " * 12
        first, answer = complete(served, text)
        served.wait_idle()
        second, _ = complete(served, text + answer + " And then, one day,")
        ledger = second["prompt_tokens_details"]["memserve"]
        assert ledger["local"] == first["prompt_tokens"] // 16 * 16
        # The last token of an answer has no KV, and text may be cut into other tokens than were sampled.
        most = (first["prompt_tokens"] + first["completion_tokens"] - 1) // 16 * 16 - ledger["local"]
        assert 16 <= ledger["backflow"] <= most
        assert sum(ledger.values()) == second["prompt_tokens"]


def complete(served: Served, text: str) -> tuple[dict[str, Any], str]:
    body = {"model": "smollm2-135m", "prompt": text, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=110)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"], str(answer.json()["choices"][0]["text"])
