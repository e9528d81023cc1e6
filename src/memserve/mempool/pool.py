"""MemPool: all KV memory of an instance behind one API (design: mempool.md; paper, section 4).

Composed of an arena (bytes), a block table (states), an index (prompt trees) and an eviction policy. Knows
no sockets: transfers go through an attached endpoint. Single-threaded: one event loop owns a pool; other
threads may only read and write the memory of blocks they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from memserve.core.clock import Clock
from memserve.core.errors import (
    ConfigError,
    InvalidRequest,
    MemServeError,
    OutOfBlocks,
    StaleAddress,
    TransferAborted,
)
from memserve.core.messages import Member, PoolEvents, Removed, Snapshot, Stored
from memserve.core.radix import common_prefix
from memserve.core.types import InstanceId, Namespace, Tokens, pack_tokens
from memserve.mempool.address import Addresses, BlockNumbers, Origin, Tier, numbers_of
from memserve.mempool.arena import Arena
from memserve.mempool.blocks import BlockTable
from memserve.mempool.events import EventLog
from memserve.mempool.eviction import EvictionPolicy, LeastRecentlyUsed
from memserve.mempool.index import Dropped, IndexNode, PromptIndex, path_to
from memserve.mempool.layout import KVLayout
from memserve.mempool.match import Match
from memserve.mempool.reservations import Completed, Reservation, ReservationTable
from memserve.mempool.results import Freed, Inserted, Transferred
from memserve.mempool.stats import AbortCause, Counters, PoolStats
from memserve.mempool.transport import Transport


class MemPool:
    """The KV pool of ``instance`` in its life ``incarnation``: ``blocks`` blocks of ``layout``.

    Three groups of calls: memory (``alloc_mem`` ...), index (``insert`` ...), distributed (``transfer`` ...).
    """

    def __init__(
        self,
        layout: KVLayout,
        blocks: int,
        *,
        instance: InstanceId,
        incarnation: int,
        clock: Clock,
        eviction: EvictionPolicy | None = None,
    ) -> None:
        if blocks < 1:
            raise ConfigError(
                f"pool.memory has no room for one block of {layout.block_bytes} bytes; raise it"
            )
        self.layout = layout
        self.instance = instance
        self.incarnation = incarnation
        self.arena = Arena.allocate(layout.block_bytes, blocks, f"memserve-{instance}")
        self._clock = clock
        self._table = BlockTable(blocks)
        self._index = PromptIndex(layout.block_tokens)
        self._eviction = eviction or LeastRecentlyUsed()
        self._events = EventLog(instance, incarnation)
        self._reservations = ReservationTable()
        self._leases: set[Match] = set()
        self._counters = Counters()
        self._transport: Transport | None = None

    @property
    def blocks(self) -> int:
        """Blocks in all, whatever their state."""
        return self._table.blocks

    def close(self) -> None:
        """Let go of the memory; the pool must not be used afterwards."""
        self.arena.close()

    # --- memory ---------------------------------------------------------------------------------------

    def alloc_mem(self, n: int, tier: Tier = Tier.DEVICE) -> Addresses:
        """Allocate ``n`` blocks, each with one reference, all or none. Contents are undefined.

        Evicts historical KV if it must, exactly as much as is needed. Raises ``OutOfBlocks``.
        """
        if tier is not Tier.DEVICE:
            raise ConfigError(f"this pool has no {tier.name.lower()} tier; it has device")
        self._make_room(n)
        return self._addresses(self._table.alloc(n))

    def free_mem(self, addrs: Addresses) -> Freed:
        """Drop one reference of each block; one with none left becomes historical if indexed, else free.

        An address whose block was freed since, or which nobody holds, is counted as stale, not refused.
        """
        packed = addrs.packed
        stale = 0
        if not self._owns(addrs):
            stale, packed = len(packed), packed[:0]
        numbers = numbers_of(packed)
        if not self._table.all_current(packed, numbers):
            numbers = numbers[self._table.current(packed)]
            stale = len(packed) - len(numbers)
        if self._table.distinct(numbers):
            unheld = self._table.release(numbers)
            stale += 0 if unheld is None else int(np.count_nonzero(unheld))
        else:
            stale += self._release_repeated(packed)
        self._counters.stale += stale
        return Freed(len(addrs) - stale, stale)

    def retain(self, addrs: Addresses) -> None:
        """Add one reference to each block, to be ended with ``free_mem``. Raises ``StaleAddress``.

        Blocks must be held or cached; a free block has no present address.
        """
        self._table.retain(self._numbers(addrs))

    def pointers(self, addrs: Addresses) -> NDArray[np.uint64]:
        """Where the blocks lie in this process's memory: uint64[n]. Raises ``StaleAddress``."""
        return self.arena.pointers(self._numbers(addrs))

    # --- index ----------------------------------------------------------------------------------------

    def insert(
        self, tokens: Tokens, addrs: Addresses, namespace: Namespace, origin: Origin = Origin.COMPUTED
    ) -> Inserted:
        """Publish the KV of ``tokens`` (int32[n]) in whole blocks: ``addrs[i]`` holds the i-th of them.

        References stay the caller's. Where other blocks are known for the same tokens those stay in the
        index, and the caller's are duplicates, free once the caller frees them. Raises ``StaleAddress``,
        or ``InvalidRequest`` when ``addrs`` do not cover the tokens or are already used for others.
        """
        full = len(tokens) // self.layout.block_tokens
        if len(addrs) < full:
            raise InvalidRequest(f"{len(addrs)} addresses for {full} blocks of tokens", field="addrs")
        numbers = self._numbers(addrs[:full])
        found = self._index.find(namespace, tokens)
        known = len(found.blocks)
        duplicate = int(np.count_nonzero(found.blocks != numbers[:known]))
        if known == full:
            self._eviction.touch(found.path.nodes)
            return Inserted(0, duplicate)
        added = numbers[known:]
        self._require_insertable(added)
        self._table.index(added, origin)
        leaf = self._index.add(namespace, tokens, found, added)
        self._eviction.touch(path_to(leaf))
        self._eviction.add_leaf(leaf)
        self._events.append(Stored(namespace, pack_tokens(tokens[: full * self.layout.block_tokens])))
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
        return lease

    def delete(self, tokens: Tokens, namespace: Namespace) -> int:
        """Forget the entry ``tokens`` and whatever continues it; blocks shared with other entries stay.

        Returns how many blocks left the index. Those still held are freed by their last holder.
        """
        end = self._index.exclusive_end(namespace, tokens)
        return 0 if end is None else self._drop(*end)

    # --- distributed ----------------------------------------------------------------------------------

    def attach(self, transport: Transport) -> None:
        """Let transfers go through ``transport``."""
        self._transport = transport

    def set_peers(self, members: tuple[Member, ...]) -> None:
        """Learn which other pools live; whatever the missing ones had reserved here is freed."""
        self._require_transport().set_peers(members)

    async def transfer(self, peer: InstanceId, src: Addresses, *, attachment: bytes = b"") -> Transferred:
        """Copy blocks to ``peer``, where ``attachment`` says who takes them over.

        Errors: see :meth:`transfer_with_insert`.
        """
        return await self._require_transport().transfer(peer, src, attachment=attachment)

    async def transfer_with_insert(
        self,
        peer: InstanceId,
        tokens: Tokens,
        src: Addresses,
        namespace: Namespace,
        *,
        origin: Origin = Origin.PEER,
        attachment: bytes = b"",
    ) -> Transferred:
        """Copy to ``peer`` what it lacks of the KV of ``tokens``, and publish it there in one go.

        ``src`` covers ``tokens``. The last, partly filled block travels only together with an
        ``attachment``, whose taker gets references to all blocks of the path. All or nothing: raises
        ``PeerLost``, ``PeerOutOfBlocks``, ``CorruptBlock``, ``LeaseExpired``, ``TransferAborted``,
        ``LayoutMismatch`` or what the taker raised, and then the peer has kept nothing.
        """
        return await self._require_transport().transfer_with_insert(
            peer, tokens, src, namespace, origin=origin, attachment=attachment
        )

    # --- transfers into this pool, driven by the transport ----------------------------------------------

    def begin_incoming(
        self,
        transfer: str,
        peer: InstanceId,
        namespace: Namespace,
        tokens: Tokens,
        blocks: int,
        seconds: float,
    ) -> Reservation:
        """Reserve the ``blocks`` blocks of ``tokens``: hold what is cached, allocate the rest as incoming.

        With empty ``tokens`` all blocks are allocated. The same request again gives the same reservation.
        Raises ``OutOfBlocks``, ``InvalidRequest``, or how the transfer ended if it has.
        """
        known = self._reservations.find(transfer)
        if known is not None and known.same_request(peer, namespace, tokens, blocks):
            return self._reservations.require(transfer)
        if known is not None or self._reservations.outcome(transfer) is not None:
            raise InvalidRequest(f"transfer id {transfer} was used for something else", field="transfer")
        full = len(tokens) // self.layout.block_tokens
        if len(tokens) and not full <= blocks <= self.layout.blocks_for(len(tokens)):
            raise InvalidRequest(f"{blocks} blocks do not fit {len(tokens)} tokens", field="blocks")
        with self._lease(tokens, namespace, None) as held:
            fresh = self.alloc_mem(blocks - len(held.addrs))
            self._table.mark_incoming(numbers_of(fresh.packed), True)
            deadline = self._clock.now() + seconds
            reservation = Reservation(
                transfer, peer, namespace, tokens, held.detach(), fresh, seconds, deadline
            )
        self._reservations.add(reservation)
        return reservation

    def find_incoming(self, transfer: str) -> Reservation | Completed:
        """The reservation to publish, its deadline renewed, or what the transfer brought if it has published.

        Raises ``LeaseExpired``, ``StaleAddress`` for an unknown one, or how the transfer ended.
        """
        done = self._reservations.outcome(transfer)
        if done is not None:
            return done
        reservation = self._reservations.require(transfer)
        reservation.deadline = self._clock.now() + reservation.seconds
        return reservation

    def incoming_deadline(self, transfer: str) -> float | None:
        """Until when a reservation may stand without progress (clock seconds); None if none stands."""
        reservation = self._reservations.find(transfer)
        return None if reservation is None else reservation.deadline

    def incoming_gain(self, tokens: Tokens, namespace: Namespace) -> int:
        """How many more tokens of the prefix transfers under way will publish here, beyond what is cached."""
        coming = [r.tokens for r in self._reservations if r.namespace == namespace and not r.revoked]
        promised = max((common_prefix(other, tokens) for other in coming), default=0)
        whole = promised // self.layout.block_tokens
        cached = len(self._index.find(namespace, tokens).blocks) if whole else 0
        return max(0, whole - cached) * self.layout.block_tokens

    def complete_incoming(
        self, transfer: str, origin: Origin, adopt: Callable[[Addresses], None] | None = None
    ) -> Completed:
        """Publish: the verified blocks become readable and are indexed. Call once per transfer.

        ``adopt`` takes over references to all blocks of the path. If it raises they are released, and its
        error is what the transfer ended with; without it the blocks just stay cached. Raises
        ``LeaseExpired``, or ``InvalidRequest`` when the part of the path that was held is used for other
        tokens by now; the reservation stands then, to be aborted.
        """
        reservation = self._reservations.require(transfer)
        addrs = reservation.addrs
        inserted = self.insert(reservation.tokens, addrs, reservation.namespace, origin)
        self._table.mark_incoming(numbers_of(reservation.fresh.packed), False)
        done = Completed(transfer, inserted.new)
        outcome: Completed | MemServeError = TransferAborted(f"transfer {transfer}: its taker failed")
        try:
            if adopt is not None:
                adopt(addrs)
            outcome = done
        except MemServeError as error:
            outcome = error
            raise
        finally:
            self._reservations.end(transfer, outcome)
            if outcome is not done:
                self._counters.aborts[AbortCause.REFUSED] += 1
            if outcome is not done or adopt is None:
                self.free_mem(addrs)
        self._counters.received += 1
        self._counters.received_bytes += len(reservation.fresh) * self.layout.block_bytes
        return done

    def abort_incoming(self, transfer: str, cause: AbortCause, reason: str) -> None:
        """End a transfer without publishing and free what it had reserved. Its writer must have stopped.

        Repeating it, or aborting what never was, is harmless; the id can not be used any more.
        """
        reservation = self._reservations.abort(transfer, reason)
        if reservation is None:
            return
        self._counters.aborts[cause] += 1
        self._table.mark_incoming(numbers_of(reservation.fresh.packed), False)
        self.free_mem(reservation.addrs)

    def drop_peer(self, instance: InstanceId, reason: str) -> int:
        """A death notice: abort all that ``instance`` had reserved. Returns how many transfers that were."""
        standing = self._reservations.of_peer(instance)
        for reservation in standing:
            self.abort_incoming(reservation.transfer, AbortCause.SENDER_LOST, reason)
        return len(standing)

    def expire(self) -> tuple[str, ...]:
        """End leases past their deadline, and revoke overdue transfers, whose ids are returned.

        A revoked transfer can not publish. Its blocks stay incoming until :meth:`abort_incoming` says that
        the writer has stopped: a sender that wakes up late must find nobody else's KV under its pen.
        """
        now = self._clock.now()
        for lease in [x for x in self._leases if x.deadline is not None and x.deadline <= now]:
            lease.release("its deadline has passed")
        return tuple(reservation.transfer for reservation in self._reservations.revoke_overdue(now))

    def count_sent(self, size: int) -> None:
        """For the transport: a transfer of ``size`` bytes was published by a peer."""
        self._counters.sent += 1
        self._counters.sent_bytes += size

    # --- observation ----------------------------------------------------------------------------------

    def on_events(self, notify: Callable[[], None]) -> None:
        """Have ``notify`` called when the first event since the last :meth:`take_events` happens."""
        self._events.notify = notify

    def take_events(self) -> PoolEvents | None:
        """Index events since the last call. A gap in the numbers means: ask for :meth:`snapshot`."""
        return self._events.take()

    def snapshot(self) -> Snapshot:
        """All that the index holds, one path per leaf. Supersedes the events that were not taken yet."""
        self._events.forget()
        paths = tuple(Stored(namespace, pack_tokens(tokens)) for namespace, tokens in self._index.paths())
        return Snapshot(self.instance, self.incarnation, self._events.next_seq, paths)

    def stats(self) -> PoolStats:
        """State and counters as a frozen value. Costs a pass over the block table."""
        states, count = self._table.counts(), self._counters
        return PoolStats(
            blocks=self.blocks,
            free=states.free,
            active=states.active,
            historical=states.historical,
            incoming=states.incoming,
            leases=len(self._leases),
            tree_nodes=self._index.nodes,
            tree_blocks=self._index.blocks,
            hit_tokens=count.hit_tokens,
            miss_tokens=count.miss_tokens,
            evicted_blocks=count.evicted_blocks,
            sent=count.sent,
            sent_bytes=count.sent_bytes,
            received=count.received,
            received_bytes=count.received_bytes,
            stale=count.stale,
            aborts=dict(count.aborts),
        )

    def check(self, holdings: Iterable[Addresses] | None = None) -> None:
        """Assert every invariant. With ``holdings``, all that callers hold, references must equal them."""
        self._table.check()
        self._index.check()
        indexed = np.zeros(self.blocks, np.bool_)
        indexed[self._index.all_blocks()] = True
        everything = np.arange(self.blocks, dtype=np.int64)
        assert np.array_equal(indexed, self._table.is_indexed(everything)), "index and block table disagree"
        expected = np.zeros(self.blocks, np.int32)
        own = [x.addrs for x in self._leases] + [x.addrs for x in self._reservations]
        for addrs in (*own, *(holdings or ())):
            np.add.at(expected, self._numbers(addrs), 1)
        held = self._table.references_of(everything)
        assert bool(np.all(held >= expected)), "a holder's block has too few references"
        assert holdings is None or np.array_equal(held, expected), "references without a holder"
        incoming = sum(len(x.fresh) for x in self._reservations)
        assert incoming == self._table.counts().incoming, "incoming blocks without a reservation"

    # --- inside ---------------------------------------------------------------------------------------

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
        numbers = numbers_of(addrs.packed)
        if not self._table.all_current(addrs.packed, numbers):
            stale = numbers[~self._table.current(addrs.packed)]
            raise StaleAddress(f"blocks {stale[:8].tolist()} of {self.instance} were freed since")
        return numbers

    def _make_room(self, n: int) -> None:
        if n < 0:
            raise InvalidRequest(f"{n} blocks cannot be allocated", field="n")
        missing = n - self._table.free
        if missing <= 0:
            return
        victims = None
        if missing <= self._table.historical:
            victims = self._eviction.choose(missing, self._idle_tail)
        if victims is None:
            states = self._table.counts()
            raise OutOfBlocks(
                asked=n,
                free=states.free,
                evictable=states.historical,
                pinned=states.active + states.incoming,
            )
        for victim in victims:
            self._counters.evicted_blocks += self._drop(victim.node, victim.keep)

    def _idle_tail(self, node: IndexNode) -> int:
        held = np.flatnonzero(self._table.references_of(node.payload.blocks.astype(np.int64)))
        return len(node.payload.blocks) - (int(held[-1]) + 1 if len(held) else 0)

    def _drop(self, node: IndexNode, keep: int) -> int:
        dropped: Dropped = self._index.drop(node, keep)
        self._table.unindex(dropped.blocks)
        if dropped.new_leaf is not None:
            self._eviction.add_leaf(dropped.new_leaf)
        self._events.append(Removed(dropped.namespace, pack_tokens(dropped.tokens), dropped.keep))
        return len(dropped.blocks)

    def _require_insertable(self, numbers: BlockNumbers) -> None:
        if self._table.distinct(numbers) and self._table.all_held_unindexed(numbers):
            return
        if not self._table.references_of(numbers).all():
            raise InvalidRequest("a block that nobody holds cannot be inserted", field="addrs")
        raise InvalidRequest("a block can hold the KV of one place in one prompt only", field="addrs")

    def _release_repeated(self, packed: NDArray[np.uint64]) -> int:
        """Drop references block by block, for addresses that name a block more than once."""
        stale = 0
        for one in packed[self._table.current(packed)]:
            alone = np.array([one], np.uint64)
            current = bool(self._table.current(alone)[0])
            stale += not current or self._table.release(numbers_of(alone)) is not None
        return stale

    def _lease(self, tokens: Tokens, namespace: Namespace, deadline: float | None) -> Match:
        found = self._index.find(namespace, tokens)
        numbers = found.blocks
        self._table.retain(numbers)
        self._eviction.touch(found.path.nodes)
        lease = Match(
            self._addresses(numbers),
            self._table.origins_of(numbers),
            len(numbers) * self.layout.block_tokens,
            deadline,
            self._end_lease,
        )
        self._leases.add(lease)
        return lease

    def _end_lease(self, lease: Match, release: bool) -> None:
        self._leases.discard(lease)
        if release:
            self._table.release(numbers_of(lease._addrs.packed))

    def _require_transport(self) -> Transport:
        if self._transport is None:
            raise ConfigError("this pool has no transfer endpoint; attach one before transferring")
        return self._transport
