"""Who waits in a simulated engine for another's prefill, as in real ones (``engine.sharing``). Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from memserve.core.radix import common_tokens
from memserve.core.types import Namespace, StepPrices, Tokens

_WORTH_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Work:
    """Prefill by prices: from the seconds that are left of it to the tokens that are done, and back."""

    prices: StepPrices
    step_tokens: int

    @property
    def _token(self) -> float:
        return self.prices.token + self.prices.step / self.step_tokens

    def left(self, prompt: int, computed: float) -> float:
        """Seconds, alone in its steps, for what lies behind the first ``computed`` of ``prompt`` tokens."""
        context = self.prices.token_context
        return self._token * (prompt - computed) + context * (prompt**2 - computed**2) / 2

    def computed(self, prompt: int, left: float) -> float:
        """Tokens that are done when ``left`` seconds are left."""
        token, context = self._token, self.prices.token_context
        done = self.left(prompt, 0) - left
        if context == 0:
            return done / token
        return (math.sqrt(token**2 + 2 * context * done) - token) / context


@dataclass(frozen=True, slots=True, eq=False)
class Prefill:
    """A prompt and how far it is computed, in tokens."""

    namespace: Namespace
    prompt: Tokens
    computed: float


@dataclass(frozen=True, slots=True, eq=False)
class Lead:
    """``leader`` (its number) computes the first ``tokens`` tokens of another prompt, whole blocks."""

    leader: int
    tokens: int
    computed: float

    def worth_waiting(self, follower: int) -> bool:
        """Whether a prompt of ``follower`` tokens does better to wait than to compute that as well."""
        coming = self.tokens - self.computed
        return coming >= min(_WORTH_TOKENS, (follower - self.computed) / 2)


def lead_of(
    namespace: Namespace, prompt: Tokens, running: Iterable[Prefill], block_tokens: int
) -> Lead | None:
    """Whoever computes most of what ``prompt`` begins with; None if nobody does."""
    best: Lead | None = None
    for number, one in enumerate(running):
        if one.namespace != namespace:
            continue
        shared = common_tokens(one.prompt[:-1], prompt[:-1], block_tokens)
        if shared and (best is None or shared > best.tokens):
            best = Lead(number, shared, one.computed)
    return best
