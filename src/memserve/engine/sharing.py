"""Who computes what a waiting prompt begins with: one prefill is enough for both. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from memserve._native import common_prefix
from memserve.core.types import Namespace
from memserve.engine.sequence import Sequence

_WORTH_TOKENS = 64
"""Waiting saves at least this much prefill, or half of what the follower has to compute."""


@dataclass(frozen=True, slots=True)
class Lead:
    """``leader`` is computing, or has just computed, the first ``tokens`` tokens of another prompt."""

    leader: Sequence
    tokens: int

    @property
    def coming(self) -> int:
        """Shared tokens that the leader has still to compute."""
        return max(0, self.tokens - self.leader.computed)

    def worth_waiting(self, follower: Sequence) -> bool:
        """Whether ``follower`` does better to wait for what is coming than to compute it as well."""
        left = follower.length - self.leader.computed
        return self.coming > 0 and self.coming >= min(_WORTH_TOKENS, left / 2)


class Leaders:
    """The running sequences that are in prefill, found by how their prompts begin."""

    def __init__(self, block_tokens: int, sequences: Iterable[Sequence]) -> None:
        self._block_tokens = block_tokens
        self._by_head: dict[tuple[Namespace, bytes], list[Sequence]] = {}
        for sequence in sequences:
            self.add(sequence)

    def add(self, sequence: Sequence) -> None:
        """A sequence runs from now on."""
        if sequence.pending > 1 and sequence.length > self._block_tokens:
            self._by_head.setdefault(self._head(sequence), []).append(sequence)

    def lead_of(self, sequence: Sequence) -> Lead | None:
        """Whoever computes most of what ``sequence`` begins with, in whole blocks; None if nobody does."""
        leads = [self._lead(leader, sequence) for leader in self._by_head.get(self._head(sequence), ())]
        return max(leads, key=lambda lead: lead.tokens, default=None)

    def _head(self, sequence: Sequence) -> tuple[Namespace, bytes]:
        return sequence.namespace, sequence.tokens[: self._block_tokens].tobytes()

    def _lead(self, leader: Sequence, follower: Sequence) -> Lead:
        # The last token of each is computed in any case: its logits are wanted.
        shared = common_prefix(leader.tokens[:-1], follower.tokens[:-1])
        return Lead(leader, shared // self._block_tokens * self._block_tokens)
