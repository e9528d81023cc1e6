"""Over a real socket: the openai client, clients that go away, bodies that are too large."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI

from memserve.core.errors import PeerLost
from memserve.server.stand_in import Script, StandInBackend

pytestmark = pytest.mark.anyio
DEADLINE = 10.0


@pytest.fixture
async def url(app: FastAPI) -> AsyncIterator[str]:
    """The application behind uvicorn on a free port of the loopback interface."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        serving = asyncio.create_task(server.serve([listening]))
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        async with asyncio.timeout(DEADLINE):
            await serving


@pytest.fixture
async def api(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


async def test_the_openai_client_streams_a_chat(api: openai.AsyncOpenAI, say: Callable[..., None]) -> None:
    say("Good day")
    text, usage = "", None
    stream = await api.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hello"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = chunk.usage or usage
    assert text == "Good day"
    assert usage is not None
    assert usage.completion_tokens == 9
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 0


async def test_the_openai_client_reads_answers_logprobs_and_models(
    api: openai.AsyncOpenAI, say: Callable[..., None]
) -> None:
    say("Hi")
    chat = await api.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hello"}], logprobs=True, top_logprobs=1
    )
    assert chat.choices[0].message.content == "Hi"
    assert chat.choices[0].logprobs is not None
    assert [entry.token for entry in chat.choices[0].logprobs.content or []] == ["H", "i"]
    text = await api.completions.create(model="tiny", prompt=["a", "b"], n=2, logprobs=1)
    assert [choice.text for choice in text.choices] == ["Hi"] * 4
    assert [model.id async for model in api.models.list()] == ["tiny", "alias"]


async def test_the_openai_client_raises_its_own_errors(
    api: openai.AsyncOpenAI, backend: StandInBackend
) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await api.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await api.completions.create(model="tiny", prompt="a", temperature=5)
    assert bad.value.param == "temperature"
    backend.script = Script(failure=PeerLost("decode-0 is gone"), fail_after=2)
    stream = await api.completions.create(model="tiny", prompt="a", stream=True)
    with pytest.raises(openai.APIError, match="decode-0"):
        async for _ in stream:
            pass


@pytest.mark.parametrize("stall_after", [0, 3])
@pytest.mark.parametrize("n", [1, 2])
async def test_a_client_that_leaves_a_stream_cancels_its_requests(
    url: str, backend: StandInBackend, stall_after: int, n: int
) -> None:
    backend.script = Script(stall_after=stall_after)
    await leave(url, backend, {"prompt": "a", "stream": True, "max_tokens": 9, "n": n})
    assert len(backend.cancelled) == n
    assert not backend.running


async def test_a_client_that_leaves_before_the_answer_cancels_its_request(
    url: str, backend: StandInBackend
) -> None:
    backend.script = Script(stall_after=2)
    await leave(url, backend, {"prompt": "a", "max_tokens": 9})
    assert len(backend.cancelled) == 1
    backend.script = Script()
    async with httpx.AsyncClient() as client:
        assert (await client.post(f"{url}/v1/completions", json={"prompt": "a"})).status_code == 200


async def leave(url: str, backend: StandInBackend, asked: dict[str, object]) -> None:
    """Send a request, go away when the backend stalls, and wait until nothing runs."""

    async def read() -> None:
        async with (
            httpx.AsyncClient(timeout=DEADLINE) as client,
            client.stream("POST", f"{url}/v1/completions", json=asked) as response,
        ):
            await response.aread()

    reading = asyncio.create_task(read())
    async with asyncio.timeout(DEADLINE):
        await backend.stalled.wait()
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading
        while backend.running:
            backend.ended.clear()
            await backend.ended.wait()


async def test_a_body_over_the_limit_is_answered_and_the_next_request_works(url: str) -> None:
    async with httpx.AsyncClient(timeout=DEADLINE) as client:
        # More than is drained would be cut off; ten times the limit must still see its answer.
        large = await client.post(f"{url}/v1/completions", json={"prompt": "a" * (640 << 10)})
        assert large.status_code == 413
        assert large.json()["error"]["code"] == "body_too_large"
        assert (await client.post(f"{url}/v1/completions", json={"prompt": "a"})).status_code == 200
