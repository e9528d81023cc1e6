"""``/v1/chat/completions``: whole and streamed answers, usage, stop strings, logprobs, sessions."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from memserve.engine.models.tokenizer import Tokenizer
from memserve.server.stand_in import Script, StandInBackend

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The stream's events; the last one must be ``[DONE]``."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


async def test_answers_with_exact_usage(
    client: httpx.AsyncClient, backend: StandInBackend, say: Callable[..., None]
) -> None:
    say("Good day")
    response = await client.post(CHAT, json={"model": "tiny", "messages": HELLO})
    body = response.json()
    assert response.status_code == 200
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"content": "Good day", "role": "assistant", "refusal": None},
            "finish_reason": "stop",
            "logprobs": None,
        }
    ]
    prompt = len(backend.requests[0].tokens)
    # The end-of-turn token is sampled and counted, but not shown.
    assert body["usage"]["prompt_tokens"] == prompt
    assert body["usage"]["completion_tokens"] == len("Good day") + 1
    assert body["usage"]["total_tokens"] == prompt + len("Good day") + 1
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_renders_the_template_with_special_tokens(
    client: httpx.AsyncClient, backend: StandInBackend, tokenizer: Tokenizer
) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "Be kind"}, {"role": "user", "content": parts}]
    await client.post(CHAT, json={"messages": messages, "max_tokens": 1})
    text = (
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\n"
    )
    assert backend.requests[0].tokens.tolist() == tokenizer.encode(text, special=True).tolist()


async def test_a_repeated_prompt_reports_cached_tokens_and_the_ledger_adds_up(
    client: httpx.AsyncClient, say: Callable[..., None]
) -> None:
    say("Yes")
    for _ in range(2):
        response = await client.post(CHAT, json={"messages": HELLO})
    usage = response.json()["usage"]
    details = usage["prompt_tokens_details"]
    assert details["cached_tokens"] == details["memserve"]["local"] == 16
    assert sum(details["memserve"].values()) == usage["prompt_tokens"]


async def test_streams_role_then_text_then_finish_then_usage(
    client: httpx.AsyncClient, say: Callable[..., None]
) -> None:
    say("Good day", chunk_tokens=3)
    asked = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    response = await client.post(CHAT, json=asked)
    assert response.headers["content-type"].startswith("text/event-stream")
    got = events(response)
    assert {event["id"] for event in got} == {got[0]["id"]}
    assert {event["object"] for event in got} == {"chat.completion.chunk"}
    deltas = [event["choices"][0]["delta"] for event in got[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "Good day"
    assert deltas[-1] == {}
    assert [event["choices"][0]["finish_reason"] for event in got[:-1]] == [None] * (len(got) - 2) + ["stop"]
    assert all(event["usage"] is None for event in got[:-1])
    assert got[-1]["choices"] == []
    assert got[-1]["usage"]["completion_tokens"] == len("Good day") + 1


async def test_a_stream_without_usage_never_mentions_it(
    client: httpx.AsyncClient, say: Callable[..., None]
) -> None:
    say("Hi")
    got = events(await client.post(CHAT, json={"messages": HELLO, "stream": True}))
    assert all("usage" not in event for event in got)


@pytest.mark.parametrize("chunk", [1, 2, 50])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_answer_and_the_backend_request(
    client: httpx.AsyncClient,
    backend: StandInBackend,
    say: Callable[..., None],
    chunk: int,
    stream: bool,
) -> None:
    say("one STOP two", chunk_tokens=chunk)
    asked = {"messages": HELLO, "stop": ["STOP", "never"], "stream": stream}
    if stream:
        asked["stream_options"] = {"include_usage": True}
    response = await client.post(CHAT, json=asked)
    if stream:
        got = events(response)
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in got[:-1])
        finish, usage = got[-2]["choices"][0]["finish_reason"], got[-1]["usage"]
    else:
        body = response.json()
        text, usage = body["choices"][0]["message"]["content"], body["usage"]
        finish = body["choices"][0]["finish_reason"]
    assert (text, finish) == ("one ", "stop")
    assert usage["completion_tokens"] == len("one STOP")
    assert backend.stopped == {backend.requests[0].request}
    assert not backend.running
    assert not backend.cancelled


async def test_max_tokens_ends_with_length_and_defaults_to_the_room_that_is_left(
    client: httpx.AsyncClient, backend: StandInBackend
) -> None:
    short = (await client.post(CHAT, json={"messages": HELLO, "max_tokens": 3})).json()
    assert short["choices"][0]["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 3
    await client.post(CHAT, json={"messages": HELLO, "max_tokens": 9, "max_completion_tokens": 4})
    assert backend.requests[1].sampling.max_tokens == 4
    await client.post(CHAT, json={"messages": HELLO})
    last = backend.requests[2]
    assert last.sampling.max_tokens == 256 - len(last.tokens)


async def test_logprobs_have_one_entry_per_shown_token(
    client: httpx.AsyncClient, say: Callable[..., None]
) -> None:
    say("ab")
    asked = {"messages": HELLO, "logprobs": True, "top_logprobs": 2}
    content = (await client.post(CHAT, json=asked)).json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["a", "b"]
    assert content[0]["bytes"] == [97]
    assert len(content[0]["top_logprobs"]) == 2
    assert content[0]["logprob"] == content[0]["top_logprobs"][0]["logprob"]
    streamed = events(await client.post(CHAT, json=asked | {"stream": True}))
    tokens = [
        entry["token"]
        for event in streamed
        for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert tokens == ["a", "b"]


async def test_several_choices_have_ids_and_seeds_of_their_own(
    client: httpx.AsyncClient, backend: StandInBackend, say: Callable[..., None]
) -> None:
    say("Hi")
    body = (await client.post(CHAT, json={"messages": HELLO, "n": 3, "seed": 7})).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [request.sampling.seed for request in backend.requests] == [7, 8, 9]
    assert len({request.request for request in backend.requests}) == 3
    assert backend.requests[0].request == body["id"]
    # The prompt counts once, and the first choice's ledger stands for it.
    assert body["usage"]["prompt_tokens"] == len(backend.requests[0].tokens)
    assert body["usage"]["completion_tokens"] == 3 * 3
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    metrics = (await client.get("/metrics")).text
    assert f'prompt_tokens_total{{source="computed"}} {float(len(backend.requests[0].tokens))}' in metrics
    assert 'prompt_tokens_total{source="local"} 0.0' in metrics


async def test_several_choices_are_streamed_side_by_side(
    client: httpx.AsyncClient, say: Callable[..., None]
) -> None:
    say("Hello there")
    got = events(await client.post(CHAT, json={"messages": HELLO, "n": 2, "stream": True}))
    for index in (0, 1):
        mine = [event["choices"][0] for event in got if event["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "Hello there"
        assert mine[-1]["finish_reason"] == "stop"


async def test_session_salt_and_trace_reach_the_backend(
    client: httpx.AsyncClient, backend: StandInBackend
) -> None:
    asked = {"messages": HELLO, "max_tokens": 1, "cache_salt": "tenant"}
    await client.post(CHAT, json=asked, headers={"x-session-id": "s1", "x-memserve-trace": "1"})
    await client.post(CHAT, json=asked | {"session_id": "s2"}, headers={"x-session-id": "s1"})
    first, second = backend.requests
    assert (first.session, first.salt, first.trace) == ("s1", "tenant", True)
    assert (second.session, second.trace) == ("s2", False)


async def test_sampling_parameters_reach_the_backend(
    client: httpx.AsyncClient, backend: StandInBackend
) -> None:
    asked = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 7,
        "seed": -1,
        "stop_token_ids": [3],
        "ignore_eos": True,
    }
    await client.post(CHAT, json={"messages": HELLO, "max_tokens": 1} | asked)
    await client.post(CHAT, json={"messages": HELLO, "max_tokens": 1})
    sampling, default = (request.sampling for request in backend.requests)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 0.5, 7)
    assert (sampling.seed, sampling.stop_token_ids, sampling.logprobs) == (2**63 - 1, (3,), None)
    assert (default.temperature, default.top_p, default.top_k) == (1, 1, 0)
    assert default.stop_token_ids == (257,)


async def test_special_tokens_and_half_characters_never_reach_the_text(
    client: httpx.AsyncClient, backend: StandInBackend, tokenizer: Tokenizer
) -> None:
    euro = tuple(tokenizer.encode("€", special=False).tolist())
    backend.script = Script(reply=(*euro, 256, euro[0]))
    got = events(await client.post(CHAT, json={"messages": HELLO, "stream": True}))
    texts = [event["choices"][0]["delta"].get("content", "") for event in got]
    assert [text for text in texts if text] == ["€", "\ufffd"]
