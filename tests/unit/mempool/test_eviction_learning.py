"""The default policy: what it remembers of prefixes, what it learns from uses, and what follows from that."""

from __future__ import annotations

import numpy as np
import pytest

from memserve.core.clock import VirtualClock
from memserve.core.config import EVICTION
from memserve.core.errors import ConfigError
from memserve.core.types import InstanceId, Namespace
from memserve.mempool import HitDensity, LeastRecentlyUsed, MemPool, policy_by_name
from memserve.mempool.eviction.density import HitDensities
from memserve.mempool.eviction.history import CHUNK_BLOCKS, Past, PrefixHistory

from .conftest import LAYOUT, prompt

NS = Namespace("m")
PAGE = 16
CHUNK = CHUNK_BLOCKS * PAGE


def tokens(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 128_000, count, dtype=np.int32)


# --- history ---


def recall(history: PrefixHistory, wanted: np.ndarray, follows: int = 0, now: float = 0.0) -> list[Past]:
    return history.recall(NS, wanted, follows, now)


def test_a_prompt_is_remembered_once_it_was_recalled() -> None:
    history, wanted = PrefixHistory(1024, PAGE), tokens(3 * CHUNK)
    assert recall(history, wanted[: 2 * CHUNK], follows=5, now=7.0) == []
    assert recall(history, wanted, follows=1, now=8.0) == [(2, 1, 5, 7.0)]
    assert recall(history, wanted, follows=9, now=9.0) == [(2, 2, 5, 8.0), (1, 1, 1, 8.0)]


def test_a_prompt_that_differs_shares_what_lies_before_the_next_chunk() -> None:
    history = PrefixHistory(1024, PAGE)
    one, other = tokens(4 * CHUNK), tokens(4 * CHUNK)
    other[CHUNK + 64] += 1
    recall(history, one)
    assert [chunks for chunks, *_ in recall(history, other)] == [2]


def test_chunks_of_every_length_of_a_prompt_are_the_same() -> None:
    history, long = PrefixHistory(4096, PAGE), tokens(100 * CHUNK)
    recall(history, long)
    for size in (PAGE, CHUNK - PAGE, CHUNK, CHUNK + PAGE, 99 * CHUNK + PAGE):
        assert sum(chunks for chunks, *_ in recall(history, long[:size])) == -(-size // CHUNK)


def test_namespaces_do_not_share_a_past() -> None:
    history = PrefixHistory(1024, PAGE)
    for space in (NS, Namespace("n"), Namespace("m", adapter="a"), Namespace("m", salt="a")):
        assert history.recall(space, tokens(64), 0, 0.0) == []


def test_an_overwritten_chunk_is_like_the_next() -> None:
    history, wanted = PrefixHistory(1024, PAGE), tokens(3 * CHUNK)
    recall(history, wanted, follows=2, now=9.0)
    alone = PrefixHistory(1024, PAGE)
    recall(alone, wanted[:CHUNK])
    first = alone._table.reshape(-1, 16).any(axis=1)
    history._table.reshape(-1, 16)[first] = 0
    assert recall(history, wanted) == [(3, 1, 2, 9.0)]


def test_the_history_is_bounded() -> None:
    history = PrefixHistory(64, PAGE)
    for seed in range(200):
        recall(history, tokens(4 * CHUNK, seed))
    assert history._table.nbytes == 64 * 16
    assert sum(chunks for chunks, *_ in recall(history, tokens(4 * CHUNK, 199))) == 4


def test_uses_are_counted_up_to_a_limit() -> None:
    history = PrefixHistory(64, PAGE)
    for turn in range(300):
        past = recall(history, tokens(CHUNK))
        assert [uses for _, uses, *_ in past] == ([min(turn, 255)] if turn else [])


# --- densities ---


def test_density_is_hits_per_block_and_second_of_the_best_stay() -> None:
    densities = HitDensities(2, fade=1.0)
    densities.enter(0, 99)
    densities.use(0, 10.0, 50, 1)
    densities.evaluate()
    # Half of the class is used within 15 s of its last use; a stay costs 60 s more.
    assert densities.of(0, 0.0)[0] == pytest.approx(0.5 / (15 + 60))
    assert densities.of(0, 6.0)[0] == pytest.approx(0.5 / (15 - 5 + 60))
    assert densities.of(0, 20.0)[0] == 0.0


def test_those_that_were_used_do_not_wait_any_more() -> None:
    densities = HitDensities(2, fade=1.0)
    densities.enter(0, 99)
    densities.use(0, 1.0, 60, 1)
    densities.use(0, 100.0, 20, 1)
    densities.evaluate()
    # Of the 40 that reach 90 s half are used within the next 30 s.
    assert densities.of(0, 95.0)[0] == pytest.approx(0.5 / (30 + 60))


def test_densities_agree_with_the_formula() -> None:
    rng = np.random.default_rng(5)
    densities = HitDensities(4, fade=1.0)
    for kind in range(3):
        densities.enter(kind, 1000)
        for age in rng.exponential(400, 40):
            densities.use(kind, float(age), int(rng.integers(1, 20)), 3)
    densities.evaluate()
    limits = [5, 15, 30, 45, 60, 90, 120, 180, 240, 300, 420, 600, 900, 1200, 1800, 3600]
    for kind in range(3):
        used = np.array(densities._used[kind])
        for at, lowest in enumerate([0, *limits[:-1]]):
            left = 1001 - used[:at].sum()
            rates = [
                used[at : upto + 1].sum() / left / (limits[upto] - lowest + 60)
                for upto in range(at, len(limits))
            ]
            assert densities.of(kind, limits[at])[0] == pytest.approx(max(rates))


def test_old_experience_fades() -> None:
    densities = HitDensities(2, fade=0.5)
    densities.enter(0, 100)
    densities.use(0, 1.0, 100, 1)
    densities.evaluate()
    before = densities.of(0, 0.0)[0]
    densities.enter(0, 1000)
    densities.evaluate()
    assert densities.of(0, 0.0)[0] < before / 4


# --- the policy ---


def pool_of(blocks: int, clock: VirtualClock) -> MemPool:
    return MemPool(LAYOUT, blocks, instance=InstanceId("a"), incarnation=1, clock=clock)


def request(pool: MemPool, *names: int) -> int:
    """One request for a prompt of named blocks. Returns blocks found cached."""
    wanted = prompt(*names)
    with pool.match(wanted, NS) as lease:
        fresh = pool.alloc_mem(len(names) - len(lease.addrs))
        pool.insert(wanted, lease.addrs.concat(fresh), NS)
        pool.free_mem(fresh)
        return len(lease.addrs)


def test_hit_density_is_the_default(clock: VirtualClock) -> None:
    pool = pool_of(4, clock)
    assert isinstance(pool._tiers._policies[0], HitDensity)
    pool.close()


def serve_flood(eviction: HitDensity | LeastRecentlyUsed, clock: VirtualClock) -> int:
    """A prompt asked for every 20 s among 8 others, each asked for once. Returns how often it was found."""
    pool = MemPool(LAYOUT, 6, instance=InstanceId("a"), incarnation=1, clock=clock, eviction=eviction)
    found = 0
    for turn in range(400):
        found += request(pool, 1)
        for other in range(8):
            clock.advance(2.5)
            request(pool, 1000 + turn * 8 + other)
    pool.check([])
    pool.close()
    return found


def test_what_comes_back_outlasts_a_flood_of_what_does_not() -> None:
    assert serve_flood(LeastRecentlyUsed(), VirtualClock()) == 0
    # It was evicted at first: that it comes back is known from what is remembered of evicted blocks.
    assert serve_flood(HitDensity(6, LAYOUT.block_tokens), VirtualClock()) > 250


def test_the_same_requests_evict_the_same_blocks() -> None:
    def survivors() -> list[list[int]]:
        clock = VirtualClock()
        pool = pool_of(20, clock)
        order = np.random.default_rng(3).zipf(1.3, 3000) % 200
        for name in order.tolist():
            clock.advance(0.7)
            request(pool, name % 7, name, name + 1)
        paths = [path.tolist() for _, path in pool._index.paths()]
        pool.close()
        return paths

    assert survivors() == survivors()


def test_every_configured_name_is_a_policy() -> None:
    made = [type(policy_by_name(name, 64, PAGE)) for name in EVICTION]
    assert len(set(made)) == len(EVICTION)
    with pytest.raises(ConfigError, match=r"pool\.eviction.*'mru'.*hit-density, lru"):
        policy_by_name("mru", 64, PAGE)
