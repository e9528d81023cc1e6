"""Cuts recorded sessions to a model's context and keeps their proportions. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from memserve.bench.workload import SALT_TOKENS, TEMPLATE_OVERHEAD, TURN_OVERHEAD

MIN_ASKED = 8
"""Tokens that remain of a question however much is cut: less says nothing."""

MIN_REPLY = 4
"""Tokens that remain of an answer."""

_TYPICAL = 90
"""Percentile of the sessions' lengths that is made to fit by one factor for all; longer ones are cut more."""


class Ruler(Protocol):
    """Measures and cuts text in tokens."""

    def count(self, text: str) -> int: ...

    def cut(self, text: str, tokens: int) -> str: ...


@dataclass(frozen=True, slots=True)
class CharacterRuler:
    """Takes a token for so many characters: without a tokenizer, and on the safe side for English."""

    characters: float = 3.5

    def count(self, text: str) -> int:
        return int(-(-len(text) // self.characters))

    def cut(self, text: str, tokens: int) -> str:
        return text[: int(tokens * self.characters)]


def usable_tokens(context: int, messages: int) -> int:
    """Tokens of a context that ``messages`` messages may fill, less what salts and chat templates add."""
    return context - SALT_TOKENS - TEMPLATE_OVERHEAD - messages * TURN_OVERHEAD


def scale_lengths(lengths: Sequence[int], room: int, least: Sequence[int]) -> list[int]:
    """Lengths whose sum is at most ``room``, each cut by the same factor but not below ``least``.

    A length that was shorter than its least stays as it is. If all are at their least, the sum is what it is.
    """
    scaled = list(lengths)
    floors = [min(length, floor) for length, floor in zip(lengths, least, strict=True)]
    free = set(range(len(lengths)))
    while free and sum(scaled) > room:
        held = sum(scaled[at] for at in range(len(lengths)) if at not in free)
        factor = max(0.0, room - held) / max(1, sum(lengths[at] for at in free))
        for at in free:
            scaled[at] = max(floors[at], int(lengths[at] * factor))
        hit = {at for at in free if scaled[at] == floors[at]}
        if not hit:
            break
        free -= hit
    return scaled


def common_factor(totals: Sequence[int], room: int) -> float:
    """The factor, at most 1, by which sessions of ``totals`` tokens are cut so that most of them fit."""
    if not totals:
        return 1.0
    typical = float(np.percentile(totals, _TYPICAL))
    return min(1.0, room / max(typical, 1.0))
