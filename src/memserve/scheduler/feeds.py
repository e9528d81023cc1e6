"""One instance's pool events, brought into the order of their numbers and into the prompt trees.

Knows neither load nor membership: whose incarnation it is has been checked before.
"""

from __future__ import annotations

import enum

from memserve.core.messages import Moved, PoolEvent, PoolEvents, Removed, Snapshot
from memserve.core.types import InstanceId, unpack_tokens
from memserve.scheduler.prompt_trees import PromptTrees

MAX_EARLY_BATCHES = 64
"""Event batches kept per instance while its snapshot is awaited."""


class EventOutcome(enum.Enum):
    """What became of a batch of pool events or of a snapshot."""

    APPLIED = "applied"
    STALE_INCARNATION = "stale incarnation"
    NEEDS_SNAPSHOT = "needs snapshot"


class Feed:
    """How far the events of ``instance``'s pool have been applied to ``trees``; they number from 0."""

    def __init__(self, instance: InstanceId, trees: PromptTrees) -> None:
        self._instance = instance
        self._trees = trees
        self._next_seq = 0
        self._early: list[PoolEvents] = []
        """Batches that wait for a snapshot."""

    def apply(self, batch: PoolEvents) -> EventOutcome:
        """Apply a batch, but what is known already. After a gap nothing is until a snapshot came.

        Batches that come meanwhile are kept for it. A snapshot is also needed where an instance says for the
        first time that KV lies below its device: until then all that it holds counts as being there.
        """
        if not self._trees.by_events:
            return EventOutcome.APPLIED
        if batch.seq > self._next_seq:
            if len(self._early) == MAX_EARLY_BATCHES:
                self._early.clear()
            self._early.append(batch)
            return EventOutcome.NEEDS_SNAPSHOT
        understood = [self._apply(event) for event in batch.events[self._next_seq - batch.seq :]]
        self._next_seq = max(self._next_seq, batch.seq + len(batch.events))
        return EventOutcome.APPLIED if all(understood) else EventOutcome.NEEDS_SNAPSHOT

    def replace(self, snapshot: Snapshot) -> EventOutcome:
        """Replace all that is known of the pool, then apply the batches that came early.

        A snapshot older than the events applied already changes nothing.
        """
        if not self._trees.by_events:
            return EventOutcome.APPLIED
        if snapshot.next_seq < self._next_seq:
            return EventOutcome.NEEDS_SNAPSHOT if self._early else EventOutcome.APPLIED
        self._trees.forget(self._instance)
        if snapshot.moved:
            self._trees.tell_tiers_apart(self._instance)
        events: tuple[PoolEvent, ...] = (*snapshot.paths, *snapshot.moved)
        for event in events:
            self._apply(event)
        self._next_seq = snapshot.next_seq
        early, self._early = self._early, []
        outcomes = [self.apply(batch) for batch in early]
        gap = EventOutcome.NEEDS_SNAPSHOT in outcomes
        return EventOutcome.NEEDS_SNAPSHOT if gap else EventOutcome.APPLIED

    def _apply(self, event: PoolEvent) -> bool:
        """False if the trees know too little to take it in."""
        trees, tokens = self._trees, unpack_tokens(event.tokens)
        if isinstance(event, Removed):
            trees.remove(self._instance, event.namespace, tokens, event.keep)
        elif not isinstance(event, Moved):
            trees.store(self._instance, event.namespace, tokens)
        elif event.tier == "device":
            trees.raised(self._instance, event.namespace, tokens)
        else:
            return trees.lowered(self._instance, event.namespace, tokens, event.start)
        return True
