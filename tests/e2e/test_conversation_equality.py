"""A dozen conversations at once through 1P1D: every token is that of an instance that keeps nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from e2e.serving import Served, serving
from memserve.core.config import PHASES

pytestmark = [pytest.mark.processes, pytest.mark.model, pytest.mark.timeout(300)]

SUBJECTS = ("lighthouses", "bread", "the moon", "chess", "rivers", "glass")
QUESTIONS = (
    "Tell me about {}.",
    "Why is that? Explain it to a child.",
    "Now say it once more in one sentence.",
)
CLIENTS = 6
Tokens = list[tuple[str, float]]


def converse(served: Served, number: int) -> list[Tokens]:
    """The tokens and log probabilities of three answers, each of which follows from those before."""
    system = f"You are helper number {number % 2}, and you answer briefly and kindly. " * 4
    messages = [{"role": "system", "content": system}]
    answers = []
    for question in QUESTIONS:
        subject = SUBJECTS[number % len(SUBJECTS)]
        messages.append({"role": "user", "content": question.format(subject)})
        body = {"messages": messages, "max_tokens": 20, "temperature": 0, "logprobs": True}
        answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=110)
        assert answer.status_code == 200, answer.text
        (choice,), usage = answer.json()["choices"], answer.json()["usage"]
        assert sum(usage["prompt_tokens_details"]["memserve"].values()) == usage["prompt_tokens"]
        answers.append(tokens_of(choice))
        messages.append({"role": "assistant", "content": choice["message"]["content"]})
    return answers


def tokens_of(choice: dict[str, Any]) -> Tokens:
    return [(one["token"], one["logprob"]) for one in choice["logprobs"]["content"]]


def hold_conversations(*options: str) -> list[list[Tokens]]:
    with (
        serving("--kv-memory", "64MiB", "--context", "512", *options) as served,
        ThreadPoolExecutor(CLIENTS) as threads,
    ):
        found = list(threads.map(partial(converse, served), range(2 * len(SUBJECTS))))
        served.wait_idle()
    return found


@pytest.fixture(scope="module")
def expected() -> list[list[Tokens]]:
    return hold_conversations("--colocated", "1", "--phases", "pd-basic")


@pytest.mark.parametrize("phases", [row for row in PHASES if row != "colocated"])
def test_every_token_is_the_same(phases: str, expected: list[list[Tokens]], tmp_path: Path) -> None:
    config = tmp_path / "memserve.toml"
    config.write_text("[engine]\nbackflow_tokens = 16\n")
    assert hold_conversations("--phases", phases, "--config", str(config)) == expected
