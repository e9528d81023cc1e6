"""MemPool against a brute-force model: a dict of prefixes, a count of references, a replica fed by events."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memserve.core.clock import VirtualClock
from memserve.core.errors import InvalidRequest, LeaseExpired, MemServeError, OutOfBlocks, Overloaded
from memserve.core.messages import Stored
from memserve.core.types import InstanceId, Namespace, unpack_tokens
from memserve.mempool import AbortCause, Addresses, Freed, KVLayout, Match, MemPool, Origin, Tier

PAGE = 2
BLOCKS = 10
LAYOUT = KVLayout("tiny", layers=1, kv_heads=1, head_dim=2, block_tokens=PAGE)
NAMESPACES = (Namespace("m"), Namespace("m", salt="other"))
LOAN_SECONDS = 1e6
PEERS = (InstanceId("p"), InstanceId("q"))

Prefix = tuple[int, ...]
Key = tuple[Namespace, Prefix]
prefixes = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)
namespaces = st.sampled_from(NAMESPACES)
picks = st.randoms(use_true_random=False)


def tokens_of(prefix: Prefix, spare: int = 0) -> np.ndarray:
    return np.concatenate((np.repeat(np.array(prefix, np.int32), PAGE), np.full(spare, 9, np.int32)))


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = VirtualClock()
        self.pool = MemPool(LAYOUT, BLOCKS, instance=InstanceId("a"), incarnation=1, clock=self.clock)
        self.pool.take_events()
        self.index: dict[Key, int] = {}
        self.holdings: list[Addresses] = []
        self.leases: list[Match] = []
        self.incoming: dict[str, tuple[InstanceId, Key, int]] = {}
        self.lent: dict[str, tuple[InstanceId, Addresses]] = {}
        self.replica: set[Key] = set()
        self.next_seq = 0
        self.transfers = itertools.count()

    def teardown(self) -> None:
        self.pool.close()

    # --- the model's view ---

    def references(self) -> Counter[int]:
        """References per block, from what this test holds."""
        counted: Counter[int] = Counter()
        standing = [self.pool._reservations.find(transfer) for transfer in self.incoming]
        own = [lease.addrs for lease in self.leases] + [x.owned for x in standing if x is not None]
        for addrs in [*self.holdings, *own, *(addrs for _, addrs in self.lent.values())]:
            counted.update(addrs.blocks.tolist())
        return counted

    def free_blocks(self) -> int:
        return BLOCKS - len(set(self.index.values()) | set(self.references()))

    def evictable(self) -> int:
        """Indexed blocks that neither are held nor have a continuation that is."""
        held = self.references()
        stuck = {key for key, block in self.index.items() if held[block]}
        covered = {(space, path[:upto]) for space, path in stuck for upto in range(1, len(path) + 1)}
        return len(self.index.keys() - covered)

    def known(self, space: Namespace, prefix: Prefix) -> list[int]:
        """Blocks of the longest indexed prefix."""
        keys = ((space, prefix[:upto]) for upto in range(1, len(prefix) + 1))
        return [self.index[key] for key in itertools.takewhile(self.index.__contains__, keys)]

    def note_evictions(self, expected: int, held: Counter[int]) -> None:
        """Find out what the pool gave up: exactly as much as needed, and nothing that was ``held``."""
        now = {(space, path) for space, tokens in self.pool._index.paths() for path in all_prefixes(tokens)}
        gone = self.index.keys() - now
        assert len(gone) == expected
        assert not any(held[self.index[key]] for key in gone)
        for key in gone:
            del self.index[key]

    def note_insert(self, space: Namespace, prefix: Prefix, addrs: Addresses) -> int:
        known = len(self.known(space, prefix))
        for at in range(known, len(prefix)):
            self.index[space, prefix[: at + 1]] = int(addrs.blocks[at])
        return len(prefix) - known

    # --- memory ---

    @rule(n=st.integers(0, BLOCKS + 1))
    def alloc(self, n: int) -> None:
        free, evictable = self.free_blocks(), self.evictable()
        if n > free + evictable:
            with pytest.raises(OutOfBlocks):
                self.pool.alloc_mem(n)
            return
        held = self.references()
        addrs = self.pool.alloc_mem(n)
        self.note_evictions(max(0, n - free), held)
        assert len(set(addrs.blocks.tolist())) == n
        assert not set(addrs.blocks.tolist()) & (set(self.index.values()) | set(self.references()))
        if n:
            self.holdings.append(addrs)

    @precondition(lambda self: self.holdings)
    @rule(pick=picks)
    def free(self, pick) -> None:
        addrs = self.holdings.pop(pick.randrange(len(self.holdings)))
        cut = pick.randint(1, len(addrs))
        assert self.pool.free_mem(addrs[:cut]) == Freed(cut, 0)
        if cut < len(addrs):
            self.holdings.append(addrs[cut:])

    @precondition(lambda self: self.holdings)
    @rule(pick=picks)
    def free_too_late(self, pick) -> None:
        addrs = pick.choice(self.holdings)
        stale = Addresses(addrs.instance, addrs.incarnation, addrs.packed - np.uint64(1))
        assert self.pool.free_mem(stale) == Freed(0, len(addrs))

    @precondition(lambda self: self.holdings)
    @rule(pick=picks)
    def retain(self, pick) -> None:
        addrs = pick.choice(self.holdings)
        self.pool.retain(addrs)
        self.holdings.append(addrs)

    # --- index ---

    @precondition(lambda self: self.holdings)
    @rule(pick=picks, space=namespaces, prefix=prefixes, spare=st.integers(0, PAGE - 1))
    def insert(self, pick, space: Namespace, prefix: Prefix, spare: int) -> None:
        addrs = pick.choice(self.holdings)
        prefix = prefix[: len(addrs)]
        added = addrs.blocks[len(self.known(space, prefix)) : len(prefix)].tolist()
        if set(added) & set(self.index.values()):
            with pytest.raises(MemServeError):
                self.pool.insert(tokens_of(prefix, spare), addrs, space)
            return
        inserted = self.pool.insert(tokens_of(prefix, spare), addrs, space)
        assert inserted.new == self.note_insert(space, prefix, addrs)

    @rule(space=namespaces, prefix=prefixes, limit=st.none() | st.integers(0, 14), keep=st.booleans())
    def match(self, space: Namespace, prefix: Prefix, limit: int | None, keep: bool) -> None:
        expected = self.known(space, prefix)
        expected = expected if limit is None else expected[: limit // PAGE]
        lease = self.pool.match(tokens_of(prefix), space, limit, lease_seconds=None if keep else 5.0)
        assert lease.addrs.blocks.tolist() == expected
        assert lease.tokens == len(expected) * PAGE
        self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(pick=picks)
    def release(self, pick) -> None:
        self.leases.pop(pick.randrange(len(self.leases))).release()

    @precondition(lambda self: self.leases)
    @rule(pick=picks)
    def detach(self, pick) -> None:
        self.holdings.append(self.leases.pop(pick.randrange(len(self.leases))).detach())
        self.holdings = [addrs for addrs in self.holdings if len(addrs)]

    @rule(space=namespaces, prefix=prefixes)
    def delete(self, space: Namespace, prefix: Prefix) -> None:
        before = dict(self.index)
        dropped = self.pool.delete(tokens_of(prefix), space)
        now = {(where, path) for where, tokens in self.pool._index.paths() for path in all_prefixes(tokens)}
        gone = before.keys() - now
        assert len(gone) == dropped
        assert (space, prefix) not in now
        # Only what this entry begins with, or what begins with it, may go; and nothing that others need.
        assert all(where == space and (path[: len(prefix)] == prefix[: len(path)]) for where, path in gone)
        for key in gone:
            del self.index[key]

    # --- transfers into the pool ---

    @rule(peer=st.sampled_from(PEERS), space=namespaces, prefix=prefixes, tail=st.booleans())
    def begin(self, peer: InstanceId, space: Namespace, prefix: Prefix, tail: bool) -> None:
        transfer = str(next(self.transfers))
        total, known = len(prefix) + tail, self.known(space, prefix)
        free, held = self.free_blocks(), self.references()
        ask = (transfer, peer, space, tokens_of(prefix, int(tail)), total, 5.0)
        try:
            reservation = self.pool.begin_incoming(*ask)
        except OutOfBlocks:
            assert total - len(known) > free
            self.note_evictions(0, held)
            return
        self.note_evictions(max(0, total - len(known) - free), held)
        self.incoming[transfer] = (peer, (space, prefix), total)
        assert reservation.held.blocks.tolist() == known
        assert self.pool.begin_incoming(*ask) is reservation

    @precondition(lambda self: self.incoming)
    @rule(pick=picks, taker=st.sampled_from(["none", "takes", "refuses"]))
    def complete(self, pick, taker: str) -> None:
        transfer = pick.choice(sorted(self.incoming))
        _, (space, prefix), total = self.incoming[transfer]
        reservation = self.pool._reservations.find(transfer)
        assert reservation is not None
        taken: list[Addresses] = []

        def adopt(addrs: Addresses) -> None:
            if taker == "refuses":
                raise Overloaded("busy")
            taken.append(addrs)

        if reservation.revoked:
            with pytest.raises(LeaseExpired):
                self.pool.complete_incoming(transfer, Origin.PEER, adopt)
            return
        added = reservation.addrs.blocks[len(self.known(space, prefix)) : len(prefix)].tolist()
        if set(added) & set(self.index.values()):
            # What was held was deleted meanwhile and published for other tokens by another holder.
            with pytest.raises(InvalidRequest):
                self.pool.complete_incoming(transfer, Origin.PEER, adopt)
            return
        new = self.note_insert(space, prefix, reservation.addrs)
        del self.incoming[transfer]
        if taker == "refuses":
            with pytest.raises(Overloaded):
                self.pool.complete_incoming(transfer, Origin.PEER, adopt)
        else:
            done = self.pool.complete_incoming(transfer, Origin.PEER, adopt if taker == "takes" else None)
            assert done.inserted == new
            assert self.pool.find_incoming(transfer) == done
        assert [len(addrs) for addrs in taken] == ([total] if taker == "takes" else [])
        self.holdings += taken

    @precondition(lambda self: self.incoming)
    @rule(pick=picks)
    def abort(self, pick) -> None:
        transfer = pick.choice(sorted(self.incoming))
        del self.incoming[transfer]
        for _ in range(2):
            self.pool.abort_incoming(transfer, AbortCause.SENDER_ABORTED, "given up")

    @rule(peer=st.sampled_from(PEERS))
    def drop_peer(self, peer: InstanceId) -> None:
        lost = [transfer for transfer, (owner, _, _) in self.incoming.items() if owner == peer]
        assert self.pool.drop_peer(peer, "dead") == len(lost)
        for transfer in lost:
            del self.incoming[transfer]
        self.lent = {loan: lent for loan, lent in self.lent.items() if lent[0] != peer}

    # --- blocks lent to peers ---

    @rule(peer=st.sampled_from(PEERS), n=st.integers(1, 4))
    def lend(self, peer: InstanceId, n: int) -> None:
        n = max(n, 1)
        loan, free, held = str(next(self.transfers)), self.free_blocks(), self.references()
        if n > free + self.evictable():
            with pytest.raises(OutOfBlocks):
                self.pool.lend(loan, peer, n, Tier.DEVICE, LOAN_SECONDS)
            return
        addrs = self.pool.lend(loan, peer, n, Tier.DEVICE, LOAN_SECONDS)
        self.note_evictions(max(0, n - free), held)
        assert self.pool.lend(loan, peer, n, Tier.DEVICE, LOAN_SECONDS) == addrs
        self.lent[loan] = (peer, addrs)

    @precondition(lambda self: self.lent)
    @rule(pick=picks, space=namespaces, prefix=prefixes)
    def begin_there(self, pick, space: Namespace, prefix: Prefix) -> None:
        peer, addrs = self.lent[pick.choice(sorted(self.lent))]
        prefix, transfer = prefix[: len(addrs)], str(next(self.transfers))
        dst, known, held = addrs[: len(prefix)], self.known(space, prefix), self.references()
        ask = (transfer, peer, space, tokens_of(prefix), len(prefix), 5.0, dst)
        standing = (self.pool._reservations.find(other) for other in self.incoming)
        written = {block for x in standing if x is not None for block in x.fresh.blocks.tolist()}
        wanted = set(dst.blocks.tolist()[len(known) :])
        busy = wanted & (written | set(self.index.values())) or any(held[block] > 1 for block in wanted)
        if busy:
            with pytest.raises(InvalidRequest):
                self.pool.begin_incoming(*ask)
            return
        reservation = self.pool.begin_incoming(*ask)
        assert reservation.held.blocks.tolist() == known
        assert set(reservation.fresh.blocks.tolist()) == wanted
        assert self.pool.begin_incoming(*ask) is reservation
        self.incoming[transfer] = (peer, (space, prefix), len(prefix))

    @precondition(lambda self: self.lent)
    @rule(pick=picks, by=st.sampled_from(PEERS), count=st.integers(1, 4))
    def give_back(self, pick, by: InstanceId, count: int) -> None:
        loan = pick.choice(sorted(self.lent))
        peer, addrs = self.lent[loan]
        part, rest = addrs[:count], addrs[count:]
        if by != peer:
            assert self.pool.take_back(by, part) == Freed(0, len(part))
            return
        standing = (self.pool._reservations.find(other) for other in self.incoming)
        written = {block for x in standing if x is not None for block in x.fresh.blocks.tolist()}
        if written & set(addrs.blocks.tolist()):
            with pytest.raises(InvalidRequest):
                self.pool.take_back(by, part)
            return
        assert self.pool.take_back(by, part) == Freed(len(part), 0)
        del self.lent[loan]
        if len(rest):
            self.lent[loan] = (peer, rest)

    @rule(seconds=st.sampled_from([1.0, 3.0, 6.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        revoked = self.pool.expire()
        assert set(revoked) <= self.incoming.keys()
        self.leases = [lease for lease in self.leases if lease.active]
        now = self.clock.now()
        assert not any(lease.deadline is not None and lease.deadline <= now for lease in self.leases)

    # --- invariants ---

    @invariant()
    def pool_is_sound(self) -> None:
        self.pool.check(self.holdings)

    @invariant()
    def counts_agree(self) -> None:
        stats, held = self.pool.stats(), self.references()
        assert stats.lent == sum(len(addrs) for _, addrs in self.lent.values())
        assert stats.free == self.free_blocks()
        assert stats.historical == sum(not held[block] for block in self.index.values())
        assert stats.free + stats.active + stats.historical + stats.incoming == BLOCKS

    @invariant()
    def index_agrees(self) -> None:
        for space in NAMESPACES:
            for path in {path for where, path in self.index if where == space}:
                assert self.pool._index.find(space, tokens_of(path)).blocks.tolist() == self.known(
                    space, path
                )
        assert self.pool._index.blocks == len(self.index)

    @invariant()
    def a_subscriber_knows_the_same(self) -> None:
        batch = self.pool.take_events()
        if batch is not None:
            assert batch.seq == self.next_seq
            self.next_seq += len(batch.events)
            for event in batch.events:
                self.apply(event)
        assert self.replica == self.index.keys()

    def apply(self, event) -> None:
        tokens = unpack_tokens(event.tokens)
        if isinstance(event, Stored):
            self.replica |= {(event.namespace, path) for path in all_prefixes(tokens)}
            return
        keep = tuple(tokens[: event.keep : PAGE].tolist())
        first = tuple(tokens[: event.keep + PAGE : PAGE].tolist())
        self.replica = {
            (space, path)
            for space, path in self.replica
            if space != event.namespace or path[: len(first)] != first or len(path) <= len(keep)
        }


def all_prefixes(tokens: np.ndarray) -> list[Prefix]:
    path = tuple(tokens[::PAGE].tolist())
    return [path[:upto] for upto in range(1, len(path) + 1)]


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
