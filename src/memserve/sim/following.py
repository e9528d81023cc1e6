"""Who waits in a simulated engine for another's prefill, as in real ones (``engine.sharing``). Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from memserve.core.radix import common_tokens
from memserve.core.types import Namespace, Tokens

_WORTH_TOKENS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Prefill:
    """A prompt and how far it is computed, in tokens."""

    namespace: Namespace
    prompt: Tokens
    computed: int


@dataclass(frozen=True, slots=True, eq=False)
class Lead:
    """``leader`` (its number) computes the first ``tokens`` tokens of another prompt, whole blocks."""

    leader: int
    tokens: int
    computed: int

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
