"""A workload's prompts and answers as token ids: equal text is equal tokens, and nothing more is promised.

Runs of made-up tokens have exactly their length; of text, four bytes count as a token, so that no tokenizer
is needed and long documents cost nothing. Chat templates are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np

from memserve.bench.content import RUN_TOKENS, Content, Run, Text, splitmix64
from memserve.bench.workload import Message, Session, Workload, compose_prompt
from memserve.core.types import Tokens

_TEXT_BYTES = 4
_PLACES = np.arange(RUN_TOKENS, dtype=np.uint32)
_ODD, _SIGN = np.uint32(1), np.uint32(1)
"""A factor is odd, so that a run's tokens differ; a token id has no sign."""
_NOTHING = np.zeros(0, np.int32)


def tokens_of(messages: Iterable[Message]) -> Tokens:
    """Token ids of a prompt: int32[n]."""
    return content_tokens([piece for message in messages for piece in message.content])


def content_tokens(content: Sequence[Text | Run]) -> Tokens:
    """Token ids: int32[n]."""
    parts = []
    for kind, pieces in groupby(content, type):
        if kind is Run:
            parts.append(_run_tokens([piece for piece in pieces if isinstance(piece, Run)]))
        else:
            parts += [_text_tokens(piece.text) for piece in pieces if isinstance(piece, Text)]
    return parts[0] if len(parts) == 1 else np.concatenate([_NOTHING, *parts])


def count_tokens(content: Content) -> int:
    """How many token ids that would be."""
    return sum(
        piece.tokens if isinstance(piece, Run) else -(-len(piece.text.encode()) // _TEXT_BYTES)
        for piece in content
    )


def prompt_lengths(workload: Workload) -> list[int]:
    """Tokens of every turn's prompt, given the recorded answers."""
    return [length for session in workload.sessions for length in _lengths(workload, session)]


def _lengths(workload: Workload, session: Session) -> Iterable[int]:
    replies = [turn.reply for turn in session.turns]
    for turn in range(len(session.turns)):
        prompt = compose_prompt(workload, session, replies[:turn])
        yield sum(count_tokens(message.content) for message in prompt)


def _run_tokens(runs: Sequence[Run]) -> Tokens:
    # An arithmetic progression per run, by 63 bits of its key's hash, is quicker than hashing every token.
    hashed = splitmix64(np.array([run.key for run in runs], np.uint64)).view(np.uint32).reshape(-1, 2)
    tokens = (hashed[:, :1] + (hashed[:, 1:] | _ODD) * _PLACES >> _SIGN).view(np.int32)
    lengths = np.array([run.tokens for run in runs])
    if (lengths[:-1] == RUN_TOKENS).all():
        return tokens.reshape(-1)[: int(lengths.sum())]
    return tokens[lengths[:, None] > _PLACES]


def _text_tokens(text: str) -> Tokens:
    raw = text.encode()
    padded = raw + b"\0" * (-len(raw) % _TEXT_BYTES)
    return np.frombuffer(padded, "<u4").astype(np.int32)
