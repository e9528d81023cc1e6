"""A conversation with a server: what was said, how the next turn is asked, and what it took."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import closing, suppress
from typing import TextIO

from memserve.cli.client import ChatUsage, ServerClient, Turn


class Conversation:
    """Turns so far, and how the next one is asked. Answers are written to ``out`` as they come."""

    def __init__(
        self, client: ServerClient, model: str, system: str | None, temperature: float, out: TextIO
    ) -> None:
        self._client = client
        self._model = model
        self._system = system
        self._temperature = temperature
        self._out = out
        self.reset()

    def reset(self) -> None:
        """Forget everything that was said."""
        self.turns: list[Turn] = [Turn("system", self._system)] if self._system else []
        self._session = uuid.uuid4().hex

    def ask(self, text: str, clock: Callable[[], float] = time.perf_counter) -> str:
        """Send a message, write the answer, and return a line about what it took.

        Raises ``ServerError``; the message is then not part of the conversation.
        """
        asked = [*self.turns, Turn("user", text)]
        started, first, usage, said = clock(), None, None, ""
        events = self._client.chat(self._model, asked, self._session, self._temperature)
        with closing(events), suppress(KeyboardInterrupt):
            for event in events:
                if event.text:
                    first = clock() if first is None else first
                    said += event.text
                    self._write(event.text)
                usage = event.usage or usage
        self._write("\n")
        self.turns = [*asked, Turn("assistant", said)]
        return describe_turn(started, first, clock(), usage)

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def describe_turn(started: float, first: float | None, ended: float, usage: ChatUsage | None) -> str:
    """Time to first token, speed and cached tokens of one turn; times in seconds."""
    parts = []
    if first is not None:
        parts.append(f"first token after {first - started:.2f} s")
    if usage is None:
        parts.append("stopped")
    else:
        parts.append(f"{usage.completion_tokens} tokens in {ended - started:.2f} s")
        parts.append(f"{usage.cached} of {usage.prompt_tokens} prompt tokens cached")
    return " · ".join(parts)
