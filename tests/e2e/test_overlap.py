"""Real processes and the real model: the answers are the same where hand-overs overlap with prefill."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from e2e.serving import Served, serving, wait_for

pytestmark = [pytest.mark.processes, pytest.mark.model]

PROMPT = [random.Random(1).randrange(1000, 40_000) for _ in range(1300)]
"""Three chunks of a step's 512 tokens."""


@pytest.fixture(scope="module")
def expected() -> list[str]:
    with serving("--colocated", "1", "--prefill", "0", "--decode", "0", "--phases", "colocated") as served:
        return [ask(served, prompt)["choices"][0]["text"] for prompt in turns()]


def turns() -> tuple[list[int], list[int]]:
    return PROMPT, [*PROMPT, *PROMPT[:300]]


def ask(served: Served, prompt: list[int]) -> dict[str, Any]:
    body = {
        "model": "smollm2-135m",
        "prompt": prompt,
        "max_tokens": 24,
        "temperature": 0,
        "ignore_eos": True,
    }
    headers = {"x-memserve-trace": "1"}
    answer = httpx.post(f"{served.url}/v1/completions", json=body, headers=headers, timeout=110)
    assert answer.status_code == 200, answer.text
    read: dict[str, Any] = answer.json()
    return read


def handed_over(served: Served, request: str) -> str:
    """What the trace says of the hand-over, once P has heard that it is done."""

    def events() -> list[str]:
        entries = served.get(f"/v1/traces/{request}")["entries"]
        return [entry["event"] for entry in entries if entry["room"] == "mempool.transfer"]

    wait_for(lambda: bool(events()), "the hand-over was not traced")
    return events()[0]


@pytest.mark.parametrize(
    ("way", "mode"),
    [("layers", "by_layer"), ("chunks", "by_request_aggregated")],
)
def test_answers_are_those_of_one_instance(way: str, mode: str, expected: list[str], tmp_path: Path) -> None:
    config = tmp_path / "memserve.toml"
    config.write_text(f'[engine]\noverlap = "{way}"\n')
    with serving("--config", str(config)) as served:
        answers = [ask(served, prompt) for prompt in turns()]
        assert [answer["choices"][0]["text"] for answer in answers] == expected
        told = "whole" if way == "chunks" else way
        for answer in answers:
            event = handed_over(served, answer["id"])
            assert f"overlap {told}," in event
            assert mode in event
        instances = served.wait_idle()
        (prefill,) = (one for one in instances.values() if one["role"] == "prefill")
        assert prefill["counters"][f"handoffs_{told}"] == 2
        assert prefill["counters"][f"pool_sent_transfers_shm_{mode}"] >= 2
        assert (prefill["counters"]["handoff_blocks_ahead"] > 0) == (way == "chunks")
