"""Every kind of bad input: right status, OpenAI's error shape, the field's name, and nothing held."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from memserve.server.stand_in import StandInBackend
from memserve.server.unsupported import CHAT as CHAT_TABLE
from memserve.server.unsupported import COMPLETION as COMPLETION_TABLE

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
JSON = {"content-type": "application/json"}
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(autouse=True)
async def nothing_is_held(client: httpx.AsyncClient, backend: StandInBackend) -> AsyncIterator[None]:
    """After each test nothing runs, and the next request works."""
    yield
    assert not backend.running
    response = await client.post(COMPLETION, json={"prompt": "a", "max_tokens": 1})
    assert response.status_code in (200, 401)


def error_of(response: httpx.Response, status: int, param: str | None, code: str) -> str:
    """Check shape and content of an error; return its message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"]
    if param is not None:
        assert param.split("[")[0] in error["message"]
    return str(error["message"])


BAD_CHAT: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "Hello"}, "messages", "invalid_type"),
    ({"messages": [1]}, "messages[0]", "invalid_type"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "invalid_value"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
        "unsupported_parameter",
    ),
    (
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
        "messages[0].tool_calls",
        "unsupported_parameter",
    ),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": -1}, "max_tokens", "invalid_value"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
    ({"max_tokens": "ten"}, "max_tokens", "invalid_type"),
    ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
    ({"max_tokens": True}, "max_tokens", "invalid_type"),
    ({"max_tokens": 10**30}, "max_tokens", "context_length_exceeded"),
    ({"temperature": 5}, "temperature", "invalid_value"),
    ({"temperature": -0.1}, "temperature", "invalid_value"),
    ({"temperature": "hot"}, "temperature", "invalid_type"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"top_p": 1.1}, "top_p", "invalid_value"),
    ({"top_k": -2}, "top_k", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 129}, "n", "invalid_value"),
    ({"n": 10**400}, "n", "invalid_value"),
    ({"seed": 2**63}, "seed", "invalid_value"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
    ({"stop": ["a" * 1025]}, "stop", "invalid_value"),
    ({"stop": [1]}, "stop[0]", "invalid_type"),
    ({"stop_token_ids": [258]}, "stop_token_ids[0]", "invalid_value"),
    ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"logprobs": 1}, "logprobs", "invalid_type"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": "yes"}, "stream", "invalid_type"),
    ({"cache_salt": ""}, "cache_salt", "invalid_value"),
    ({"session_id": 3}, "session_id", "invalid_type"),
    ({"model": 3}, "model", "invalid_type"),
]


@pytest.mark.parametrize(("fields", "param", "code"), BAD_CHAT, ids=lambda value: str(value)[:60])
async def test_bad_chat_values(
    client: httpx.AsyncClient, backend: StandInBackend, fields: dict[str, Any], param: str, code: str
) -> None:
    error_of(await client.post(CHAT, json={"messages": HELLO} | fields), 400, param, code)
    assert not backend.requests


BAD_COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({}, "prompt", "missing_required_parameter"),
    ({"prompt": None}, "prompt", "invalid_type"),
    ({"prompt": ""}, "prompt", "invalid_value"),
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": ["a", ""]}, "prompt[1]", "invalid_value"),
    ({"prompt": [[]]}, "prompt", "invalid_value"),
    ({"prompt": [1, "a"]}, "prompt", "invalid_value"),
    ({"prompt": [[1, "a"]]}, "prompt[0][1]", "invalid_type"),
    ({"prompt": [1, 258]}, "prompt[1]", "invalid_value"),
    ({"prompt": [-1]}, "prompt[0]", "invalid_value"),
    ({"prompt": [[1], [2, 10**20]]}, "prompt[1][1]", "invalid_value"),
    ({"prompt": ["a"] * 129}, "prompt", "invalid_value"),
    ({"prompt": ["a"] * 65, "n": 2}, "n", "invalid_value"),
    ({"prompt": "a", "logprobs": 6}, "logprobs", "invalid_value"),
    ({"prompt": "a", "logprobs": True}, "logprobs", "invalid_type"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"prompt": "a", "max_tokens": 256}, "max_tokens", "context_length_exceeded"),
]


@pytest.mark.parametrize(("body", "param", "code"), BAD_COMPLETIONS, ids=lambda value: str(value)[:60])
async def test_bad_completion_values(
    client: httpx.AsyncClient, backend: StandInBackend, body: dict[str, Any], param: str, code: str
) -> None:
    error_of(await client.post(COMPLETION, json=body), 400, param, code)
    assert not backend.requests


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null",
        b"[1]",
        b'"text"',
        b'{"prompt": "a"} trailing',
        b'{"prompt": NaN}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "caf\xe9"}',
        b'{"unknown": "\xff", "prompt": "a"}',
        b'{"unknown": ' + b"[" * 50_000 + b"]" * 10_000 + b', "prompt": "a"}',
        b'{"n": ' + b"9" * 6_000 + b', "prompt": "a"}',
    ],
    ids=lambda raw: repr(raw[:24]),
)
@pytest.mark.parametrize("url", [CHAT, COMPLETION])
async def test_bodies_that_are_no_requests(client: httpx.AsyncClient, url: str, raw: bytes) -> None:
    response = await client.post(url, content=raw, headers=JSON)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]


async def test_invalid_utf8_names_the_position(client: httpx.AsyncClient) -> None:
    response = await client.post(COMPLETION, content=b'{"prompt": "caf\xe9"}', headers=JSON)
    assert "0xe9 at position 15" in error_of(response, 400, None, "invalid_json")


@pytest.mark.parametrize("header", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_other_media_types(client: httpx.AsyncClient, header: str) -> None:
    response = await client.post(COMPLETION, content=b'{"prompt": "a"}', headers={"content-type": header})
    assert "application/json" in error_of(response, 415, None, "unsupported_media_type")


async def test_a_media_type_with_a_charset_is_fine(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert (await client.post(COMPLETION, content=b'{"prompt": "a"}', headers=headers)).status_code == 200


@pytest.mark.parametrize("url", [CHAT, COMPLETION])
async def test_unknown_model(client: httpx.AsyncClient, url: str) -> None:
    asked = {"model": "gpt-4", "messages": HELLO, "prompt": "a"}
    message = error_of(await client.post(url, json=asked), 404, "model", "model_not_found")
    assert "gpt-4" in message
    assert "'tiny'" in message


async def test_an_alias_is_answered_under_its_own_name(client: httpx.AsyncClient) -> None:
    response = await client.post(COMPLETION, json={"model": "alias", "prompt": "a"})
    assert response.json()["model"] == "alias"


async def test_a_prompt_longer_than_the_context_names_both_numbers(client: httpx.AsyncClient) -> None:
    response = await client.post(COMPLETION, json={"prompt": "a" * 300})
    message = error_of(response, 400, "prompt", "context_length_exceeded")
    assert "300" in message
    assert "256" in message
    long = [{"role": "user", "content": "a" * 300}]
    message = error_of(
        await client.post(CHAT, json={"messages": long}), 400, "messages", "context_length_exceeded"
    )
    assert "256" in message


async def test_a_long_text_is_tokenized_all_the_same(client: httpx.AsyncClient) -> None:
    response = await client.post(COMPLETION, json={"prompt": "a" * 30_000})
    assert "30000" in error_of(response, 400, "prompt", "context_length_exceeded")


async def test_prompt_and_max_tokens_beyond_the_context_name_what_is_left(client: httpx.AsyncClient) -> None:
    fits = await client.post(COMPLETION, json={"prompt": "a" * 200, "max_tokens": 56})
    assert fits.status_code == 200
    response = await client.post(COMPLETION, json={"prompt": "a" * 200, "max_tokens": 57})
    assert "at most 56" in error_of(response, 400, "max_tokens", "context_length_exceeded")


CHANGES_THE_ANSWER: dict[str, Any] = {
    "frequency_penalty": 0.5,
    "presence_penalty": -1,
    "repetition_penalty": 1.1,
    "length_penalty": 2,
    "min_p": 0.1,
    "typical_p": 0.5,
    "logit_bias": {"5": 1},
    "logits_processors": ["x"],
    "allowed_token_ids": [1],
    "bad_words": ["x"],
    "min_tokens": 4,
    "best_of": 2,
    "use_beam_search": True,
    "response_format": {"type": "json_object"},
    "structured_outputs": {"json": {}},
    "guided_json": {},
    "guided_regex": "a+",
    "guided_choice": ["a"],
    "guided_grammar": "root ::= x",
    "echo": True,
    "prompt_logprobs": 0,
    "truncate_prompt_tokens": 5,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "return_tokens_as_token_ids": True,
    "return_token_ids": True,
}
CHANGES_CHAT = CHANGES_THE_ANSWER | {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "modalities": ["text", "audio"],
    "audio": {"voice": "x"},
    "web_search_options": {},
    "documents": [{}],
    "reasoning_effort": "high",
    "verbosity": "low",
    "chat_template": "x",
    "chat_template_kwargs": {"x": 1},
    "add_generation_prompt": False,
    "continue_final_message": True,
    "add_special_tokens": True,
}
CHANGES_COMPLETION = CHANGES_THE_ANSWER | {
    "suffix": "x",
    "prompt_embeds": "x",
    "add_special_tokens": False,
}


async def test_every_unsupported_parameter_is_tested() -> None:
    assert CHANGES_CHAT.keys() == CHAT_TABLE.keys()
    assert CHANGES_COMPLETION.keys() == COMPLETION_TABLE.keys()


@pytest.mark.parametrize(("name", "value"), CHANGES_CHAT.items())
async def test_unsupported_chat_parameters(client: httpx.AsyncClient, name: str, value: object) -> None:
    response = await client.post(CHAT, json={"messages": HELLO, name: value})
    assert "Remedy" in error_of(response, 400, name, "unsupported_parameter")
    for harmless in (None, *CHAT_TABLE[name].harmless):
        response = await client.post(CHAT, json={"messages": HELLO, "max_tokens": 1, name: harmless})
        assert response.status_code == 200, response.text
        assert "x-memserve-ignored" not in response.headers


@pytest.mark.parametrize(("name", "value"), CHANGES_COMPLETION.items())
async def test_unsupported_completion_parameters(client: httpx.AsyncClient, name: str, value: object) -> None:
    response = await client.post(COMPLETION, json={"prompt": "a", name: value})
    assert "Remedy" in error_of(response, 400, name, "unsupported_parameter")
    for harmless in (None, *COMPLETION_TABLE[name].harmless):
        response = await client.post(COMPLETION, json={"prompt": "a", name: harmless})
        assert response.status_code == 200, response.text


async def test_unknown_fields_are_ignored_and_named(client: httpx.AsyncClient) -> None:
    asked = {"prompt": "a", "user": "me", "prefix": 3, "blümchen": [1], "x\r\ny": 1}
    response = await client.post(COMPLETION, json=asked)
    assert response.status_code == 200
    assert response.headers["x-memserve-ignored"] == "bl\\xfcmchen, prefix, x??y"


async def test_nulls_mean_defaults(client: httpx.AsyncClient) -> None:
    names = ("model", "temperature", "top_p", "n", "stop", "stream", "stream_options", "seed", "logprobs")
    nulls: dict[str, Any] = dict.fromkeys((*names, "max_tokens", "max_completion_tokens", "top_logprobs"))
    response = await client.post(CHAT, json={"messages": HELLO} | nulls)
    assert response.status_code == 200, response.text


async def test_a_body_over_the_limit_is_refused_unread(client: httpx.AsyncClient) -> None:
    response = await client.post(COMPLETION, json={"prompt": "a" * (10 << 20)})
    assert "65536" in error_of(response, 413, None, "body_too_large")


async def test_a_body_over_the_limit_without_a_length_is_refused(client: httpx.AsyncClient) -> None:
    sent = 0

    async def parts() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield b"a" * (64 << 10)

    response = await client.post(COMPLETION, content=parts(), headers=JSON)
    error_of(response, 413, None, "body_too_large")
    # What is over the limit is read and thrown away for a while, so that the client sees the answer.
    assert 1 < sent < 100


async def test_unknown_paths_and_wrong_methods(client: httpx.AsyncClient) -> None:
    assert "/v1/nothing" in error_of(await client.get("/v1/nothing"), 404, None, "not_found")
    response = await client.get(CHAT)
    assert "POST" in error_of(response, 405, None, "method_not_allowed")
    assert response.headers["allow"] == "POST"
