"""A pool on its own: memory, index, tiers, leases and pins. Knows no peers.

Composed of an arena (bytes), a block table (states), an index (prompt trees) and tiers (what lies where).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from memserve._native import count_different
from memserve.core.clock import Clock
from memserve.core.errors import ConfigError, InvalidRequest, StaleAddress
from memserve.core.messages import Moved, PoolEvents, Snapshot, Stored
from memserve.core.types import InstanceId, Namespace, Tokens, pack_tokens
from memserve.mempool.address import Addresses, BlockNumbers, Origin, Tier, are_distinct, numbers_of
from memserve.mempool.arena import Arena, Extent
from memserve.mempool.blocks import BlockTable
from memserve.mempool.disk import DiskStore, DiskTier
from memserve.mempool.elastic import Elastic
from memserve.mempool.events import EventLog
from memserve.mempool.eviction import EvictionPolicy, HitDensity
from memserve.mempool.index import Found, PromptIndex
from memserve.mempool.layout import KVLayout
from memserve.mempool.match import Match
from memserve.mempool.pins import PINNED_SHARE, Pin, PinTable
from memserve.mempool.results import Freed, Inserted, Resized
from memserve.mempool.shelf import DiskShelf
from memserve.mempool.stats import Counters, PoolStats
from memserve.mempool.tiers import Tiers


class LocalPool:
    """What a :class:`~memserve.mempool.pool.MemPool` is without transfers; see there."""

    def __init__(
        self,
        layout: KVLayout,
        blocks: int,
        *,
        instance: InstanceId,
        incarnation: int,
        clock: Clock,
        eviction: EvictionPolicy | None = None,
        host_blocks: int = 0,
        disk: DiskTier | None = None,
        borrows_tokens: bool = False,
    ) -> None:
        if blocks < 1:
            raise ConfigError(
                f"pool.memory has no room for one block of {layout.block_bytes} bytes; raise it"
            )
        self.layout = layout
        self.instance = instance
        self.incarnation = incarnation
        self._clock = clock
        self._table = BlockTable(blocks, host_blocks, 0 if disk is None else disk.blocks)
        self._store = None if disk is None else DiskStore(disk, layout)
        self.arena = Arena.allocate(layout.block_bytes, blocks, f"memserve-{instance}", layout.pieces)
        if host_blocks:
            self.arena.grow(Extent(blocks, host_blocks), f"memserve-{instance}-host")
        shelf = None
        if self._store is not None:
            shelf = DiskShelf(self._store, layout, self.arena, self._table.numbers_in(Tier.DISK))
        self._index = PromptIndex(layout.block_tokens, borrows=borrows_tokens)
        self._events = EventLog(instance, incarnation)
        self._leases: set[Match] = set()
        self._pins = PinTable(int(blocks * PINNED_SHARE))
        self._counters = Counters()
        self._tiers = Tiers(
            self._table,
            self._index,
            eviction or HitDensity(blocks, layout.block_tokens),
            clock,
            self.arena,
            shelf,
            self._events,
            self._counters,
        )
        self._elastic = Elastic(self._table, self._tiers, self.arena, shelf, instance)
        self._tiers.reattach_all()

    @property
    def blocks(self) -> int:
        """Blocks that the device tier is to have, whatever their state."""
        return self.size_of(Tier.DEVICE)

    def size_of(self, tier: Tier) -> int:
        """Blocks that a tier is to have; while it shrinks it may have more."""
        return self._table.capacity[tier] - self._elastic.surplus[tier]

    def close(self) -> None:
        """Let go of the memory; the pool must not be used afterwards. Repeatable. See :meth:`persist`."""
        self.arena.close()
        store, self._store = self._store, None
        if store is not None:
            store.close()

    # --- memory ---------------------------------------------------------------------------------------

    def alloc_mem(self, n: int, tier: Tier = Tier.DEVICE) -> Addresses:
        """Allocate ``n`` blocks of memory, each with one reference, all or none. Contents are undefined.

        Swaps out historical KV if it must, or evicts it where no lower tier has room: exactly as much as is
        needed. Raises ``OutOfBlocks``, or ``ConfigError`` for a tier that is not there or not memory.
        """
        if tier is not Tier.DEVICE and (tier is Tier.DISK or not self._table.capacity[tier]):
            have = "device and host" if self._table.capacity[Tier.HOST] else "device"
            raise ConfigError(f"this pool has no {tier.name.lower()} tier to allocate from; it has {have}")
        if n < 0:
            raise InvalidRequest(f"{n} blocks cannot be allocated", field="n")
        self._tiers.make_room(n, tier)
        return Addresses(self.instance, self.incarnation, self._table.alloc_at(n, tier))

    def free_mem(self, addrs: Addresses) -> Freed:
        """Drop one reference of each block; one with none left becomes historical if indexed, else free.

        An address whose block was freed since, or which nobody holds, is counted as stale, not refused.
        """
        stale = self._table.release_at(addrs.packed) if self._owns(addrs) else len(addrs)
        self._counters.stale += stale
        self._elastic.settle()
        return Freed(len(addrs) - stale, stale)

    def retain(self, addrs: Addresses) -> None:
        """Add one reference to each block, to be ended with ``free_mem``. Raises ``StaleAddress``.

        Blocks must be held or cached; a free block has no present address.
        """
        self._table.retain(self._numbers(addrs))

    def swap_out(self, n: int) -> int:
        """Move the coldest historical KV of the device one tier down: up to ``n`` blocks.

        The index goes on knowing it, elsewhere. Returns how many blocks moved: fewer where less is
        historical, or where the lower tiers are full of what is held; 0 without lower tiers.
        """
        return self._tiers.swap_out(n)

    def swap_in(self, addrs: Addresses) -> Addresses:
        """Bring blocks up to the device; readable on return. The result is held: one reference each.

        Blocks on the device already are just retained. Those from below move in the index too, and their
        old addresses go stale once nobody holds them. Ends before a block whose bytes do not agree with
        their checksum; that one, and what continues it, is forgotten. Raises ``OutOfBlocks``,
        ``StaleAddress``, and nothing has moved then.
        """
        numbers = self._numbers(addrs)
        if self._table.all_on_device(numbers):
            self._table.retain(numbers)
            return addrs
        if not are_distinct(numbers):
            raise InvalidRequest("a block can be swapped in once at a time", field="addrs")
        return self._addresses(self._tiers.bring_up(numbers))

    def resize(self, tier: Tier, blocks: int) -> Resized:
        """Let ``tier`` have ``blocks`` blocks from now on, while requests go on.

        Growing takes memory (or disk space) at once. Shrinking retires free blocks and the coldest historical
        ones, which go to a lower tier as far as there is room, and gives their memory back; blocks that
        somebody holds follow when they are let go of, before they can be allocated again. What is held stays
        where it is. The last call counts. Raises ``InvalidRequest``, or ``ConfigError`` when the system
        refuses; nothing has changed then.
        """
        resized = self._elastic.resize(tier, blocks)
        self._pins.limit = int(self.blocks * PINNED_SHARE)
        return resized

    def persist(self) -> int:
        """Move all historical KV to disk before :meth:`close`, as much as fits, for the next start.

        Returns how many blocks were moved: 0 without a disk tier.
        """
        return self._tiers.persist()

    def pointers(self, addrs: Addresses) -> NDArray[np.uint64]:
        """Where the blocks lie in this process's memory: uint64[n], or uint64[n * layout.pieces].

        Raises ``StaleAddress``, or ``InvalidRequest`` for blocks on disk.
        """
        numbers = self._numbers(addrs)
        if len(self._table.part(numbers, Tier.DISK) if self._store is not None else ()):
            raise InvalidRequest("blocks on disk have no pointers; swap them in first", field="addrs")
        return self.arena.pointers(numbers)

    # --- index ----------------------------------------------------------------------------------------

    def insert(
        self, tokens: Tokens, addrs: Addresses, namespace: Namespace, origin: Origin = Origin.COMPUTED
    ) -> Inserted:
        """Publish the KV of ``tokens`` (int32[n]) in whole blocks: ``addrs[i]`` holds the i-th of them.

        References stay the caller's. Where other blocks are known for the same tokens those stay in the
        index, and the caller's are duplicates, free once the caller frees them. Raises ``StaleAddress``,
        or ``InvalidRequest`` when ``addrs`` do not cover the tokens or are already used for others.
        Blocks must lie on the device; where the index knows lower ones, these take their place.
        """
        full = len(tokens) // self.layout.block_tokens
        if len(addrs) < full:
            raise InvalidRequest(f"{len(addrs)} addresses for {full} blocks of tokens", field="addrs")
        numbers = self._numbers(addrs[:full] if len(addrs) > full else addrs)
        found = self._index.find(namespace, tokens)
        if self._table.tiered and not self._table.all_on_device(found.blocks):
            found = self._raise_known(namespace, tokens, found, numbers, origin)
        known = found.path.blocks
        duplicate = count_different(found.edges, numbers)
        added = numbers[known:]
        if not (self._table.all_on_device(added) and self._table.index(added, origin)):
            self._refuse_insert(added)
        usage = self._tiers.publish(namespace, tokens, found.path, len(added))
        if known == full:
            return Inserted(0, duplicate)
        self._tiers.add_leaf(self._index.add(namespace, tokens, found, added, usage))
        whole = tokens[: full * self.layout.block_tokens]
        self._events.stored(namespace, whole)
        self._tiers.reattach(namespace, whole)
        return Inserted(full - known, duplicate)

    def match(
        self,
        tokens: Tokens,
        namespace: Namespace,
        limit_tokens: int | None = None,
        *,
        lease_seconds: float | None = None,
    ) -> Match:
        """Find the longest cached prefix of ``tokens`` (int32[n]), at most ``limit_tokens`` long.

        The result holds a lease on its blocks; use it in a ``with`` statement. A lease taken on behalf of
        somebody who may vanish gets ``lease_seconds``, after which :meth:`expire` ends it.
        """
        wanted = tokens if limit_tokens is None else tokens[: max(limit_tokens, 0)]
        deadline = None if lease_seconds is None else self._clock.now() + lease_seconds
        lease = self._lease(wanted, namespace, deadline)
        self._counters.hit_tokens += lease.tokens
        self._counters.miss_tokens += len(tokens) - lease.tokens
        if self._table.tiered:
            self._tiers.count_hits(numbers_of(lease.addrs.packed))
        return lease

    def count_cached(self, tokens: Tokens, namespace: Namespace) -> int:
        """How many tokens at the beginning of ``tokens`` (int32[n]) are cached. No lease is taken."""
        return len(self._index.find(namespace, tokens).blocks) * self.layout.block_tokens

    def delete(self, tokens: Tokens, namespace: Namespace) -> int:
        """Forget the entry ``tokens`` and whatever continues it; blocks shared with other entries stay.

        Returns how many blocks left the index. Those still held are freed by their last holder.
        """
        end = self._index.exclusive_end(namespace, tokens)
        count = 0 if end is None else self._tiers.drop(*end)
        self._tiers.forget_orphans(namespace)
        for pin in self._pins:
            if len(self._index.find(pin.namespace, pin.tokens).blocks) < len(pin.addrs):
                self.unpin(pin.tokens, pin.namespace)
        self._elastic.settle()
        return count

    def pin(self, tokens: Tokens, namespace: Namespace, ttl: float) -> int:
        """Keep the KV of ``tokens`` (int32[n], cached in full) on the device for ``ttl`` seconds.

        A pin that exists is renewed. Only :meth:`delete` and :meth:`unpin` end one before its time. Returns
        how many blocks it covers. Raises ``InvalidRequest`` when the KV is not all here or pins would hold
        more than their share of the device, ``OutOfBlocks`` when there is no room to bring it up.
        """
        whole = tokens[: len(tokens) // self.layout.block_tokens * self.layout.block_tokens]
        if not ttl > 0 or not len(whole):
            raise InvalidRequest("a pin needs a positive ttl and at least one block of tokens", field="ttl")
        with self._lease(whole, namespace, None) as lease:
            addrs = self.swap_in(lease.addrs)
        wanted, limit = self._pins.blocks_with(addrs), self._pins.limit
        if len(addrs) * self.layout.block_tokens < len(whole) or wanted > limit:
            self.free_mem(addrs)
            have = f"{len(addrs) * self.layout.block_tokens} of {len(whole)} tokens are cached"
            raise InvalidRequest(f"{have}; pins would hold {wanted} of {limit} blocks", field="tokens")
        replaced = self._pins.add(Pin(namespace, whole.copy(), addrs, self._clock.now() + ttl))
        if replaced is not None:
            self.free_mem(replaced.addrs)
        return len(addrs)

    def unpin(self, tokens: Tokens, namespace: Namespace) -> bool:
        """End a pin; its blocks stay cached. False if there was none."""
        whole = tokens[: len(tokens) // self.layout.block_tokens * self.layout.block_tokens]
        pin = self._pins.take(namespace, whole)
        if pin is not None:
            self.free_mem(pin.addrs)
        return pin is not None

    def _end_overdue(self, now: float) -> None:
        for lease in [x for x in self._leases if x.deadline is not None and x.deadline <= now]:
            lease.release("its deadline has passed")
        for pin in [x for x in self._pins if x.deadline <= now]:
            self.unpin(pin.tokens, pin.namespace)

    # --- observation ----------------------------------------------------------------------------------

    def on_events(self, notify: Callable[[], None]) -> None:
        """Have ``notify`` called when the first event since the last :meth:`take_events` happens."""
        self._events.follow(notify)

    def take_events(self) -> PoolEvents | None:
        """Index events since the last call. A gap in the numbers means: ask for :meth:`snapshot`.

        They are kept from the first call on, or from :meth:`on_events` or :meth:`snapshot`.
        """
        return self._events.take()

    def snapshot(self) -> Snapshot:
        """All that the index holds, one path per leaf. Supersedes the events that were not taken yet."""
        self._events.forget()
        paths = tuple(Stored(namespace, pack_tokens(tokens)) for namespace, tokens in self._index.paths())
        moved = tuple(
            Moved(namespace, pack_tokens(tokens), start, tier.label)
            for namespace, tokens, start, tier in self._index.lowered()
        )
        return Snapshot(self.instance, self.incarnation, self._events.next_seq, paths, moved)

    def stats(self) -> PoolStats:
        """State and counters as a frozen value. Costs a pass over the block table."""
        states, count = self._table.counts(), self._counters
        return PoolStats(
            blocks=self.blocks,
            draining=self._elastic.surplus[Tier.DEVICE],
            free=states.free,
            active=states.active,
            historical=states.historical,
            incoming=states.incoming,
            host=self._table.counts(Tier.HOST),
            disk=self._table.counts(Tier.DISK),
            pinned=self._pins.blocks,
            leases=len(self._leases),
            tree_nodes=self._index.nodes,
            tree_blocks=self._index.blocks,
            hit_tokens=count.hit_tokens,
            miss_tokens=count.miss_tokens,
            host_hit_tokens=count.host_hit_tokens,
            disk_hit_tokens=count.disk_hit_tokens,
            evicted_blocks=sum(count.evictions.values()),
            swapped_out_blocks=count.swapped_out_blocks,
            swapped_in_blocks=count.swapped_in_blocks,
            corrupt_blocks=count.corrupt_blocks,
            sent=count.sent,
            sent_bytes=count.sent_bytes,
            spared_bytes=count.spared_bytes,
            received=count.received,
            received_bytes=count.received_bytes,
            stale=count.stale,
            aborts=dict(count.aborts),
            evictions=dict(count.evictions),
        )

    def check(self, holdings: Iterable[Addresses] | None = None) -> None:
        """Assert every invariant. With ``holdings``, all that callers hold, references must equal them."""
        self._table.check()
        self._index.check()
        indexed = np.zeros(self._table.blocks, np.bool_)
        indexed[self._index.all_blocks()] = True
        everything = np.arange(self._table.blocks, dtype=np.int64)
        assert np.array_equal(indexed, self._table.is_indexed(everything)), "index and block table disagree"
        expected = np.zeros(self._table.blocks, np.int32)
        for addrs in (*self._own_holdings(), *(holdings or ())):
            np.add.at(expected, self._numbers(addrs), 1)
        held = self._table.references_of(everything)
        assert bool(np.all(held >= expected)), "a holder's block has too few references"
        assert holdings is None or np.array_equal(held, expected), "references without a holder"

    # --- inside ---------------------------------------------------------------------------------------

    def _own_holdings(self) -> Iterator[Addresses]:
        """Whatever the pool itself holds references to."""
        yield from (lease.addrs for lease in self._leases)
        yield from (pin.addrs for pin in self._pins)

    def _addresses(self, numbers: BlockNumbers) -> Addresses:
        return Addresses(self.instance, self.incarnation, self._table.addresses_of(numbers))

    def _owns(self, addrs: Addresses) -> bool:
        return addrs.incarnation == self.incarnation and addrs.instance == self.instance

    def _numbers(self, addrs: Addresses) -> BlockNumbers:
        """Block numbers, once it is sure that the addresses are ours and present."""
        if not self._owns(addrs):
            raise StaleAddress(
                f"blocks of {addrs.owner_text} mean nothing to {self.instance} "
                f"(incarnation {self.incarnation})"
            )
        numbers = self._table.resolve(addrs.packed)
        if numbers is None:
            stale = numbers_of(addrs.packed[~self._table.current(addrs.packed)])
            raise StaleAddress(f"blocks {stale[:8].tolist()} of {self.instance} were freed since")
        return numbers

    def _raise_known(
        self, namespace: Namespace, tokens: Tokens, found: Found, numbers: BlockNumbers, origin: Origin
    ) -> Found:
        """Let the caller's device blocks stand for what the index knows in lower tiers."""
        lower = ~self._table.on_device(found.blocks)
        added = numbers[: len(found.blocks)][lower]
        if not (self._table.all_on_device(added) and self._table.may_enter(added)):
            self._refuse_insert(added)
        self._tiers.replace(found.path.nodes, found.path.tail, numbers, origin)
        return self._index.find(namespace, tokens)

    def _refuse_insert(self, numbers: BlockNumbers) -> NoReturn:
        if not self._table.all_on_device(numbers):
            raise InvalidRequest("blocks that are published must lie on the device", field="addrs")
        if not self._table.references_of(numbers).all():
            raise InvalidRequest("a block that nobody holds cannot be inserted", field="addrs")
        raise InvalidRequest("a block can hold the KV of one place in one prompt only", field="addrs")

    def _lease(
        self, tokens: Tokens, namespace: Namespace, deadline: float | None, *, use: bool = True
    ) -> Match:
        """Without ``use`` it does not count for eviction that somebody asked."""
        found = self._index.find(namespace, tokens)
        blocks = found.path.blocks
        packed, origins = self._table.lease(found.edges, blocks)
        if use:
            self._tiers.use(found.path)
        addrs = Addresses(self.instance, self.incarnation, packed)
        lease = Match(addrs, origins, blocks * self.layout.block_tokens, deadline, self._end_lease)
        self._leases.add(lease)
        return lease

    def _end_lease(self, lease: Match, release: bool) -> None:
        self._leases.discard(lease)
        if release:
            self._table.release_at(lease._addrs.packed)
            self._elastic.settle()
