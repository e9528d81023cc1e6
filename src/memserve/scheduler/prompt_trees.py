"""All that the scheduler believes about who holds which prefix, from whatever source it is told to trust.

Beliefs come from pools' events, or from the scheduler's own decisions and the answers to them; promises are
kept beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

from memserve.core.config import TreeSource
from memserve.core.types import InstanceId, Namespace, RequestId, Tokens
from memserve.scheduler.holdings import Holdings, Numbers, short_of
from memserve.scheduler.promises import Promises
from memserve.scheduler.recent import RecentPrompts
from memserve.scheduler.tree import GlobalPromptTree


@dataclass(frozen=True, slots=True)
class TreeOptions:
    """Where beliefs come from and what they may cost.

    ``ttl`` in seconds, with ``TreeSource.TTL`` only. ``speculative``: a prompt sent to an instance counts as
    coming there, for at most ``speculative_seconds``. ``memory`` in bytes, about; None: no limit.
    The rest is what instances do: whether they keep prompts where these were prefilled, answers where they
    were decoded, and whether answers come back to where the prompt was prefilled.
    """

    source: TreeSource = TreeSource.EVENTS
    ttl: float = 300.0
    speculative: bool = True
    speculative_seconds: float = 60.0
    memory: int | None = None
    prompts_kept: bool = True
    answers_kept: bool = True
    answers_return: bool = True


class PromptTrees:
    """Told of what pools say and of what becomes of requests; what its source is not is ignored."""

    def __init__(self, block_tokens: int, options: TreeOptions) -> None:
        self.options = options
        self._numbers = Numbers()
        self.by_events = options.source is TreeSource.EVENTS
        """Whether pools are listened to, rather than decisions and answers."""
        self._told = GlobalPromptTree(block_tokens, self._numbers, memory=options.memory)
        half = None if options.memory is None else options.memory // 2
        self._on_device = GlobalPromptTree(block_tokens, self._numbers, memory=half)
        """Of what was told, what lies on the device, of the instances that are ``_tiered``. It is a prefix of
        what is held: pools give up leaves first, and bring up from the root on."""
        self._tiered = 0
        """Bits of those that have said that KV lies below their device. All others have theirs there."""
        self._recent = RecentPrompts(block_tokens, self._numbers, options.ttl, memory=options.memory)
        self._promises = Promises(block_tokens, self._numbers, options.speculative_seconds)

    @property
    def nodes(self) -> int:
        """Compressed edges of what is believed."""
        return self._believed.nodes

    @property
    def memory(self) -> int:
        """Bytes they take, about."""
        return self._believed.memory + self._on_device.memory

    @property
    def promises(self) -> int:
        """Requests whose prompts are on their way into a pool."""
        return len(self._promises)

    def held_tokens(self, instance: InstanceId) -> int:
        """Tokens of all prefixes that ``instance`` is believed to hold."""
        return self._believed.held_tokens(instance)

    def match(self, namespace: Namespace, tokens: Tokens) -> Holdings:
        """Who holds how much of ``tokens`` (contiguous int32[n]), and who will."""
        held = self._believed.match(namespace, tokens)
        if self._tiered and held.tiers:
            there = self._on_device.match(namespace, tokens).tiers
            held = Holdings(held.tiers, lowered=short_of(held.tiers, there, self._tiered))
        if not self.options.speculative or not self._promises:
            return held
        return Holdings(held.tiers, self._promises.match(namespace, tokens), held.lowered)

    def advance(self, now: float) -> None:
        """Forget what is too old at ``now``, seconds."""
        self._promises.expire(now)
        self._recent.advance(now)

    # --- instances ---

    def enlist(self, instance: InstanceId) -> int:
        """The number of ``instance``, its own until it is dropped. Small: free numbers are given again."""
        return self._numbers.enlist(instance)

    def drop_instance(self, instance: InstanceId) -> None:
        """Forget it and everything it holds or has promised."""
        for trees in (self._told, self._on_device, self._recent, self._promises):
            trees.drop_instance(instance)
        self._tiered &= ~self._bit(instance)
        self._numbers.dismiss(instance)
        self._share_memory()

    # --- what pools say ---

    def store(self, instance: InstanceId, namespace: Namespace, tokens: Tokens) -> None:
        """Its pool holds all whole blocks of ``tokens`` (contiguous int32[n])."""
        if self.by_events:
            self._told.store(instance, namespace, tokens)
            self.raised(instance, namespace, tokens)
            self._promises.confirm(instance, namespace, tokens)

    def remove(self, instance: InstanceId, namespace: Namespace, tokens: Tokens, keep: int) -> None:
        """Of the path ``tokens`` its pool holds only the first ``keep`` tokens."""
        self._told.remove(instance, namespace, tokens, keep)
        if self._tiered & self._bit(instance):
            self._on_device.remove(instance, namespace, tokens, keep)

    def tell_tiers_apart(self, instance: InstanceId) -> None:
        """It has KV below its device: what is stored from now on counts as there until it is lowered."""
        self._tiered |= 1 << self._numbers.enlist(instance)
        self._share_memory()

    def raised(self, instance: InstanceId, namespace: Namespace, tokens: Tokens) -> None:
        """All whole blocks of ``tokens``, which its pool holds, lie on its device."""
        if self._tiered & self._bit(instance):
            self._on_device.store(instance, namespace, tokens)

    def lowered(self, instance: InstanceId, namespace: Namespace, tokens: Tokens, start: int) -> bool:
        """Of the path ``tokens`` only the first ``start`` tokens are on its device.

        False if its tiers were not told apart so far: what else is on the device is not known then.
        """
        if not self._tiered & self._bit(instance):
            return False
        self._on_device.remove(instance, namespace, tokens, start)
        return True

    def forget(self, instance: InstanceId) -> None:
        """Its pool holds nothing that was told; promises stand."""
        self._told.forget(instance)
        self._on_device.forget(instance)

    # --- what becomes of requests ---

    def promise(
        self, request: RequestId, instance: InstanceId, namespace: Namespace, tokens: Tokens, now: float
    ) -> None:
        """``instance`` was given ``tokens`` to prefill. Booking a request again replaces its promise."""
        if self.options.prompts_kept and (self.options.speculative or not self.by_events):
            self._promises.make(request, instance, namespace, tokens, now)

    def prefilled(self, request: RequestId, now: float) -> None:
        """The promise is kept. With events it stands until they tell of it, if they have not already."""
        promise = self._promises.find(request)
        if promise is None:
            return
        if not self.by_events:
            self._recent.use(promise.instance, promise.namespace, promise.tokens, now)
        elif self._told.match(promise.namespace, promise.tokens).tokens(promise.instance) < len(
            promise.tokens
        ):
            return
        self._promises.end(request)

    def used(self, instance: InstanceId, namespace: Namespace, tokens: Tokens, now: float) -> None:
        """``instance`` has computed ``tokens`` (contiguous int32[n]); with events, they will tell of it."""
        if not self.by_events:
            self._recent.use(instance, namespace, tokens, now)

    def ended(self, request: RequestId) -> None:
        """The request is over, however: nothing is promised for it any more."""
        self._promises.end(request)

    def check(self) -> None:
        """Raise ``AssertionError`` if anything contradicts itself. Costs a full pass."""
        for trees in (self._told, self._on_device, self._recent, self._promises):
            trees.check()
        for instance in self._numbers.now.numbers:
            told, there = self._told.held_tokens(instance), self._on_device.held_tokens(instance)
            assert self._tiered & self._bit(instance) or not there, f"{instance} has no tiers"
            forgets = self.options.memory is not None
            assert forgets or there <= told, f"{instance} has more on its device than it holds"

    @property
    def _believed(self) -> GlobalPromptTree | RecentPrompts:
        return self._told if self.by_events else self._recent

    def _bit(self, instance: InstanceId) -> int:
        number = self._numbers.number(instance)
        return 0 if number is None else 1 << number

    def _share_memory(self) -> None:
        """Where tiers are told apart the tree of devices may take half of it."""
        memory = self.options.memory
        self._told.keep_within(memory if memory is None or not self._tiered else memory // 2)
