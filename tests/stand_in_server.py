"""A server with the stand-in backend on a loopback port, in a thread, for whatever talks to one."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import tokenizers
import uvicorn
from tokenizers import AddedToken, models, pre_tokenizers

from memserve.core.config import ServerConfig
from memserve.engine.models.chat_template import ChatTemplate
from memserve.engine.models.tokenizer import Spelling, Tokenizer
from memserve.server.app import create_app
from memserve.server.stand_in import Script, StandInBackend

DEADLINE = 10.0
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}<s>assistant:"


@dataclass
class Server:
    """A running server and the backend behind it."""

    url: str
    backend: StandInBackend
    tokenizer: Tokenizer

    def tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, special=False).tolist())

    def say(self, text: str) -> None:
        self.backend.script = Script(reply=self.tokens(text))

    def asked(self) -> list[str]:
        """The prompts that were sent."""
        return [
            self.tokenizer.decode(request.tokens, skip_special=False) for request in self.backend.requests
        ]


@contextlib.contextmanager
def running_server(config: ServerConfig, context: int) -> Iterator[Server]:
    tokenizer, backend = make_tokenizer(), StandInBackend()
    app = create_app(backend, tokenizer, ChatTemplate(TEMPLATE), ("tiny",), config, context)
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
