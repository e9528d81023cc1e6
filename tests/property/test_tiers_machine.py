"""Tiers under random use: what is read is what was written, nothing leaks, nothing deleted returns."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memserve.core.clock import VirtualClock
from memserve.core.errors import InvalidRequest, OutOfBlocks
from memserve.core.messages import Moved, Stored, TierName
from memserve.core.types import InstanceId, Namespace, unpack_tokens
from memserve.mempool import (
    AbortCause,
    Addresses,
    Arrangement,
    DiskTier,
    KVLayout,
    Match,
    MemPool,
    Origin,
    Tier,
)
from memserve.mempool.disk_record import HEADER_BYTES

PAGE = 2
DEVICE, HOST, DISK = 6, 3, 5
LAYOUT = KVLayout("tiny", layers=1, kv_heads=1, head_dim=2, block_tokens=PAGE)
PIECES = replace(LAYOUT, arrangement=Arrangement.DISCRETE)
NAMESPACES = (Namespace("m"), Namespace("m", salt="other"))
PEER = InstanceId("p")

Prefix = tuple[int, ...]
Key = tuple[Namespace, Prefix]
prefixes = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)
namespaces = st.sampled_from(NAMESPACES)
picks = st.randoms(use_true_random=False)


def tokens_of(prefix: Prefix) -> np.ndarray:
    return np.repeat(np.array(prefix, np.int32), PAGE)


def kv_of(key: Key) -> bytes:
    """What the KV of the last block of ``key`` looks like."""
    return hashlib.blake2b(repr(key).encode(), digest_size=LAYOUT.block_bytes).digest()


def all_prefixes(tokens: np.ndarray) -> list[Prefix]:
    path = tuple(tokens[::PAGE].tolist())
    return [path[:upto] for upto in range(1, len(path) + 1)]


class TiersMachine(RuleBasedStateMachine):
    host, disk, layout = HOST, DISK, LAYOUT

    def __init__(self) -> None:
        super().__init__()
        self.clock = VirtualClock()
        self.folder = Path(tempfile.mkdtemp())
        self.incarnation = 0
        self.transfers = itertools.count()
        self.may_be_there: set[Key] = set()
        """Stored at some time and not deleted since."""
        self.open_pool()

    def open_pool(self) -> None:
        self.incarnation += 1
        self.pool = MemPool(
            self.layout,
            DEVICE,
            instance=InstanceId("a"),
            incarnation=self.incarnation,
            clock=self.clock,
            host_blocks=self.host,
            disk=DiskTier(self.folder, self.disk) if self.disk else None,
        )
        self.pool.take_events()
        self.holdings: list[tuple[Addresses, Key]] = []
        self.leases: list[tuple[Match, Key]] = []
        self.pins: dict[Key, float] = {}
        self.next_seq = 0
        self.replica: dict[Key, TierName] = {}
        """What a subscriber knows: where the last block of each path lies."""

    def teardown(self) -> None:
        self.pool.close()
        shutil.rmtree(self.folder)

    def read(self, addrs: Addresses) -> list[bytes]:
        memory = self.pool.arena
        return [memory.block_memory(number).tobytes() for number in addrs.blocks.tolist()]

    def expect(self, addrs: Addresses, key: Key) -> None:
        """Blocks in memory hold the KV of the beginning of ``key``."""
        space, prefix = key
        wanted = [kv_of((space, prefix[:upto])) for upto in range(1, len(addrs) + 1)]
        assert self.read(addrs) == wanted

    def indexed(self) -> set[Key]:
        return {(space, path) for space, tokens in self.pool._index.paths() for path in all_prefixes(tokens)}

    def places(self) -> dict[Key, TierName]:
        """In which tier the last block of each indexed path lies."""
        return {
            (space, path): Tier(int(self.pool._table.tiers_of(blocks[-1:])[0])).label
            for space, path in self.indexed()
            for blocks in [self.pool._index.find(space, tokens_of(path)).blocks]
        }

    # --- what an engine does ---

    @rule(space=namespaces, prefix=prefixes, keep=st.booleans())
    def serve(self, space: Namespace, prefix: Prefix, keep: bool) -> None:
        """Find, swap in, compute the rest, publish."""
        pool, tokens, blocks = self.pool, tokens_of(prefix), len(prefix)
        with pool.match(tokens, space) as match:
            assert len(match.tiers) == len(match.addrs)
            try:
                found = pool.swap_in(match.addrs)
            except OutOfBlocks:
                return
        self.expect(found, (space, prefix))
        assert not found.tiers.any()
        try:
            fresh = pool.alloc_mem(blocks - len(found))
        except OutOfBlocks:
            pool.free_mem(found)
            return
        addrs = found.concat(fresh)
        for at in range(len(found), blocks):
            memory = pool.arena.block_memory(int(addrs.blocks[at]))
            memory[:] = np.frombuffer(kv_of((space, prefix[: at + 1])), np.uint8).reshape(memory.shape)
        pool.insert(tokens, addrs, space)
        self.may_be_there |= {(space, path) for path in all_prefixes(tokens)}
        if keep:
            self.holdings.append((addrs, (space, prefix)))
        else:
            pool.free_mem(addrs)

    @rule(space=namespaces, prefix=prefixes)
    def recompute(self, space: Namespace, prefix: Prefix) -> None:
        """Publish blocks of one's own for all of a path, wherever it lies already."""
        try:
            addrs = self.pool.alloc_mem(len(prefix))
        except OutOfBlocks:
            return
        for at, number in enumerate(addrs.blocks.tolist(), 1):
            memory = self.pool.arena.block_memory(number)
            memory[:] = np.frombuffer(kv_of((space, prefix[:at])), np.uint8).reshape(memory.shape)
        self.pool.insert(tokens_of(prefix), addrs, space)
        self.pool.free_mem(addrs)
        self.may_be_there |= {(space, path) for path in all_prefixes(tokens_of(prefix))}
        with self.pool.match(tokens_of(prefix), space) as match:
            assert not match.tiers.any()

    @precondition(lambda self: self.holdings)
    @rule(pick=picks)
    def finish(self, pick) -> None:
        addrs, key = self.holdings.pop(pick.randrange(len(self.holdings)))
        self.expect(addrs, key)
        self.pool.free_mem(addrs)

    @rule(space=namespaces, prefix=prefixes)
    def lease(self, space: Namespace, prefix: Prefix) -> None:
        self.leases.append((self.pool.match(tokens_of(prefix), space), (space, prefix)))

    @precondition(lambda self: self.leases)
    @rule(pick=picks, first=st.integers(0, 5), last=st.integers(0, 5))
    def swap_in_leased(self, pick, first: int, last: int) -> None:
        """Any part of what is leased, even from the middle: the lease stays good, the copies are right."""
        match, (space, prefix) = pick.choice(self.leases)
        try:
            addrs = self.pool.swap_in(match.addrs[first:last])
        except OutOfBlocks:
            return
        got = self.read(addrs)
        assert got == [kv_of((space, prefix[: first + at])) for at in range(1, len(addrs) + 1)]
        self.pool.free_mem(addrs)

    @precondition(lambda self: self.leases)
    @rule(pick=picks)
    def release(self, pick) -> None:
        match, key = self.leases.pop(pick.randrange(len(self.leases)))
        in_memory = int(np.argmax(match.tiers == Tier.DISK)) if (match.tiers == Tier.DISK).any() else None
        self.expect(match.addrs[:in_memory], key)
        match.release()

    # --- moving ---

    @rule(n=st.integers(0, DEVICE + 2))
    def swap_out(self, n: int) -> None:
        before, idle = self.indexed(), self.pool.stats().historical
        moved = self.pool.swap_out(n)
        assert moved <= min(n, idle)
        if self.pool.stats().evicted_blocks == 0:
            assert self.indexed() == before

    @rule(n=st.integers(0, HOST))
    def take_host_memory(self, n: int) -> None:
        host = self.pool.stats().host
        if not host.free + host.historical:
            return
        try:
            addrs = self.pool.alloc_mem(n, Tier.HOST)
        except OutOfBlocks:
            return
        assert (addrs.tiers == Tier.HOST).all()
        self.pool.free_mem(addrs)

    @rule(space=namespaces, prefix=prefixes, tail=st.integers(0, 2), publish=st.booleans())
    def receive(self, space: Namespace, prefix: Prefix, tail: int, publish: bool) -> None:
        transfer = str(next(self.transfers))
        tokens = tokens_of(prefix)
        try:
            incoming = self.pool.begin_incoming(transfer, PEER, space, tokens, len(prefix), 5.0)
        except OutOfBlocks:
            return
        self.expect(incoming.held, (space, prefix))
        if not publish:
            self.pool.abort_incoming(transfer, AbortCause.SENDER_ABORTED, "given up")
            return
        for at, number in enumerate(incoming.fresh.blocks.tolist(), len(incoming.held) + 1):
            memory = self.pool.arena.block_memory(number)
            memory[:] = np.frombuffer(kv_of((space, prefix[:at])), np.uint8).reshape(memory.shape)
        self.pool.complete_incoming(transfer, Origin.PEER)
        self.may_be_there |= {(space, path) for path in all_prefixes(tokens)}

    @rule(tier=st.sampled_from(Tier), blocks=st.integers(0, 8))
    def resize(self, tier: Tier, blocks: int) -> None:
        """Larger or smaller, whatever is going on: what is held stays, what is lost is told."""
        if (tier is Tier.DEVICE and not blocks) or (tier is Tier.DISK and not self.disk):
            return
        resized = self.pool.resize(tier, blocks)
        assert resized.blocks == blocks
        if not (self.holdings or self.leases or self.pins):
            assert resized.draining == 0

    # --- forgetting ---

    @rule(space=namespaces, prefix=prefixes)
    def delete(self, space: Namespace, prefix: Prefix) -> None:
        self.pool.delete(tokens_of(prefix), space)
        there = self.indexed()
        assert (space, prefix) not in there
        self.may_be_there = {
            key
            for key in self.may_be_there
            if key in there or key[0] != space or key[1][: len(prefix)] != prefix
        }
        self.pins = {key: deadline for key, deadline in self.pins.items() if key in there}

    @rule(space=namespaces, prefix=prefixes, ttl=st.sampled_from([2.0, 10.0]))
    def pin(self, space: Namespace, prefix: Prefix, ttl: float) -> None:
        known = (space, prefix) in self.indexed()
        try:
            self.pool.pin(tokens_of(prefix), space, ttl)
        except (InvalidRequest, OutOfBlocks):
            return
        assert known
        self.pins[space, prefix] = self.clock.now() + ttl

    @precondition(lambda self: self.pins)
    @rule(pick=picks)
    def unpin(self, pick) -> None:
        space, prefix = pick.choice(sorted(self.pins, key=repr))
        del self.pins[space, prefix]
        assert self.pool.unpin(tokens_of(prefix), space)
        assert not self.pool.unpin(tokens_of(prefix), space)

    @rule(seconds=st.sampled_from([1.0, 5.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.pool.expire()
        self.pins = {key: at for key, at in self.pins.items() if at > self.clock.now()}

    # --- the disk ---

    @rule(pick=picks)
    def flip_a_byte_on_disk(self, pick) -> None:
        for path in self.folder.glob("*.kv"):
            # Headers are short and so are these blocks: the rest of a place is padding.
            within = pick.choice([pick.randrange(160), HEADER_BYTES + pick.randrange(LAYOUT.block_bytes)])
            at = pick.randrange(self.disk) * 2 * HEADER_BYTES + within
            with path.open("r+b") as file:
                file.seek(at)
                # Never back: a record that was damaged, deleted and then repaired by chance would return.
                value = file.read(1)[0] | 1 << pick.randrange(8)
                file.seek(at)
                file.write(bytes([value]))

    @rule(clean=st.booleans())
    def restart(self, clean: bool) -> None:
        for match, _ in self.leases:
            match.release()
        if clean:
            self.pool.persist()
        self.pool.close()
        self.open_pool()
        snapshot = self.pool.snapshot()
        self.next_seq = snapshot.next_seq
        self.replica = {}
        for event in (*snapshot.paths, *snapshot.moved):
            self.apply(event)
        assert self.replica.keys() <= self.may_be_there
        assert self.disk or not self.replica

    # --- invariants ---

    @invariant()
    def pool_is_sound(self) -> None:
        self.pool.check([addrs for addrs, _ in self.holdings])

    @invariant()
    def pinned_is_on_the_device(self) -> None:
        for space, prefix in self.pins:
            with self.pool.match(tokens_of(prefix), space) as match:
                assert len(match.tiers) == len(prefix)
                assert not match.tiers.any()

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        stats = self.pool.stats()
        states = stats.free + stats.active + stats.historical + stats.incoming
        assert states == stats.blocks + stats.draining
        if stats.draining:
            assert stats.free == 0

    @invariant()
    def a_subscriber_knows_the_same(self) -> None:
        batch = self.pool.take_events()
        if batch is not None:
            assert batch.seq == self.next_seq
            self.next_seq += len(batch.events)
            for event in batch.events:
                self.apply(event)
        assert self.replica == self.places()

    def apply(self, event) -> None:
        tokens = unpack_tokens(event.tokens)
        if isinstance(event, Stored):
            known = {(event.namespace, path): "device" for path in all_prefixes(tokens)}
            self.replica = known | self.replica
            return
        if isinstance(event, Moved):
            beyond = all_prefixes(tokens)[event.start // PAGE :]
            assert beyond
            self.replica |= {(event.namespace, path): event.tier for path in beyond}
            return
        keep = event.keep // PAGE
        first = tuple(tokens[: event.keep + PAGE : PAGE].tolist())
        self.replica = {
            (space, path): tier
            for (space, path), tier in self.replica.items()
            if space != event.namespace or path[: len(first)] != first or len(path) <= keep
        }


class HostOnlyMachine(TiersMachine):
    disk = 0


class DiskOnlyMachine(TiersMachine):
    host = 0


class PiecesMachine(TiersMachine):
    layout = PIECES


@pytest.mark.parametrize("machine", [TiersMachine, HostOnlyMachine, DiskOnlyMachine, PiecesMachine])
def test_tiers(machine: type[TiersMachine]) -> None:
    case = machine.TestCase
    case.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
    case().runTest()
