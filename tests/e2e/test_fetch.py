"""A prompt whose prefix lies at a busy instance: an idle one fetches it instead of computing it."""

from __future__ import annotations

import threading

import pytest

from e2e.serving import Served, serving, wait_for
from e2e.test_failover import Answer, body, read

pytestmark = [pytest.mark.processes, pytest.mark.model]

PROMPT = [2000 + 7 * at for at in range(600)]
OTHER = [9000 + 3 * at for at in range(100)]


def ledger(answer: Answer) -> dict[str, int]:
    details = answer.usage["prompt_tokens_details"]
    assert isinstance(details, dict)
    found: dict[str, int] = details["memserve"]
    return found


def begin(served: Served, streaming: threading.Event) -> threading.Thread:
    """Let one instance decode for a while; ``streaming`` is set when it has begun."""

    def stream() -> None:
        read(served, body(1500, OTHER), lambda _: streaming.set())

    thread = threading.Thread(target=stream)
    thread.start()
    return thread


def test_an_idle_instance_fetches_what_a_busy_one_holds() -> None:
    with serving("--colocated", "2", "--policy", "cost", "--threads", "1", "--kv-memory", "192MiB") as served:
        first = read(served, body(20, PROMPT))
        served.wait_idle()
        streaming = threading.Event()
        busy = begin(served, streaming)
        assert streaming.wait(60)
        wait_for(lambda: served.instances()["colocated-0"]["running"] == 1, "the other one is streaming")
        again = read(served, body(20, PROMPT))
        busy.join(110)
        assert again.texts == first.texts
        assert ledger(again)["peer"] == 592
        assert ledger(again)["computed"] == 8
        assert served.instances()["colocated-1"]["counters"]["pool_received"] == 37
        served.wait_idle()
