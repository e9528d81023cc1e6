"""A byte-level tokenizer, a chat template, the stand-in backend, and HTTP clients of an app made of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import httpx
import pytest
import tokenizers
from fastapi import FastAPI
from tokenizers import AddedToken, models, pre_tokenizers

from memserve.core.config import ServerConfig
from memserve.engine.models.chat_template import ChatTemplate
from memserve.engine.models.tokenizer import Spelling, Tokenizer
from memserve.server.app import create_app
from memserve.server.stand_in import Script, StandInBackend

CONTEXT = 256
MODEL = "tiny"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """One token per byte, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = tokenizers.Tokenizer(models.BPE(vocab={char: at for at, char in enumerate(alphabet)}, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    return Tokenizer(engine, Spelling.BYTE_LEVEL, eos_tokens=(257,))


@pytest.fixture
def backend() -> StandInBackend:
    return StandInBackend()


@pytest.fixture
def say(tokenizer: Tokenizer, backend: StandInBackend) -> Callable[..., None]:
    """Make the backend answer with a text."""

    def set_reply(text: str, **script: object) -> None:
        reply = tuple(tokenizer.encode(text, special=False).tolist())
        backend.script = Script(reply=reply, **script)  # type: ignore[arg-type]

    return set_reply


@pytest.fixture
def config() -> ServerConfig:
    return ServerConfig(max_body=64 << 10)


@pytest.fixture
def app(backend: StandInBackend, tokenizer: Tokenizer, config: ServerConfig) -> FastAPI:
    return create_app(backend, tokenizer, ChatTemplate(TEMPLATE), (MODEL, "alias"), config, CONTEXT)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as opened:
        yield opened
