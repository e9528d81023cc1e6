"""Instances that are killed under running requests: clients get every token once, and the right ones."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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

    texts: dict[int, str] = field(default_factory=dict)
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
            for choice in event.get("choices", ()):
                index = choice["index"]
                answer.texts[index] = answer.texts.get(index, "") + choice["text"]
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
    assert found.texts == expected.texts
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


SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 11, "logprobs": 2, "n": 2, "stop": ["zzzz"]}


def test_many_streams_of_a_cluster_in_which_one_after_the_other_is_killed() -> None:
    """During prefill, at a handoff, while decoding."""
    prompts = [[(1000 + 37 * at + 211 * number) % 40000 + 1000 for at in range(200)] for number in range(3)]
    asked = [body(40, tokens) for tokens in prompts] + [body(40, prompts[0], **SAMPLED)]
    with serving("--prefill", "2", "--decode", "2", *SMALL) as served, ThreadPoolExecutor(8) as threads:
        expected = list(threads.map(lambda one: read(served, one), asked))
        at_prefill = [[number + 1 for number in tokens] for tokens in prompts]
        asked += [body(40, tokens) for tokens in at_prefill]
        found = [threads.submit(read, served, one) for one in asked]
        wait_for(lambda: busy(served, "prefill") is not None, "nobody prefills")
        first = busy(served, "prefill") or "prefill-0"
        lives = {first: kill(served, first)}
        at_handoff = after(1, lambda: lives.update({"decode-1": kill(served, "decode-1")}))
        handed_over = threads.submit(read, served, body(60, PROMPT), at_handoff)
        until_back(served, first, lives[first])
        lives["decode-0"] = kill(served, "decode-0")
        answers = [one.result(110) for one in found]
        for one, other in zip(answers, expected, strict=False):
            same(one, other)
        unkilled = handed_over.result(110)
        for instance, incarnation in lives.items():
            until_back(served, instance, incarnation)
        for one, tokens in zip(answers[len(expected) :], at_prefill, strict=True):
            same(one, read(served, body(40, tokens)))
        same(unkilled, read(served, body(60, PROMPT)))
        assert all(entry["blocks"]["active"] == 0 for entry in served.wait_idle().values())


def test_a_stream_outlives_any_number_of_decode_instances_as_long_as_it_gets_on() -> None:
    with serving("--prefill", "1", "--decode", "2", *SMALL) as served:
        expected = read(served, body(150, PROMPT[:100]))
        kills: list[int] = []

        def kill_whoever_decodes(answer: Answer) -> None:
            due = answer.events >= (kills[-1] if kills else 0) + 25
            if due and (runs := busy(served, "decode")) is not None:
                kill(served, runs)
                kills.append(answer.events)

        same(read(served, body(150, PROMPT[:100]), kill_whoever_decodes), expected)
        assert len(kills) >= 4
        served.wait_idle()


def busy(served: Served, kind: str) -> str | None:
    """An instance of a kind that runs something."""
    instances = served.instances().values()
    return next((one["instance"] for one in instances if one["role"] == kind and one["running"]), None)


def test_a_colocated_instance_that_is_killed_hands_its_streams_to_the_other() -> None:
    with serving("--colocated", "2", *SMALL) as served:
        expected = read(served, body(80, PROMPT))

        def kill_whoever_runs() -> None:
            runs = busy(served, "colocated")
            assert runs is not None
            kill(served, runs)

        same(read(served, body(80, PROMPT), after(20, kill_whoever_runs)), expected)
        served.wait_idle()


def test_an_instance_that_is_asked_to_end_finishes_first_and_stays_away() -> None:
    with serving("--prefill", "1", "--decode", "2", *SMALL) as served:
        expected = read(served, body(80, PROMPT[:100]))
        leaving: list[str] = []

        def ask_to_end() -> None:
            runs = busy(served, "decode")
            assert runs is not None
            leaving.append(runs)
            os.kill(served.instances()[runs]["pid"], signal.SIGTERM)
            wait_for(lambda: served.instances()[runs]["state"] == "draining", "it does not say so")

        found = read(served, body(80, PROMPT[:100]), after(10, ask_to_end))
        same(found, expected)
        wait_for(lambda: served.instances()[leaving[0]]["state"] == "left", "it does not end")
        assert not [line for line in served.lines if "moved" in line]
        same(read(served, body(80, PROMPT[:100])), expected)
        assert served.get("/health")["status"] == "ok"
        assert served.instances()[leaving[0]]["state"] == "left"
