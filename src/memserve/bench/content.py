"""What prompts are made of: text as it is, or a run of made-up tokens named by a number. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RUN_TOKENS = 512
"""Tokens that one number stands for in a Mooncake trace; a run may be shorter, never longer."""

# Each is one token, with the space before it, in the vocabularies of common byte-level BPE models.
_ONE_TOKEN_EACH = (
    "the of and to in is that for it as was with be by on not he this are or his from at which but have "
    "an had they you were their one all we can her has there been if more when will would who so no out "
    "up into than them only other new some could time these two may then do first any my now such like "
    "our over man me even most made after also did many before must through back years where much your "
    "way well down should because each just those people how too little state good very make world still "
    "own see men work long get here between both life being under never day same another know while last "
    "might us great old year off come since against go came right used take three"
)
_WORDS = tuple(_ONE_TOKEN_EACH.split())


@dataclass(frozen=True, slots=True)
class Text:
    """Words as a person or a document wrote them."""

    text: str


@dataclass(frozen=True, slots=True)
class Run:
    """The first ``tokens`` of the 512 made-up tokens called ``key``; equal keys mean equal tokens."""

    key: int
    tokens: int

    def __post_init__(self) -> None:
        assert 0 <= self.tokens <= RUN_TOKENS, f"a run has at most {RUN_TOKENS} tokens, not {self.tokens}"


Content = tuple[Text | Run, ...]


def make_runs(key: int, tokens: int) -> Content:
    """``tokens`` made-up tokens as runs with the keys ``key``, ``key + 1``, ..."""
    starts = range(0, tokens, RUN_TOKENS)
    return tuple(Run(key + at, min(RUN_TOKENS, tokens - start)) for at, start in enumerate(starts))


def splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The mixer of Steele, Lea and Flood's SplittableRandom; ``values`` and result: uint64[n]."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def draw_uniform(seed: int, stream: int, count: int) -> npt.NDArray[np.float64]:
    """``count`` numbers in [0, 1), the same for equal ``seed`` and ``stream`` on every machine."""
    start = splitmix64(splitmix64(np.array([seed], np.uint64)) + np.uint64(stream))
    places = np.add(start, np.arange(count, dtype=np.uint64), dtype=np.uint64)
    return (splitmix64(places) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw_exponential(seed: int, stream: int, count: int, mean: float) -> list[float]:
    """``count`` exponentially distributed numbers with this mean."""
    values: list[float] = (-np.log1p(-draw_uniform(seed, stream, count)) * mean).tolist()
    return values


def run_tokens(run: Run, vocabulary: int) -> list[int]:
    """Token ids of a run: token j is splitmix64(key * 512 + j) mod ``vocabulary``."""
    places = np.uint64(run.key) * np.uint64(RUN_TOKENS) + np.arange(run.tokens, dtype=np.uint64)
    tokens: list[int] = (splitmix64(places) % np.uint64(vocabulary)).tolist()
    return tokens


def render_text(content: Content) -> str:
    """The content as text; a run's tokens become words, about one token each."""
    return "".join(piece.text if isinstance(piece, Text) else _say(piece) for piece in content)


def render_tokens(content: Sequence[Text | Run], vocabulary: int) -> list[int] | None:
    """The content as token ids, or None if some of it is text."""
    tokens: list[int] = []
    for piece in content:
        if isinstance(piece, Text):
            return None
        tokens += run_tokens(piece, vocabulary)
    return tokens


def _say(run: Run) -> str:
    return "".join(f" {_WORDS[token]}" for token in run_tokens(run, len(_WORDS)))
