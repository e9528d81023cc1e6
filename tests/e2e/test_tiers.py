"""KV below the device: found in host memory when the device was too small, and on disk after a restart."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from e2e.serving import Served, serving

pytestmark = [pytest.mark.processes, pytest.mark.model]


def prompt(seed: int) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randrange(1000, 40000) for _ in range(400)]


def ask(served: Served, seed: int) -> tuple[str, dict[str, Any], str]:
    """The answer's text, where its prompt came from, and its id."""
    body = {"model": "smollm2-135m", "prompt": prompt(seed), "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=110)
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    ledger = usage["prompt_tokens_details"]["memserve"]
    assert sum(ledger.values()) == usage["prompt_tokens"]
    served.wait_idle()
    return answer.json()["choices"][0]["text"], ledger, answer.json()["id"]


def planned(served: Served, answer: str) -> dict[str, Any]:
    """The place where it was prefilled, as the scheduler saw it when it decided."""
    [attempt] = served.get(f"/v1/cluster/why/{answer}")["attempts"]
    [chosen] = [one for one in attempt["prefill_candidates"] if one["chosen"]]
    assert isinstance(chosen, dict)
    return chosen


def test_what_the_device_has_no_room_for_is_found_in_host_memory() -> None:
    # The device holds one and a half of these prompts, the host all of them.
    with serving("--kv-memory", "16MiB", "--host-memory", "64MiB", "--context", "512") as served:
        cold = [ask(served, seed) for seed in range(4)]
        warm = [ask(served, seed) for seed in range(4)]
        plans = [planned(served, answer) for *_, answer in cold + warm]
    assert [text for text, *_ in warm] == [text for text, *_ in cold]
    assert all(ledger["computed"] == 400 for _, ledger, _ in cold)
    assert all(ledger["computed"] == 16 for _, ledger, _ in warm)
    assert sum(ledger["host"] for _, ledger, _ in warm) >= 3 * 384 // 2
    assert all(plan["matched_tokens"] == 400 for plan in plans[4:])
    # What came from the host was planned to, and nothing else.
    found = [ledger["host"] > 0 for _, ledger, _ in cold + warm]
    assert [0 < plan["swap"] < plan["prefill"] for plan in plans] == found


def test_a_restart_finds_the_cache_on_disk(tmp_path: Path) -> None:
    options = ("--disk", str(tmp_path), "--disk-memory", "64MiB", "--kv-memory", "32MiB", "--context", "512")
    with serving(*options) as served:
        cold, *_ = ask(served, 1)
    with serving(*options) as served:
        warm, ledger, _ = ask(served, 1)
    assert warm == cold
    assert ledger["disk"] == 384
