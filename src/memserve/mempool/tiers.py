"""Where historical KV lies: makes room in a tier, and moves blocks down and up between tiers.

What a tier gives up goes to the next one below that has room, and is dropped only where there is none.
Knows block numbers and the index; addresses, leases and transfers are the pool's business.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memserve._native import copy_blocks
from memserve.core.clock import Clock
from memserve.core.errors import OutOfBlocks
from memserve.core.radix import Path
from memserve.core.types import Namespace, Tokens
from memserve.mempool.address import BlockNumbers, Origin, Tier
from memserve.mempool.arena import Arena
from memserve.mempool.blocks import BlockTable, Edges
from memserve.mempool.events import EventLog
from memserve.mempool.eviction import EvictionPolicy, LeastRecentlyUsed, Victim
from memserve.mempool.index import IndexEntry, IndexNode, PromptIndex, open_children
from memserve.mempool.shelf import DiskShelf
from memserve.mempool.stats import Counters, EvictionCause
from memserve.mempool.usage import Usage


class Tiers:
    """The tiers of one pool. ``eviction`` chooses on the device; lower tiers give up what they have not seen
    used or arrive for longest. What a device block continues lies on the device too.
    """

    def __init__(
        self,
        table: BlockTable,
        index: PromptIndex,
        eviction: EvictionPolicy,
        clock: Clock,
        arena: Arena,
        disk: DiskShelf | None,
        events: EventLog,
        counters: Counters,
    ) -> None:
        self._table = table
        self._index = index
        self._arena = arena
        self._disk = disk
        self._events = events
        self._counters = counters
        self._clock = clock
        self._uses = eviction
        """Told of all uses, whatever the tier: the past of blocks goes with them from tier to tier."""
        self._policies = (eviction, LeastRecentlyUsed(), LeastRecentlyUsed())

    @property
    def lower(self) -> tuple[Tier, ...]:
        """The tiers below the device that have blocks."""
        if not self._table.tiered:
            return ()
        return tuple(tier for tier in (Tier.HOST, Tier.DISK) if self._table.capacity[tier])

    # --- use ---

    def use(self, path: Path[IndexEntry]) -> None:
        """The blocks of ``path`` were asked for just now."""
        self._uses.use(path, self._clock.now())

    def publish(self, namespace: Namespace, tokens: Tokens, path: Path[IndexEntry], blocks: int) -> Usage:
        """The past of ``blocks`` blocks of ``tokens`` that are about to be indexed beyond ``path``."""
        return self._uses.publish(namespace, tokens, path, blocks, self._clock.now())

    def count_hits(self, blocks: BlockNumbers) -> None:
        """These blocks were matched: count what lay in lower tiers."""
        if self._table.all_on_device(blocks):
            return
        step = self._index.block_tokens
        self._counters.host_hit_tokens += len(self._table.part(blocks, Tier.HOST)) * step
        self._counters.disk_hit_tokens += len(self._table.part(blocks, Tier.DISK)) * step

    def add_leaf(self, node: IndexNode) -> None:
        """``node`` is new, or has lost what continued it: it may be given up from now on, if nothing does."""
        if open_children(node) == 0:
            self._policies[node.payload.tier].add_leaf(node)

    # --- down ---

    def make_room(
        self, n: int, tier: Tier = Tier.DEVICE, cause: EvictionCause = EvictionCause.ALLOCATION
    ) -> None:
        """See to ``n`` free blocks in ``tier``, giving up exactly what is missing. Raises ``OutOfBlocks``."""
        missing = n - self._table.free_in(tier)
        if missing <= 0:
            return
        victims = None
        if missing <= self._table.historical_in(tier):
            victims = self._policies[tier].choose(missing, self._table.idle_tail, self._clock.now())
        if victims is None:
            states = self._table.counts(tier)
            raise OutOfBlocks(
                asked=n,
                free=states.free,
                evictable=states.historical,
                pinned=states.active + states.incoming,
            )
        lower = tuple(below for below in self.lower if below > tier)
        if lower:
            for victim in victims:
                self._give_up(victim.node, victim.keep, lower, cause)
        else:
            self._counters.evictions[cause] += self._drop_all(victims)

    def swap_out(self, n: int) -> int:
        """Move up to ``n`` historical blocks of the device down. Returns how many were moved."""
        room = max((self._fit(n, tier) for tier in self.lower), default=0)
        return self._move_coldest(min(room, n), Tier.DEVICE, self.lower, EvictionCause.SWAP)

    def shed(self, n: int, tier: Tier) -> None:
        """Free up to ``n`` blocks of ``tier`` by giving up its coldest KV: as many as nobody holds."""
        lower = tuple(below for below in self.lower if below > tier)
        goal = self._table.free_in(tier) + n
        while (missing := goal - self._table.free_in(tier)) > 0:
            self._move_coldest(missing, tier, lower, EvictionCause.RESIZE)
            if goal - self._table.free_in(tier) == missing and not self._drop_branch(tier):
                return

    def _drop_branch(self, tier: Tier) -> bool:
        """Drop an edge in ``tier`` that only what lies above it continues. False if all are in use.

        A block of the host may continue one on disk, which no policy gives up then.
        """
        for node in self._index.nodes_now():
            idle = node.payload.tier is tier and node.children and not self._is_held(node)
            if idle:
                self._counters.evictions[EvictionCause.RESIZE] += self.drop(node, 0)
                return True
        return False

    def _is_held(self, node: IndexNode) -> bool:
        """Whether a block of ``node``'s edge or of what continues it is referenced."""
        waiting = [node]
        while waiting:
            edge = waiting[-1].payload.blocks
            if self._table.idle_tail(edge, len(edge), len(edge)) < len(edge):
                return True
            waiting.extend(waiting.pop().children.values())
        return False

    def coldest(self, n: int) -> list[tuple[Namespace, Tokens]]:
        """Paths that end with what the device would give up next, ``n`` blocks of it or all that can go."""
        victims = self._choose_coldest(n, Tier.DEVICE)
        for victim in victims:
            self.add_leaf(victim.node)
        return [(victim.node.payload.namespace, self._index.path_tokens(victim.node)) for victim in victims]

    def persist(self) -> int:
        """Move all historical KV to the disk tier, which keeps the warmest. Returns how many blocks went."""
        moved, lower = 0, (Tier.DISK,)
        for tier in (Tier.HOST, Tier.DEVICE) if self._disk is not None else ():
            wanted = self._table.historical_in(tier)
            while count := self._move_coldest(wanted, tier, lower, EvictionCause.SWAP):
                moved += count
        return moved

    def _move_coldest(self, n: int, tier: Tier, lower: tuple[Tier, ...], cause: EvictionCause) -> int:
        victims = self._choose_coldest(n, tier)
        return sum(self._give_up(victim.node, victim.keep, lower, cause) for victim in victims)

    def _choose_coldest(self, n: int, tier: Tier) -> list[Victim]:
        """Victims of ``n`` blocks, or of the half of it, or of a quarter, ..., if there are no more."""
        policy, now = self._policies[tier], self._clock.now()
        n = min(n, self._table.historical_in(tier))
        while n > 0:
            victims = policy.choose(n, self._table.idle_tail, now)
            if victims is not None:
                return victims
            # Some of the historical blocks are continued by blocks in use.
            n //= 2
        return []

    def drop(self, node: IndexNode, keep: int) -> int:
        """Forget all but ``keep`` blocks of ``node``'s edge and all that continues it. Returns how many."""
        parent = node.parent
        count = self._drop_all([Victim(node, keep)])
        if keep or parent is not None:
            self.add_leaf(node if keep or parent is None else parent)
        return count

    def _drop_all(self, victims: list[Victim]) -> int:
        """The same for many at once; what has become a leaf is not made known."""
        edges: Edges = []
        for victim in reversed(victims):
            if not victim.node.attached:
                # It went with what it continues, which is a victim too.
                continue
            dropped = self._index.drop(victim.node, victim.keep)
            edges += dropped.edges
            self._events.removed(victim.node.payload.namespace, dropped.path, dropped.keep)
        if self._disk is not None:
            self._leave_disk(np.concatenate(edges).astype(np.int64))
        return self._table.unindex(edges)

    def _give_up(self, node: IndexNode, keep: int, lower: tuple[Tier, ...], cause: EvictionCause) -> int:
        """Move what ``node`` has beyond ``keep`` blocks, all idle, to one of the tiers ``lower``.

        What cannot go there is dropped. Returns how many blocks were moved.
        """
        if not node.attached:
            # It went with what it continued, a victim before it that found no room below.
            return 0
        count = len(node.payload.blocks) - keep
        below = max(lower, key=lambda tier: self._fit(count, tier), default=None)
        fit = 0 if below is None else self._make_fit(count, below, cause)
        if fit < count:
            self._counters.evictions[cause] += self.drop(node, keep + fit)
        if below is None or fit == 0:
            return 0
        if keep:
            self.add_leaf(self._index.split(node, keep))
        if not self._move_down(node, below):
            self._counters.evictions[cause] += self.drop(node, 0)
            return 0
        return fit

    def _fit(self, count: int, tier: Tier) -> int:
        return min(count, self._table.free_in(tier) + self._table.historical_in(tier))

    def _make_fit(self, count: int, tier: Tier, cause: EvictionCause) -> int:
        """Make room for as many of ``count`` blocks as seem to go into ``tier``: 0 if it cannot be had."""
        fit = self._fit(count, tier)
        try:
            self.make_room(fit, tier, cause)
        except OutOfBlocks:
            fit = self._table.free_in(tier)
        return fit

    def _move_down(self, node: IndexNode, tier: Tier) -> bool:
        """Move ``node``'s whole edge to free blocks of ``tier``. False, and nothing, if the disk refuses."""
        entry, above, parent = node.payload, node.payload.tier, node.parent
        old = entry.blocks.astype(np.int64)
        new = self._table.alloc(len(old), tier)
        if tier is Tier.HOST:
            copy_blocks(self._arena.pointers(new), self._arena.pointers(old), self._arena.piece_bytes)
        elif not self._require_disk().write(
            new, old, self._table.origins_of(old), entry.namespace, self._index.path_tokens(node)
        ):
            self._table.release(new)
            return False
        self._move(node, old, new, tier, self._table.origins_of(old))
        self._table.release(new)
        if parent is not None and parent.payload.tier is above:
            self.add_leaf(parent)
        self._counters.swapped_out_blocks += len(old)
        return True

    def _move(
        self,
        node: IndexNode,
        old: BlockNumbers,
        new: BlockNumbers,
        tier: Tier,
        origins: Origin | NDArray[np.uint8],
    ) -> None:
        """Let held blocks ``new`` of ``tier`` stand for ``node``'s whole edge in the place of ``old``."""
        entered = self._table.index(new, origins)
        assert entered, "a block that takes another's place must be held and new to the index"
        fresh = self._index.place(node, new, tier)
        self._leave_disk(old)
        self._table.unindex([old.astype(np.int32)])
        self.add_leaf(fresh)
        path = self._index.path_tokens(fresh)
        self._events.moved(fresh.payload.namespace, path, len(path) - len(fresh.key), tier)

    # --- up ---

    def bring_up(self, blocks: BlockNumbers) -> BlockNumbers:
        """Device blocks with the KV of ``blocks``, held once for the caller: int64[n].

        Fewer, when a block turned out to be corrupt: it is dropped with all that continues it. Raises
        ``OutOfBlocks``, and then nothing has moved.
        """
        lower = ~self._table.on_device(blocks)
        self._table.retain(blocks)
        below = blocks[lower]
        try:
            self.make_room(len(below))
        except OutOfBlocks:
            self._table.release(blocks)
            raise
        fresh = self._table.alloc(len(below))
        good = self._copy_up(below, fresh)
        self._table.release(fresh[good:])
        self._reindex(below[:good], fresh[:good])
        if good < len(below):
            self._drop_corrupt(int(below[good]))
        self._table.release(below)
        self._counters.swapped_in_blocks += good
        result = blocks.copy()
        result[np.flatnonzero(lower)[:good]] = fresh[:good]
        if good == len(below):
            return result
        end = int(np.flatnonzero(lower)[good])
        after = result[end:]
        self._table.release(after[self._table.on_device(after)])
        return result[:end]

    def replace(self, nodes: list[IndexNode], tail: int, blocks: BlockNumbers, origin: Origin) -> None:
        """Let held device ``blocks`` stand for the path ``nodes`` where that lies lower.

        ``tail`` blocks of the last node belong to the path, all of the others; ``blocks`` covers it.
        """
        at = 0
        for node in nodes:
            size = tail if node is nodes[-1] else len(node.payload.blocks)
            if node.payload.tier is not Tier.DEVICE:
                part = self._index.split(node, size) if size < len(node.payload.blocks) else node
                old = part.payload.blocks.astype(np.int64)
                self._move(part, old, blocks[at : at + size], Tier.DEVICE, origin)
            at += size

    def _copy_up(self, below: BlockNumbers, fresh: BlockNumbers) -> int:
        """Fill device blocks; returns how many from the first on hold what they should."""
        host = self._table.tiers_of(below) == Tier.HOST
        copy_blocks(
            self._arena.pointers(fresh[host]), self._arena.pointers(below[host]), self._arena.piece_bytes
        )
        for at in np.flatnonzero(~host).tolist():
            if not self._require_disk().read(int(below[at]), int(fresh[at])):
                return int(at)
        return len(below)

    def _reindex(self, below: BlockNumbers, fresh: BlockNumbers) -> None:
        """Let device blocks stand in the index for those they were copied from, edge by edge.

        Where a prefix has stayed below they do not; they are just copies then.
        """
        at = 0
        while at < len(below):
            node = self._index.holder_of(int(below[at]))
            size = 0 if node is None else _common_start(node.payload.blocks, below[at:])
            if node is None or size == 0 or not _begins_on_device(node):
                at += 1
                continue
            part = self._index.split(node, size) if size < len(node.payload.blocks) else node
            old, new = below[at : at + size], fresh[at : at + size]
            self._move(part, old, new, Tier.DEVICE, self._table.origins_of(old))
            at += size

    def _drop_corrupt(self, block: int) -> None:
        self._counters.corrupt_blocks += 1
        node = self._index.holder_of(block)
        if node is not None:
            self.drop(node, int(np.flatnonzero(node.payload.blocks == block)[0]))

    # --- what a restart finds ---

    def reattach(self, namespace: Namespace, tokens: Tokens) -> None:
        """Index what the disk holds beyond ``tokens`` (int32[n]), a path that is indexed."""
        if self._disk is None or not self._disk.orphans:
            return
        for path, blocks, origins in list(self._disk.continuations(namespace, tokens)):
            found = self._index.find(namespace, path)
            count = len(path) // self._index.block_tokens - len(found.blocks)
            above = int(np.count_nonzero(self._table.on_device(found.blocks)))
            new = blocks[len(blocks) - count :]
            if count:
                self._disk.take(new)
                self._table.restore(new, origins[len(blocks) - count :], Tier.DISK)
                usage = self.publish(namespace, path, found.path, count)
                leaf = self._index.add(namespace, path, found, new, usage, Tier.DISK)
                self.add_leaf(leaf)
                self._events.stored(namespace, path)
                # Stored means on the device: what the leaf continues may have come from the disk as well.
                self._events.moved(namespace, path, above * self._index.block_tokens, Tier.DISK)

    def reattach_all(self) -> None:
        """Index all that the disk holds from its beginning on; the rest waits for its prompts."""
        if self._disk is None:
            return
        for namespace in self._disk.orphans.namespaces:
            self.reattach(namespace, np.empty(0, np.int32))
        self._table.use_last(self._disk.orphaned, Tier.DISK)

    def forget_orphans(self, namespace: Namespace) -> None:
        """Something was deleted: what may continue it must not come back from the disk."""
        if self._disk is not None:
            self._disk.erase_orphans(namespace)

    # --- inside ---

    def _leave_disk(self, blocks: BlockNumbers) -> None:
        if self._disk is not None:
            self._disk.erase(self._table.part(blocks, Tier.DISK))

    def _require_disk(self) -> DiskShelf:
        assert self._disk is not None, "a pool without a disk tier has no blocks there"
        return self._disk


def _begins_on_device(node: IndexNode) -> bool:
    return node.parent is None or node.parent.payload.tier is Tier.DEVICE


def _common_start(edge: NDArray[np.int32], blocks: BlockNumbers) -> int:
    """How many of ``blocks`` are those with which ``edge`` begins."""
    longest = min(len(edge), len(blocks))
    differs = np.flatnonzero(edge[:longest] != blocks[:longest])
    return int(differs[0]) if len(differs) else longest
