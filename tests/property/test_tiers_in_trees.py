"""What the scheduler believes of tiers is what pools with host and disk do, step by step and by snapshots."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from memserve.core.clock import VirtualClock
from memserve.core.errors import OutOfBlocks
from memserve.core.messages import Member, Ready
from memserve.core.types import InstanceId, Namespace, Role, Tokens, as_tokens
from memserve.mempool import DiskTier, KVLayout, MemPool, Tier
from memserve.scheduler.policies import policy_by_name
from memserve.scheduler.service import GlobalScheduler

POINTS = KVLayout("points", layers=1, kv_heads=1, head_dim=1)
BLOCK = POINTS.block_tokens
SPACE = Namespace("m")
NAME = InstanceId("a")
Prompt = tuple[int, ...]

prompts = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)
steps = st.lists(
    st.tuples(st.sampled_from(["compute", "swap in", "swap out", "delete"]), prompts, st.integers(1, 4)),
    max_size=30,
)


def tokens_of(prompt: Prompt) -> Tokens:
    return as_tokens([t for block in prompt for t in [block] * BLOCK])


@contextmanager
def new_pool(host: int, disk: int, folder: str, incarnation: int = 1) -> Iterator[MemPool]:
    tier = DiskTier(Path(folder), disk) if disk else None
    clock = VirtualClock()
    pool = MemPool(
        POINTS, 6, instance=NAME, incarnation=incarnation, clock=clock, host_blocks=host, disk=tier
    )
    yield pool
    pool.check([])
    pool.close()


def new_scheduler(pool: MemPool) -> GlobalScheduler:
    scheduler = GlobalScheduler(policy_by_name("cost"), VirtualClock())
    ready = Ready(NAME, "", "m", 4096, BLOCK, pool.blocks, 64, POINTS.fingerprint, "")
    scheduler.member_ready(Member(NAME, pool.incarnation, Role.COLOCATED, ""), ready)
    return scheduler


def act(pool: MemPool, what: str, prompt: Prompt, n: int) -> None:
    tokens = tokens_of(prompt)
    try:
        if what == "swap out":
            pool.swap_out(n)
        elif what == "delete":
            pool.delete(tokens, SPACE)
        elif what == "swap in":
            # Perhaps from the middle, which leaves the index as it is.
            with pool.match(tokens, SPACE) as lease:
                pool.free_mem(pool.swap_in(lease.addrs[n - 1 :]))
        else:
            compute(pool, tokens, n > 2)
    except OutOfBlocks:
        return


def compute(pool: MemPool, tokens: Tokens, reuses: bool) -> None:
    """With what is cached brought up, or all of it again."""
    fresh = pool.alloc_mem(len(tokens) // BLOCK)
    try:
        with pool.match(tokens, SPACE) as lease:
            up = pool.swap_in(lease.addrs if reuses else lease.addrs[:0])
        addrs = up.concat(fresh[len(up) :])
        pool.insert(tokens, addrs, SPACE)
        pool.free_mem(up)
    finally:
        pool.free_mem(fresh)


def hear(scheduler: GlobalScheduler, pool: MemPool) -> None:
    """As the server does: a snapshot where one is needed."""
    events = pool.take_events()
    if events is not None and scheduler.on_pool_events(events):
        assert not scheduler.on_snapshot(pool.snapshot())


def agree(scheduler: GlobalScheduler, pool: MemPool, asked: set[Prompt]) -> None:
    scheduler.state.check()
    for prompt in asked:
        tokens = tokens_of(prompt)
        believed = scheduler.state.match(SPACE, tokens)
        with pool.match(tokens, SPACE) as lease:
            there = sum(tier == Tier.DEVICE for tier in lease.tiers.tolist())
            assert believed.tokens(NAME) == len(lease.addrs) * BLOCK
            assert believed.on_device(NAME) == there * BLOCK


@settings(max_examples=150, deadline=None)
@given(script=steps, host=st.integers(0, 4), disk=st.sampled_from([0, 0, 6]))
def test_devices_hold_what_is_believed(script: list[tuple[str, Prompt, int]], host: int, disk: int) -> None:
    with tempfile.TemporaryDirectory() as folder, new_pool(host, disk, folder) as pool:
        pool.take_events()
        always = new_scheduler(pool)
        asked = {prompt for _, prompt, _ in script}
        for what, prompt, n in script:
            act(pool, what, prompt, n)
            hear(always, pool)
            agree(always, pool, asked)
        late = new_scheduler(pool)
        late.on_snapshot(pool.snapshot())
        agree(late, pool, asked)


FORK = [("compute", (0, 1, 2), 1), ("compute", (0, 1, 1), 3), ("swap out", (0,), 3)]
"""Leaves on disk two ends that share a beginning there, which the device's last block has."""


@settings(max_examples=100, deadline=None)
@given(script=steps, again=steps)
@example(script=FORK, again=[("compute", (2,), 1), ("swap out", (2,), 1), ("compute", (0,), 1)])
def test_what_a_restart_finds_on_disk_lies_on_disk(
    script: list[tuple[str, Prompt, int]], again: list[tuple[str, Prompt, int]]
) -> None:
    asked = {prompt for _, prompt, _ in script + again}
    with tempfile.TemporaryDirectory() as folder:
        with new_pool(0, 12, folder) as pool:
            for what, prompt, n in script:
                act(pool, what, prompt, n)
        with new_pool(0, 12, folder, incarnation=2) as pool:
            scheduler = new_scheduler(pool)
            hear(scheduler, pool)
            for what, prompt, n in again:
                act(pool, what, prompt, n)
                hear(scheduler, pool)
                agree(scheduler, pool, asked)
