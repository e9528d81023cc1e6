"""From tokens to the text a client may see: incremental decoding and stop strings. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from memserve.core.types import TokenLogprob


class TokenDecoder(Protocol):
    """Turns tokens into text as they come; incomplete characters wait inside."""

    def push(self, tokens: Sequence[int]) -> str: ...

    def flush(self) -> str: ...


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token whose text was released. ``offset``: characters from the start of the answer."""

    token: int
    offset: int
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class Shown:
    """What one step released. ``stopped``: a stop string was found and nothing more will come."""

    text: str = ""
    tokens: tuple[ShownToken, ...] = ()
    stopped: bool = False


class TextStream:
    """The visible text of one answer.

    Text that could be the beginning of a stop string is held back until that is decided; a stop string
    and what follows it are never released. ``tokens_read`` counts the sampled tokens up to and including
    the one that completed a stop string.
    """

    def __init__(self, decoder: TokenDecoder, stop: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._held = ""
        self._released = 0
        self._waiting: list[ShownToken] = []
        self.tokens_read = 0
        self.stopped = False

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> Shown:
        """Read sampled tokens and release what can be shown. ``logprobs``: one per token, or none."""
        text, shown = "", []
        for number, token in enumerate(tokens):
            logprob = logprobs[number] if number < len(logprobs) else None
            self._waiting.append(ShownToken(token, self._released + len(self._held), logprob))
            self.tokens_read += 1
            text += self._release(self._decoder.push((token,)), hold=True)
            shown += self._release_tokens(everything=False)
            if self.stopped:
                break
        return Shown(text, tuple(shown), self.stopped)

    def skip(self, count: int) -> None:
        """Count tokens that have no text to show, such as the end-of-turn token."""
        self.tokens_read += count

    def finish(self) -> Shown:
        """The answer has ended by itself: release what was held back."""
        text = self._release(self._decoder.flush(), hold=False)
        return Shown(text, tuple(self._release_tokens(everything=not self.stopped)), self.stopped)

    def _release(self, more: str, *, hold: bool) -> str:
        self._held += more
        cut = find_stop(self._held, self._stop)
        if cut is not None:
            self.stopped = True
            released, self._held = self._held[:cut], ""
        else:
            keep = held_back(self._held, self._stop) if hold else 0
            end = len(self._held) - keep
            released, self._held = self._held[:end], self._held[end:]
        self._released += len(released)
        return released

    def _release_tokens(self, *, everything: bool) -> list[ShownToken]:
        """A token goes out with the first character of its text; tokens of a stop string never do."""
        ready = [entry for entry in self._waiting if everything or entry.offset < self._released]
        del self._waiting[: len(ready)]
        return ready


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where in ``text`` the earliest stop string begins, if one is there."""
    places = [place for place in (text.find(end) for end in stop) if place >= 0]
    return min(places, default=None)


def held_back(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that begins a stop string."""
    return max((_overlap(text, end) for end in stop), default=0)


def _overlap(text: str, end: str) -> int:
    longest = min(len(text), len(end) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(end[:size])), 0)
