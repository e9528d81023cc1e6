"""A prompt whose prefix lies at a busy instance: an idle one fetches it instead of computing it."""

from __future__ import annotations

import threading

import pytest

from e2e.serving import Served, serving
from e2e.test_failover import Answer, body, read

pytestmark = [pytest.mark.processes, pytest.mark.model]

TRIES = 4
"""Prompts: an instance that was much slower when it measured itself may not be worth a transfer at first."""
MORE = [9000 + 3 * at for at in range(20)]
ANSWER = 200
"""Tokens: long enough that decoding alone is worth the transfer."""


def ledger(answer: Answer) -> dict[str, int]:
    details = answer.usage["prompt_tokens_details"]
    assert isinstance(details, dict)
    found: dict[str, int] = details["memserve"]
    return found


def begin(served: Served, prompt: list[int]) -> threading.Thread:
    """Let an instance decode for a while behind the same prefix; returns when it has begun."""
    streaming = threading.Event()

    def stream() -> None:
        read(served, body(800, [*prompt, *MORE]), lambda _: streaming.set())

    thread = threading.Thread(target=stream)
    thread.start()
    assert streaming.wait(60)
    return thread


def fetches(served: Served) -> float:
    return sum(instance["counters"]["pool_received"] for instance in served.wait_idle().values())


def test_two_instances_work_on_a_prefix_that_one_has_computed() -> None:
    with serving("--colocated", "2", "--policy", "cost", "--threads", "1", "--kv-memory", "256MiB") as served:
        for number in range(TRIES):
            prompt = [2000 + 500 * number + 7 * at for at in range(600)]
            first = read(served, body(ANSWER, prompt))
            served.wait_idle()
            stream = begin(served, prompt)
            again = read(served, body(ANSWER, prompt))
            stream.join(110)
            assert again.texts == first.texts
            assert ledger(again)["computed"] == 8
            # Whichever of the two came to the instance without the prefix has fetched it.
            if fetches(served):
                break
        assert fetches(served) == 1
