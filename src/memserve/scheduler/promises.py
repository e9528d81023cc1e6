"""What instances will hold soon: the prompts of requests that were sent to them and are not stored yet.

Kept apart from what pools have told, so that it can be taken back. Knows no clock but the times it is given.
"""

from __future__ import annotations

from dataclasses import dataclass

from memserve.core.radix import common_tokens
from memserve.core.types import InstanceId, Namespace, RequestId, Tokens
from memserve.scheduler.holdings import Numbers, Tier
from memserve.scheduler.tree import GlobalPromptTree


@dataclass(slots=True, eq=False)
class Promise:
    """``instance`` computes ``tokens`` (int32[n], whole blocks) for ``request``; void from ``until`` s on."""

    request: RequestId
    instance: InstanceId
    namespace: Namespace
    tokens: Tokens
    until: float


class Promises:
    """Open promises. Each is void after ``seconds``, so that none outlives a lost event for long."""

    def __init__(self, block_tokens: int, numbers: Numbers, seconds: float) -> None:
        self._block_tokens = block_tokens
        self._seconds = seconds
        self._tree = GlobalPromptTree(block_tokens, numbers, borrows=True)
        self._open: dict[RequestId, Promise] = {}
        """In the order in which they were made, so also of ``until``."""
        self._by_instance: dict[InstanceId, dict[RequestId, Promise]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def make(
        self, request: RequestId, instance: InstanceId, namespace: Namespace, tokens: Tokens, now: float
    ) -> None:
        """``instance`` was sent the prompt ``tokens``, which nobody changes. One before is taken back."""
        self.end(request)
        whole = tokens[: len(tokens) // self._block_tokens * self._block_tokens]
        if not len(whole):
            return
        promise = Promise(request, instance, namespace, whole, now + self._seconds)
        self._open[request] = promise
        self._by_instance.setdefault(instance, {})[request] = promise
        self._tree.store(instance, namespace, whole)

    def end(self, request: RequestId) -> None:
        """Kept or taken back: it is no longer in the future. What others promise as well stays."""
        promise = self._open.pop(request, None)
        if promise is None:
            return
        others = self._by_instance[promise.instance]
        del others[request]
        keep = max((self._shared(promise, other) for other in others.values()), default=0)
        self._tree.remove(promise.instance, promise.namespace, promise.tokens, keep)
        if not others:
            del self._by_instance[promise.instance]

    def find(self, request: RequestId) -> Promise | None:
        """The open promise made for ``request``, if any."""
        return self._open.get(request)

    def confirm(self, instance: InstanceId, namespace: Namespace, tokens: Tokens) -> None:
        """``instance`` holds ``tokens`` by now: promises within that are kept."""
        kept = [
            promise.request
            for promise in self._by_instance.get(instance, {}).values()
            if len(promise.tokens) <= len(tokens)
            and promise.namespace == namespace
            and common_tokens(promise.tokens, tokens, self._block_tokens) == len(promise.tokens)
        ]
        for request in kept:
            self.end(request)

    def expire(self, now: float) -> None:
        """Take back what should have come true by ``now``."""
        while self._open:
            promise = next(iter(self._open.values()))
            if promise.until > now:
                return
            self.end(promise.request)

    def drop_instance(self, instance: InstanceId) -> None:
        """It is gone, and will keep no promise."""
        for request in self._by_instance.pop(instance, {}):
            del self._open[request]
        self._tree.drop_instance(instance)

    def match(self, namespace: Namespace, tokens: Tokens) -> tuple[Tier, ...]:
        """Who will hold how much of ``tokens`` (contiguous int32[n]), longest first."""
        return self._tree.match(namespace, tokens).tiers if self._open else ()

    def check(self) -> None:
        """Raise ``AssertionError`` if the tree says anything but the open promises. Costs a full pass."""
        self._tree.check()
        listed = {name: one for by in self._by_instance.values() for name, one in by.items()}
        assert listed == self._open, "promises by instance are not those that are open"
        expected = GlobalPromptTree(self._block_tokens)
        for one in self._open.values():
            expected.store(one.instance, one.namespace, one.tokens)
            held = self._tree.match(one.namespace, one.tokens).tokens(one.instance)
            assert held == len(one.tokens), f"{one.request}: {held} of {len(one.tokens)} tokens are promised"
        for instance in self._by_instance:
            have, should = self._tree.held_tokens(instance), expected.held_tokens(instance)
            assert have == should, f"{instance} promises {have} tokens, should be {should}"

    def _shared(self, one: Promise, other: Promise) -> int:
        if one.namespace != other.namespace:
            return 0
        return common_tokens(one.tokens, other.tokens, self._block_tokens)
