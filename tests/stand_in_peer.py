"""A driver process for tests of the benchmark: its engine does as the model's name says.

``good``; ``refuses`` to load; ``fails`` a prefill of 7 tokens; ``dies`` in a decode; ``hangs`` in one;
``noisy`` prints to standard output.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Sequence

from peers.protocol import Load
from peers.serving import Opened, Refused, serve
from peers.stepping import EngineError


class StandIn:
    """A token for everybody in each step."""

    def __init__(self, behaviour: str) -> None:
        self._behaviour = behaviour
        self._asked = 0
        self._left: dict[int, int] = {}

    def prepare(self, streams: int, longest: int) -> None:
        if streams > 1 and self._behaviour == "dies":
            print("something is very wrong", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if streams > 1 and self._behaviour == "hangs":
            signal.pause()

    def add(self, prompt: Sequence[int], max_tokens: int) -> int:
        if self._behaviour == "fails" and len(prompt) == 7:
            raise EngineError("7 tokens are not to its taste")
        if self._behaviour == "noisy":
            print("starting on a prompt")
        self._asked += 1
        self._left[self._asked] = max_tokens
        return self._asked

    def step(self) -> Iterable[int]:
        got = list(self._left)
        self._left = {request: left - 1 for request, left in self._left.items() if left > 1}
        return got

    def cancel(self, requests: Sequence[int]) -> None:
        for request in requests:
            self._left.pop(request, None)


def open_engine(load: Load) -> Opened:
    if load.model == "refuses":
        raise Refused("no such weights")
    return Opened(StandIn(load.model), {"version": "1"}, lambda: None)


if __name__ == "__main__":
    serve(open_engine)
