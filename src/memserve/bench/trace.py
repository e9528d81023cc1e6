"""Replays of traces in Mooncake's format: arrivals, lengths, and which prefixes are equal. Pure.

Qin et al., "Mooncake: A KVCache-centric Disaggregated Architecture for LLM Serving", FAST '25. An id stands
for 512 tokens and everything before them.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from memserve.bench.content import RUN_TOKENS, Content, Run, make_runs
from memserve.bench.fitting import common_factor, usable_tokens
from memserve.bench.workload import Endpoint, Message, Session, Turn, Workload
from memserve.core.errors import ConfigError

_REPLY_KEYS = 1 << 41


class TraceLine(msgspec.Struct, frozen=True):
    """One request: ``timestamp`` in ms, lengths in tokens, one id per 512 tokens of input begun."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def parse_trace(lines: Sequence[str], source: str) -> list[TraceLine]:
    """The lines of a trace. Raises ``ConfigError`` naming ``source``, the line and what is wrong with it."""
    parsed = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            one = _LINES.decode(line)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{source}, line {number}, is no line of a Mooncake trace: {error}") from error
        if one.input_length < 1 or len(one.hash_ids) != -(-one.input_length // RUN_TOKENS):
            raise ConfigError(
                f"{source}, line {number}: {len(one.hash_ids)} hash_ids for input_length {one.input_length}; "
                f"accepted: one for every {RUN_TOKENS} tokens"
            )
        parsed.append(one)
    if not parsed:
        raise ConfigError(f"{source} has no requests")
    return parsed


def make_replay(lines: Sequence[TraceLine], context: int) -> Workload:
    """A workload of one-turn sessions with the trace's arrivals.

    Where requests are longer than ``context``, an id stands for fewer tokens, the same number for all of
    them, so that lengths keep their proportions and equal prefixes stay equal; the longest requests, a tenth
    at most, lose their end.
    """
    room = usable_tokens(context, 1)
    factor = common_factor([one.input_length + one.output_length for one in lines], room)
    per_id = max(1, int(RUN_TOKENS * factor))
    start = min(one.timestamp for one in lines)
    sessions = tuple(_make_session(one, at, per_id, room, start) for at, one in enumerate(lines))
    return Workload("mooncake", sessions, Endpoint.TOKENS, history=False, fixed=True)


def _make_session(line: TraceLine, at: int, per_id: int, room: int, start: float) -> Session:
    output = min(max(1, line.output_length * per_id // RUN_TOKENS), room // 2)
    length = min(max(1, line.input_length * per_id // RUN_TOKENS), room - output)
    prompt = Message("user", _content(line.hash_ids, length, per_id))
    turn = Turn((prompt,), make_runs(_REPLY_KEYS + at * 16, output), output)
    return Session((), (turn,), (line.timestamp - start) / 1e3)


def _content(ids: Sequence[int], length: int, per_id: int) -> Content:
    spans = zip(ids, range(0, length, per_id), strict=False)
    return tuple(Run(key, min(per_id, length - begin)) for key, begin in spans)


_LINES = msgspec.json.Decoder(TraceLine)
