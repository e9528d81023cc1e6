"""Speculation by prompt lookup: what followed when the text last ended like this may come once more.

Pure. Whether a guess is right the model decides, so answers are the same with and without; whether it pays
to ask, whoever knows what rows cost. (A. Saxena, "Prompt Lookup Decoding", 2023; vLLM's ``ngram``.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from memserve.core.types import Tokens

_TOKEN_BYTES = 4
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


class NgramIndex:
    """Where in a growing text its n-grams of ``shortest`` to ``longest`` tokens occurred last.

    Reading a token costs the same however long the text is.
    """

    __slots__ = ("_ends", "_longest", "_read", "_shortest")

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest = shortest
        self._longest = longest
        self._ends: dict[bytes, int] = {}
        self._read = 0

    def read(self, text: Tokens) -> None:
        """Learn what ``text``, int32[n], has more than it had before."""
        # Up to the last token but one: what ends with the last has nothing after it yet.
        end, start = len(text) - 1, max(self._read + 1 - self._longest, 0)
        raw = text[start : max(end, start)].tobytes()
        for length in range(self._shortest, self._longest + 1):
            firsts = range(max(self._read + 1 - length, 0), end + 1 - length)
            self._ends.update((_piece(raw, at - start, length), at + length) for at in firsts)
        self._read = max(self._read, end)

    def guess(self, text: Tokens, count: int) -> Guess:
        """The ``count`` tokens after the last earlier place that reads like the end of ``text``."""
        start = max(len(text) - self._longest, 0)
        raw = text[start:].tobytes()
        for length in range(min(self._longest, len(text)), self._shortest - 1, -1):
            end = self._ends.get(raw[-length * _TOKEN_BYTES :])
            if end is not None:
                return Guess(_continue(text, end, count), length)
        return Guess()


class Draft:
    """What one sequence may go on with, and how good such guesses have been, by the length of their match.

    Every guess is compared with how the text went on, whether or not it was proposed to the model: that shows
    for nothing when speculation begins or ceases to pay.
    """

    __slots__ = ("_chances", "_guess", "_index", "_length", "_lookup")

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._index = NgramIndex(lookup.shortest, lookup.longest)
        self._chances = [1 - _MISSED**length for length in range(lookup.longest + 1)]
        self._guess = Guess()
        self._length = 0

    def propose(self, text: Tokens, room: int, threshold: float) -> tuple[int, ...]:
        """At most ``room`` tokens to go on with, each right with a chance of at least ``threshold``."""
        self._judge(text)
        self._index.read(text)
        self._guess = self._index.guess(text, self._lookup.tokens)
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


def _piece(raw: bytes, at: int, length: int) -> bytes:
    return raw[at * _TOKEN_BYTES : (at + length) * _TOKEN_BYTES]


def _continue(text: Tokens, start: int, count: int) -> tuple[int, ...]:
    """``count`` tokens from ``start`` on; beyond the end the text repeats itself from ``start``."""
    found = text[start : start + count].tolist()
    while len(found) < count:
        found += found[: count - len(found)]
    return tuple(found)
