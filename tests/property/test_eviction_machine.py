"""Every eviction policy in a real pool: exact, leaf first, never under a lease.

For the policies whose order can be told in a sentence, a brute-force model names every block that must go.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memserve.core.clock import VirtualClock
from memserve.core.config import EVICTION
from memserve.core.errors import OutOfBlocks
from memserve.core.types import InstanceId, Namespace
from memserve.mempool import KVLayout, Match, MemPool, policy_by_name

PAGE = 2
BLOCKS = 12
LAYOUT = KVLayout("tiny", layers=1, kv_heads=1, head_dim=2, block_tokens=PAGE)
NS = Namespace("m")

Prefix = tuple[int, ...]
prefixes = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)
ORDERS: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "lru": lambda uses, stamp: (stamp,),
    "slru": lambda uses, stamp: (uses >= 2, stamp),
    "lfu": lambda uses, stamp: (uses, stamp),
}


def tokens_of(prefix: Prefix) -> np.ndarray:
    return np.repeat(np.array(prefix, np.int32), PAGE)


def prefixes_of(path: Prefix) -> list[Prefix]:
    return [path[:upto] for upto in range(1, len(path) + 1)]


class EvictionMachine(RuleBasedStateMachine):
    @initialize(policy=st.sampled_from(EVICTION))
    def start(self, policy: str) -> None:
        self.policy = policy
        self.clock = VirtualClock()
        self.pool = MemPool(
            LAYOUT,
            BLOCKS,
            instance=InstanceId("a"),
            incarnation=1,
            clock=self.clock,
            eviction=policy_by_name(policy, BLOCKS, PAGE),
        )
        self.cached: dict[Prefix, tuple[int, int]] = {}
        """Uses and last use of every cached block."""
        self.leases: list[tuple[Match, Prefix]] = []
        self.uses = itertools.count()

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.pool.close()

    # --- the model ---

    def known(self, path: Prefix) -> Prefix:
        return max((p for p in prefixes_of(path) if p in self.cached), default=())

    def held(self) -> set[Prefix]:
        return {prefix for _, path in self.leases for prefix in prefixes_of(path)}

    def use(self, path: Prefix, times: int) -> None:
        now = next(self.uses)
        for prefix in prefixes_of(path):
            self.cached[prefix] = (self.cached[prefix][0] + times, now)

    def leaves(self, cached: set[Prefix], held: set[Prefix]) -> list[Prefix]:
        inner = {prefix[:-1] for prefix in cached}
        return [prefix for prefix in cached if prefix not in inner and prefix not in held]

    def victims(self, need: int, held: set[Prefix]) -> set[Prefix] | None:
        """Blocks that the policy must give up; None if there are too few."""
        left = set(self.cached)
        order = ORDERS.get(self.policy, ORDERS["lru"])
        for _ in range(need):
            leaves = self.leaves(left, held)
            if not leaves:
                return None
            left.remove(min(leaves, key=lambda leaf: order(*self.cached[leaf])))
        return set(self.cached) - left

    def now_cached(self) -> set[Prefix]:
        paths = [tuple(tokens[::PAGE].tolist()) for _, tokens in self.pool._index.paths()]
        return {prefix for path in paths for prefix in prefixes_of(path)}

    def note_evictions(self, need: int, held: set[Prefix]) -> None:
        expected = self.victims(need, held)
        assert expected is not None
        gone = set(self.cached) - self.now_cached()
        assert len(gone) == need
        assert not gone & held
        if self.policy in ORDERS:
            assert gone == expected
        for prefix in gone:
            del self.cached[prefix]

    # --- what happens to a pool ---

    @rule(path=prefixes)
    def request(self, path: Prefix) -> None:
        lease = self.pool.match(tokens_of(path), NS)
        known = self.known(path)
        assert lease.tokens == len(known) * PAGE
        self.use(known, times=1)
        held = self.held() | set(prefixes_of(known))
        need = max(0, len(path) - len(known) - (BLOCKS - len(self.cached)))
        with lease:
            if self.victims(need, held) is None:
                with pytest.raises(OutOfBlocks):
                    self.pool.alloc_mem(len(path) - len(known))
                assert self.now_cached() == set(self.cached)
                return
            fresh = self.pool.alloc_mem(len(path) - len(known))
            self.note_evictions(need, held)
            addrs = lease.addrs.concat(fresh) if len(known) else fresh
            self.pool.insert(tokens_of(path), addrs, NS)
            self.pool.free_mem(fresh)
        self.use(known, times=0)
        now = next(self.uses)
        for prefix in prefixes_of(path)[len(known) :]:
            self.cached[prefix] = (1, now)

    @rule(path=prefixes)
    def hold(self, path: Prefix) -> None:
        known = self.known(path)
        self.leases.append((self.pool.match(tokens_of(path), NS), known))
        self.use(known, times=1)

    @precondition(lambda self: self.leases)
    @rule(pick=st.integers(0, 99))
    def let_go(self, pick: int) -> None:
        self.leases.pop(pick % len(self.leases))[0].release()

    @precondition(lambda self: not self.leases)
    @rule(path=prefixes)
    def forget(self, path: Prefix) -> None:
        self.pool.delete(tokens_of(path), NS)
        left = self.now_cached()
        self.cached = {prefix: past for prefix, past in self.cached.items() if prefix in left}

    @rule(need=st.integers(1, BLOCKS))
    def turn_over(self, need: int) -> None:
        missing = max(0, need - (BLOCKS - len(self.cached)))
        held = self.held()
        if self.victims(missing, held) is None:
            with pytest.raises(OutOfBlocks):
                self.pool.alloc_mem(need)
            return
        addrs = self.pool.alloc_mem(need)
        self.note_evictions(missing, held)
        self.pool.free_mem(addrs)

    @rule(seconds=st.sampled_from([0.1, 7.0, 100.0, 5000.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @invariant()
    def pool_is_sound(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check([])
            assert self.now_cached() == set(self.cached)

    @invariant()
    def the_past_is_known(self) -> None:
        if not hasattr(self, "pool") or self.policy == "hit-density":
            return
        for _, tree in self.pool._index._trees.items():
            for node in tree.nodes():
                path = tuple(tree.path_tokens(node)[::PAGE].tolist())
                usage = node.payload.usage
                above = len(path) - usage.blocks
                for at in range(usage.blocks):
                    assert usage.run_at(at + 1).uses == self.cached[path[: above + at + 1]][0]


TestEviction = EvictionMachine.TestCase
TestEviction.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
