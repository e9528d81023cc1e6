"""Bad input of every kind, against the real thing: refused clearly, nothing held, the next request works."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from e2e.serving import Served, serving

pytestmark = [pytest.mark.processes, pytest.mark.model]

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving("--context", "512") as running:
        yield running


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "smollm2-135m", "messages": HELLO, "max_tokens": 3} | fields


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "smollm2-135m", "prompt": "Hello", "max_tokens": 3} | fields


@pytest.mark.parametrize(
    ("path", "body", "status", "names"),
    [
        (CHAT, b'{"model": ', 400, "JSON"),
        (CHAT, b"\xff\xfe{}", 400, ""),
        (CHAT, b'{"model": "smollm2-135m", "messages": "\xff"}', 400, ""),
        (CHAT, b" " * (10 << 20), 413, ""),
        (CHAT, chat(messages="Hello"), 400, "messages"),
        (CHAT, chat(messages=[]), 400, "messages"),
        (CHAT, chat(messages=[{"role": "user", "content": 5}]), 400, "content"),
        (CHAT, chat(model="gpt-4"), 404, "gpt-4"),
        (CHAT, chat(max_tokens=0), 400, "max_tokens"),
        (CHAT, chat(max_tokens=-3), 400, "max_tokens"),
        (CHAT, chat(max_tokens="many"), 400, "max_tokens"),
        (CHAT, chat(temperature=5), 400, "temperature"),
        (CHAT, chat(top_p=0), 400, "top_p"),
        (CHAT, chat(stop=["a"] * 9), 400, "stop"),
        (CHAT, chat(logit_bias={"5": 10}), 400, "logit_bias"),
        (CHAT, chat(presence_penalty=1.5), 400, "presence_penalty"),
        (CHAT, chat(tools=[{"type": "function", "function": {"name": "f"}}]), 400, "tools"),
        (CHAT, chat(response_format={"type": "json_object"}), 400, "response_format"),
        (CHAT, chat(messages=[{"role": "user", "content": "word " * 600}]), 400, "512"),
        (TEXT, text(prompt=[1, 2, 49152]), 400, "prompt"),
        (TEXT, text(prompt=[-1]), 400, "prompt"),
        (TEXT, text(prompt=[]), 400, "prompt"),
        (TEXT, text(prompt=list(range(1000, 1512))), 400, "512"),
        (TEXT, text(prompt="Hello", suffix="end"), 400, "suffix"),
        ("/v1/nothing", text(), 404, ""),
        ("/v1/models", text(), 405, ""),
    ],
)
def test_is_refused_and_costs_nothing(
    served: Served, path: str, body: bytes | dict[str, Any], status: int, names: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(served.url + path, content=content, headers=headers, timeout=60)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert names in f"{error['param']} {error['message']}"
    assert served.wait_idle()
    good = httpx.post(served.url + CHAT, json=chat(), timeout=60)
    assert good.status_code == 200


def test_unknown_fields_are_ignored_and_named(served: Served) -> None:
    answer = httpx.post(served.url + CHAT, json=chat(frobnicate=1), timeout=60)
    assert answer.status_code == 200
    assert "frobnicate" in answer.headers["x-memserve-ignored"]


def test_lone_surrogates_are_refused(served: Served) -> None:
    body = rb'{"model": "smollm2-135m", "messages": [{"role": "user", "content": "\ud800"}]}'
    answer = httpx.post(
        served.url + CHAT, content=body, headers={"Content-Type": "application/json"}, timeout=60
    )
    assert answer.status_code == 400
    served.wait_idle()
