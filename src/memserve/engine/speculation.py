"""Speculation by prompt lookup: what followed when the text last ended like this may come once more.

Pure. Whether a guess is right the model decides, so answers are the same with and without; whether it pays
to ask, whoever knows what rows cost. (A. Saxena, "Prompt Lookup Decoding", 2023; vLLM's ``ngram``.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from memserve.core.types import Tokens

_RATE = 0.05
"""Weight of the newest outcome in how often a guess is right."""
_MISSED = 0.75
"""Before any was seen, a guess is expected to be wrong by this to the power of its match's length."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """At most ``tokens`` are proposed, found by the last ``longest`` tokens or fewer, to ``shortest``."""

    tokens: int
    longest: int
    shortest: int


@dataclass(frozen=True, slots=True)
class Guess:
    """``tokens`` may come next; the text's last ``matched`` tokens say so."""

    tokens: tuple[int, ...] = ()
    matched: int = 0


def look_up(text: Tokens, lookup: Lookup) -> Guess:
    """What came after the last earlier place that reads, for longest, like the end of ``text``: int32[n].

    A pass over four bytes per token, of which the step then reads thousands of bytes of KV; an index of
    n-grams takes about as long up to 30,000 tokens, and must be built first (docs/decisions/0022).
    """
    ends = np.flatnonzero(text[:-1] == text[-1]) + 1
    end, matched = 0, 0
    while len(ends):
        end, matched = int(ends[-1]), matched + 1
        if matched == lookup.longest:
            break
        ends = ends[ends > matched]
        ends = ends[text[ends - matched - 1] == text[-matched - 1]]
    if matched < lookup.shortest:
        return Guess()
    return Guess(_continue(text, end, lookup.tokens), matched)


class Draft:
    """What one sequence may go on with, and how good such guesses have been, by the length of their match.

    Every guess is compared with how the text went on, whether or not it was proposed to the model: that shows
    for nothing when speculation begins or ceases to pay.
    """

    __slots__ = ("_chances", "_guess", "_length", "_lookup")

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._chances = [1 - _MISSED**length for length in range(lookup.longest + 1)]
        self._guess = Guess()
        self._length = 0

    def propose(self, text: Tokens, room: int, threshold: float) -> tuple[int, ...]:
        """At most ``room`` tokens to go on with, each right with a chance of at least ``threshold``."""
        self._judge(text)
        self._guess = look_up(text, self._lookup)
        self._length = len(text)
        tokens, chance = self._guess.tokens[: max(room, 0)], 1.0
        for at in range(len(tokens)):
            chance *= self._chances[self._matched(at)]
            if chance < threshold:
                return tokens[:at]
        return tokens

    def _judge(self, text: Tokens) -> None:
        for at, (said, came) in enumerate(
            zip(self._guess.tokens, text[self._length :].tolist(), strict=False)
        ):
            right = said == came
            matched = self._matched(at)
            self._chances[matched] += _RATE * (right - self._chances[matched])
            if not right:
                return

    def _matched(self, at: int) -> int:
        """How long the match of the guess's token number ``at`` is, if those before it are right."""
        return min(self._guess.matched + at, self._lookup.longest)


@dataclass(slots=True)
class Speculated:
    """What speculation has done so far, for metrics."""

    drafts: int = 0
    proposed: int = 0
    accepted: int = 0

    def count(self, proposed: int, accepted: int) -> None:
        """A sequence has proposed so many tokens in a step, and so many were right."""
        self.drafts += proposed > 0
        self.proposed += proposed
        self.accepted += accepted

    def counters(self) -> Mapping[str, float]:
        """By vLLM's names."""
        return {
            "spec_decode_num_drafts": float(self.drafts),
            "spec_decode_num_draft_tokens": float(self.proposed),
            "spec_decode_num_accepted_tokens": float(self.accepted),
        }


def _continue(text: Tokens, start: int, count: int) -> tuple[int, ...]:
    """``count`` tokens from ``start`` on; beyond the end the text repeats itself from ``start``."""
    found = text[start : start + count].tolist()
    while len(found) < count:
        found += found[: count - len(found)]
    return tuple(found)
