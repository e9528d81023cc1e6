"""A server with the stand-in backend on a loopback port, in a thread, and small workloads."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import tokenizers
import uvicorn
from tokenizers import AddedToken, models, pre_tokenizers

from memserve.bench.content import Text
from memserve.bench.workload import Endpoint, Message, Session, Turn, Workload
from memserve.core.config import ServerConfig
from memserve.engine.models.chat_template import ChatTemplate
from memserve.engine.models.tokenizer import Spelling, Tokenizer
from memserve.server.app import create_app
from memserve.server.stand_in import StandInBackend

DEADLINE = 10.0
CONTEXT = 4096
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}<s>assistant:"


@dataclass
class Server:
    """A running server and the backend behind it."""

    url: str
    backend: StandInBackend
    tokenizer: Tokenizer

    def tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, special=False).tolist())

    def asked(self) -> list[str]:
        """The prompts that were sent."""
        return [
            self.tokenizer.decode(request.tokens, skip_special=False) for request in self.backend.requests
        ]


@pytest.fixture
def server() -> Iterator[Server]:
    tokenizer, backend = make_tokenizer(), StandInBackend()
    app = create_app(backend, tokenizer, ChatTemplate(TEMPLATE), ("tiny",), ServerConfig(), CONTEXT)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        settings = uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=2)
        serving = uvicorn.Server(settings)
        thread = threading.Thread(target=serving.run, args=([listening],))
        thread.start()
        yield Server(f"http://127.0.0.1:{listening.getsockname()[1]}", backend, tokenizer)
        serving.should_exit = True
        thread.join(DEADLINE)
        assert not thread.is_alive()


def make_tokenizer() -> Tokenizer:
    """One token per byte, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = tokenizers.Tokenizer(models.BPE(vocab={char: at for at, char in enumerate(alphabet)}, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>")])
    return Tokenizer(engine, Spelling.BYTE_LEVEL, eos_tokens=(257,))


def make_chats(sessions: int = 2, turns: int = 2, think: float = 0.0, max_tokens: int = 4) -> Workload:
    """Chats whose texts say which session and turn they are."""
    made = tuple(
        Session(
            (Message("system", (Text("be brief"),)),),
            tuple(
                Turn(
                    (Message("user", (Text(f"q{one}.{turn}"),)),),
                    (Text(f"r{one}.{turn}"),),
                    max_tokens,
                    think,
                )
                for turn in range(turns)
            ),
        )
        for one in range(sessions)
    )
    return Workload("chats", made, Endpoint.CHAT, history=True, fixed=True)
