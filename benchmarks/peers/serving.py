"""A driver process: requests on standard input, answers on standard output. Standard library only.

What the engine itself prints goes to standard error, so that it cannot break into an answer.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from peers.protocol import (
    Answer,
    Decode,
    Failed,
    Load,
    Loaded,
    Mixed,
    Prefill,
    ProtocolError,
    Request,
    decode,
    encode,
)
from peers.stepping import Bench, StepEngine


@dataclass(frozen=True, slots=True)
class Opened:
    """A loaded engine, and what to say about it."""

    engine: StepEngine
    about: dict[str, str]
    close: Callable[[], None]


class Refused(Exception):
    """The engine cannot do this at all; the text is the reason."""


Opener = Callable[[Load], Opened]


def serve(opener: Opener) -> None:
    """Answer requests until told to quit or left alone."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    driver = _Driver(opener)
    serve_lines(sys.stdin.buffer, answers, driver.answer)
    driver.close()


def serve_lines(lines: BinaryIO, answers: BinaryIO, answer: Callable[[Request], Answer | None]) -> None:
    """Answer each line until one has no answer, or there are no more."""
    for line in iter(lines.readline, b""):
        said = _answer_line(line, answer)
        if said is None:
            return
        answers.write(encode(said))
        answers.flush()


def _answer_line(line: bytes, answer: Callable[[Request], Answer | None]) -> Answer | None:
    try:
        asked = decode(line)
        if isinstance(asked, Answer):
            raise ProtocolError(f"an answer where a request was expected: {line[:200]!r}")
        return answer(asked)
    except Refused as refused:
        return Failed(str(refused))
    except Exception as error:
        traceback.print_exc()
        return Failed(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _clock(load: Load) -> Callable[[], float]:
    if load.clock == "processor":
        return lambda: time.process_time() / load.threads
    return time.perf_counter


class _Driver:
    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        self._opened: Opened | None = None
        self._bench: Bench | None = None

    def answer(self, asked: Request) -> Answer | None:
        if isinstance(asked, Load):
            self._opened = self._opener(asked)
            self._bench = Bench(self._opened.engine, asked.vocabulary, _clock(asked))
            return Loaded(self._opened.about)
        bench = self._bench
        if bench is None:
            raise Refused("nothing is loaded")
        match asked:
            case Prefill():
                return bench.prefill(asked)
            case Decode():
                return bench.decode(asked)
            case Mixed():
                return bench.mixed(asked)
        return None

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()
