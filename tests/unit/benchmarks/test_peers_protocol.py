"""Messages between the benchmark and its drivers."""

from __future__ import annotations

import io

import pytest

from peers.protocol import (
    Answer,
    Decode,
    Failed,
    Load,
    Loaded,
    Message,
    Mixed,
    MixedTimed,
    Prefill,
    ProtocolError,
    Quit,
    Request,
    Timed,
    decode,
    encode,
)
from peers.serving import Refused, serve_lines

MESSAGES: list[Message] = [
    Load("a model", "4bit", 2, 4096, 16384, 49152, {"kv": "u8"}),
    Prefill(512, 2),
    Decode(8, 256, 32),
    Mixed(8, 256, 4, 1000, 40),
    Quit(),
    Loaded({"version": "1.2"}),
    Timed(512, [0.25, 0.5]),
    MixedTimed(0.01, 0.02, 0.03, 0.04, 1.5, 2.5),
    Failed("it would not\nbe done"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_survives_the_way(message: Message) -> None:
    line = encode(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert decode(line) == message


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"loading weights: 7%",
        b"[]",
        b"{}",
        b'{"kind": "Nothing"}',
        b'{"kind": "Prefill"}',
        b'{"kind": "Prefill", "tokens": 1, "more": 2}',
        b"\xff\xfe",
    ],
)
def test_anything_else_is_refused_with_the_line(line: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a message"):
        decode(line)


def serve_all(lines: bytes) -> list[Message]:
    def answer(asked: Request) -> Answer | None:
        match asked:
            case Prefill(tokens=0):
                raise Refused("nothing to do")
            case Prefill(tokens=tokens):
                return Timed(tokens, [1 / (tokens - 1)])
        return None

    answers = io.BytesIO()
    serve_lines(io.BytesIO(lines), answers, answer)
    return [decode(line) for line in answers.getvalue().splitlines()]


def test_a_driver_outlives_what_goes_wrong() -> None:
    lines = b"".join(
        [encode(Prefill(0)), b"what?\n", encode(Prefill(1)), encode(Failed("")), encode(Prefill(3))]
    )
    refused, nonsense, crashed, answer, good = serve_all(lines)
    assert refused == Failed("nothing to do")
    assert isinstance(nonsense, Failed)
    assert "not a message" in nonsense.reason
    assert crashed == Failed("ZeroDivisionError: division by zero")
    assert isinstance(answer, Failed)
    assert "an answer" in answer.reason
    assert good == Timed(3, [0.5])


def test_nothing_is_answered_after_quit() -> None:
    assert serve_all(encode(Quit()) + encode(Prefill(3))) == []
