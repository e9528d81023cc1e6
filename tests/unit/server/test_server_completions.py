"""``/v1/completions``: prompts as text and tokens, batches, logprobs, streams."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
import pytest

from memserve.engine.models.tokenizer import Tokenizer
from memserve.server.stand_in import StandInBackend

pytestmark = pytest.mark.anyio
URL = "/v1/completions"


async def test_continues_text_with_sixteen_tokens_by_default(
    client: httpx.AsyncClient, backend: StandInBackend, tokenizer: Tokenizer
) -> None:
    body = (await client.post(URL, json={"model": "tiny", "prompt": "abcd"})).json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": "abcd" * 4, "finish_reason": "length", "logprobs": None}]
    assert body["usage"]["prompt_tokens"] == 4
    assert body["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        (["ab", "c"], ["abab", "cccc"]),
        ([65, 66], ["65 66"]),
        ([[65, 66], [67]], ["65 66", "67"]),
        (["ab", [67]], ["abab", "67"]),
    ],
)
async def test_prompts_of_every_form(
    client: httpx.AsyncClient, tokenizer: Tokenizer, prompt: object, texts: list[str]
) -> None:
    body = (await client.post(URL, json={"prompt": prompt, "max_tokens": 4})).json()
    wanted = []
    for text in texts:
        if text[0].isdigit():
            ids = [int(number) for number in text.split()]
            wanted.append(tokenizer.decode((ids * 4)[:4], skip_special=True))
        else:
            wanted.append(text)
    assert [choice["text"] for choice in body["choices"]] == wanted
    assert [choice["index"] for choice in body["choices"]] == list(range(len(wanted)))
    assert body["usage"]["completion_tokens"] == 4 * len(wanted)


async def test_several_choices_of_several_prompts_are_numbered_prompt_by_prompt(
    client: httpx.AsyncClient, backend: StandInBackend
) -> None:
    body = (await client.post(URL, json={"prompt": ["aa", "bbb"], "n": 2, "max_tokens": 2})).json()
    assert [choice["text"] for choice in body["choices"]] == ["aa", "aa", "bb", "bb"]
    assert body["usage"]["prompt_tokens"] == 5


async def test_logprobs_in_columns(client: httpx.AsyncClient, say: Callable[..., None]) -> None:
    say("xyz")
    body = (await client.post(URL, json={"prompt": "a", "logprobs": 2, "stop": "z"})).json()
    logprobs = body["choices"][0]["logprobs"]
    assert body["choices"][0]["text"] == "xy"
    assert logprobs["tokens"] == ["x", "y"]
    assert logprobs["text_offset"] == [0, 1]
    assert [len(entry) for entry in logprobs["top_logprobs"]] == [2, 2]
    only = (await client.post(URL, json={"prompt": "a", "logprobs": 0})).json()["choices"][0]["logprobs"]
    assert only["top_logprobs"] is None
    assert len(only["token_logprobs"]) == 3


async def test_streams_text_and_usage(client: httpx.AsyncClient, say: Callable[..., None]) -> None:
    say("xyz")
    asked = {"prompt": "a", "stream": True, "stream_options": {"include_usage": True}}
    lines = (await client.post(URL, json=asked)).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    got = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(event["choices"][0]["text"] for event in got[:-1]) == "xyz"
    assert got[-2]["choices"][0]["finish_reason"] == "stop"
    assert got[-1]["usage"]["total_tokens"] == 5


async def test_special_tokens_may_be_written_out(client: httpx.AsyncClient, backend: StandInBackend) -> None:
    await client.post(URL, json={"prompt": "<|im_start|>a", "max_tokens": 1})
    assert backend.requests[0].tokens.tolist()[0] == 256
    assert len(backend.requests[0].tokens) == 2
