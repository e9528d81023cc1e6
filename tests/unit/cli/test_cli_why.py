"""``memserve why`` against the stand-in backend, and what it prints of a whole explanation."""

from __future__ import annotations

import io
import json
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from memserve.cli.app import app
from memserve.cli.why import show_why
from memserve.core.types import InstanceId, RequestId, Role
from memserve.scheduler.decision import Decision
from memserve.scheduler.hindsight import Hindsight, Outcome
from memserve.scheduler.history import Explanation
from memserve.scheduler.record import Candidate
from memserve.server.why import WhyBody

P0, P1, D0 = InstanceId("prefill-0"), InstanceId("p[1]"), InstanceId("decode-0")
DECISION = Decision(
    RequestId("cmpl-1"), P0, D0, "cost", 12_345, 48, 0, 1.0, "prefill on prefill-0: why [not]", 2.5, 2.0
)
PREFILL = (
    Candidate(P1, Role.COLOCATED, 0, 777, 1, 0, False, 3.25, 0.0, 4.5, 9.125),
    Candidate(P0, Role.PREFILL, 48, 5, 0, 0, True, 0.5, 0.0, 2.0, 4.25),
)
DECODE = (Candidate(D0, Role.DECODE, 16, 900, 2, 900, True, None, 0.125, None, 1.75),)
BEST = Hindsight(P1, False, 0.25, False, 32, 0.0, 1.5, 1.75, None)
CHOSEN = Hindsight(P0, True, 0.5, False, 16, 0.0, 2.25, 2.75, None)


def shown(*attempts: Explanation, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    for line in show_why(WhyBody("cmpl-1", attempts)):
        console.print(line)
    return console.export_text()


def outcome(regret: float, *places: Hindsight) -> Outcome:
    best = P1 if regret else P0
    return Outcome(3.0, 16, 0.1667, 0.25, regret, regret / 2, best, places)


@pytest.mark.parametrize("by", ["id", "x-request-id"])
def test_why_by_either_id(runner: CliRunner, server: Any, by: str) -> None:
    headers = {"authorization": "Bearer key", "x-request-id": "mine/1"}
    sent = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}, headers=headers, trust_env=False)
    answer = sent.json()["id"]
    asked = ["why", answer if by == "id" else "mine/1", "--url", server.url, "--api-key", "key"]
    told = runner.invoke(app, asked)
    assert told.exit_code == 0, told.stderr
    assert answer in told.stdout
    assert "there is no other" in told.stdout
    body = json.loads(runner.invoke(app, [*asked, "--json"]).stdout)
    assert (body["id"], len(body["attempts"])) == (answer, 1)


def test_why_of_an_unknown_request_is_explained(runner: CliRunner, server: Any) -> None:
    told = runner.invoke(app, ["why", "other", "--url", server.url, "--api-key", "key"])
    assert (told.exit_code, len(told.stderr.splitlines())) == (1, 1)
    assert "recent requests" in told.stderr


def test_every_place_with_what_was_known_then_and_later() -> None:
    text = shown(Explanation(DECISION, PREFILL, DECODE, outcome(1.0, BEST, CHOSEN)))
    rows = [line.split() for line in text.splitlines()]
    assert [
        "p[1]",
        "(colocated)",
        "0",
        "777",
        "3.250",
        "0.000",
        "4.500",
        "9.125",
        "0.250",
        "32",
        "1.750",
    ] in rows
    assert ["prefill-0", "48", "5", "0.500", "0.000", "2.000", "4.250", "0.500", "16", "2.750"] in rows
    assert ["decode-0", "16", "900", "2", "0.125", "1.750"] in rows
    for words in (
        "cmpl-1 · cost · 12,345 prompt tokens",
        "why [not]",
        "after 3.000 s, predicted 2.500 s (17% off); not explained 0.250 s",
        "cached: 16 of 12,345 prompt tokens, believed 48",
        "regret: 1.000 s; p[1] would have been the best place; 0.500 s of the total that was compared",
    ):
        assert words in shown(Explanation(DECISION, PREFILL, DECODE, outcome(1.0, BEST, CHOSEN)), width=200)


def test_what_is_swapped_in_has_a_column_where_something_is() -> None:
    lowered = Candidate(P0, Role.PREFILL, 48, 5, 0, 0, True, 0.5, 0.0, 2.0, 4.25, swap=0.75)
    text = shown(Explanation(DECISION, (PREFILL[0], lowered), (), None))
    rows = [line.split() for line in text.splitlines()]
    assert ["prefill", "cached", "ahead", "wait", "fetch", "swap", "prefill", "total"] in rows
    assert ["prefill-0", "48", "5", "0.500", "0.000", "0.750", "2.000", "4.250"] in rows
    assert "swap" not in shown(Explanation(DECISION, PREFILL, (), None))


def test_a_right_decision_says_so_and_the_lost_are_named() -> None:
    text = shown(Explanation(DECISION, PREFILL, (), outcome(0.0, CHOSEN)), width=200)
    assert "regret: none; no place looked at would have been sooner than prefill-0" in text
    assert next(line for line in text.splitlines() if line.startswith("p[1]")).split()[-1] == "lost"


def test_attempts_are_numbered_and_one_without_a_token_says_so() -> None:
    first = Explanation(DECISION, PREFILL, DECODE, None)
    text = shown(first, Explanation(DECISION, (), (), None), width=200)
    assert "cmpl-1, attempt 1 of 2" in text
    assert "attempt 2 of 2" in text
    assert text.count("not there yet or not recorded") == 2
