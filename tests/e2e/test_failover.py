"""Instances that are killed under running requests: clients get every token once, and the right ones."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
import pytest

from e2e.serving import Served, serving, wait_for

pytestmark = [pytest.mark.processes, pytest.mark.model]

SMALL = ("--threads", "1", "--kv-memory", "192MiB")
PROMPT = [2000 + 7 * at for at in range(600)]


@dataclass
class Answer:
    """What a client has read of a stream so far; ``done`` when it ended as it should."""

    text: str = ""
    events: int = 0
    usage: dict[str, object] = field(default_factory=dict)
    error: str = ""
    done: bool = False


def body(max_tokens: int, tokens: list[int], **more: object) -> dict[str, object]:
    asked: dict[str, object] = {"model": "smollm2-135m", "prompt": tokens, "max_tokens": max_tokens}
    asked |= {"temperature": 0, "ignore_eos": True, "stream": True}
    return asked | {"stream_options": {"include_usage": True}} | more


def read(served: Served, asked: dict[str, object], at: Callable[[Answer], None] = lambda _: None) -> Answer:
    """Stream an answer; ``at`` is called after each event."""
    answer = Answer()
    with httpx.stream("POST", f"{served.url}/v1/completions", json=asked, timeout=110) as stream:
        for line in stream.iter_lines():
            if not line.startswith("data: "):
                answer.error = answer.error or line
                continue
            if line == "data: [DONE]":
                answer.done = True
                break
            event = json.loads(line.removeprefix("data: "))
            answer.error = event.get("error", {}).get("message", "")
            answer.text += "".join(choice["text"] for choice in event.get("choices", ()))
            answer.usage = event.get("usage") or answer.usage
            answer.events += 1
            at(answer)
    return answer


def kill(served: Served, instance: str) -> int:
    entry = served.instances()[instance]
    os.kill(entry["pid"], signal.SIGKILL)
    return int(entry["incarnation"])


def until_back(served: Served, instance: str, incarnation: int) -> None:
    def back() -> bool:
        entry = served.instances()[instance]
        return bool(entry["state"] == "ready" and entry["incarnation"] > incarnation)

    wait_for(back, f"{instance} did not come back", seconds=60)


def after(events: int, act: Callable[[], object]) -> Callable[[Answer], None]:
    """Act once, when so many events have come."""

    def look(answer: Answer) -> None:
        if answer.events == events:
            act()

    return look


def same(found: Answer, expected: Answer) -> None:
    assert (found.error, found.done) == ("", True)
    assert found.text == expected.text
    for name in ("prompt_tokens", "completion_tokens"):
        assert found.usage[name] == expected.usage[name]
    ledger = found.usage["prompt_tokens_details"]["memserve"]  # type: ignore[index]
    assert sum(ledger.values()) == found.usage["prompt_tokens"]


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
def test_a_stream_goes_on_when_the_only_one_of_a_kind_is_killed_and_comes_back(victim: str) -> None:
    with serving(*SMALL) as served:
        expected = read(served, body(120, PROMPT))
        killed: list[int] = []
        found = read(served, body(120, PROMPT), after(30, lambda: killed.append(kill(served, victim))))
        same(found, expected)
        until_back(served, victim, killed[0])
        same(read(served, body(120, PROMPT)), expected)
        served.wait_idle()
