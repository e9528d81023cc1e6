"""A scheduler that starts late or loses events believes, by snapshots, what one does that heard all."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.core.clock import VirtualClock
from memserve.core.messages import Member, PoolEvents, Ready, Snapshot
from memserve.core.types import InstanceId, Namespace, Role, Tokens, as_tokens
from memserve.mempool import KVLayout, MemPool
from memserve.scheduler.policies import policy_by_name
from memserve.scheduler.service import GlobalScheduler

POINTS = KVLayout("points", layers=1, kv_heads=1, head_dim=1)
BLOCK = POINTS.block_tokens
SPACE = Namespace("m")
Prompt = tuple[int, ...]

prompts = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)
steps = st.lists(st.tuples(st.integers(0, 1), prompts, st.booleans()), max_size=25)
"""Which pool computes which prompt, and whether the late scheduler hears of what it did."""


def tokens_of(prompt: Prompt) -> Tokens:
    return as_tokens([t for block in prompt for t in [block] * BLOCK])


class Late:
    """A scheduler that is told only some of the events, and asks for snapshots as the server does."""

    def __init__(self, pools: dict[InstanceId, MemPool]) -> None:
        self.scheduler = new_scheduler(pools)
        self.pools = pools
        self.in_flight: dict[InstanceId, Snapshot] = {}

    def hear(self, events: PoolEvents) -> None:
        name = events.instance
        if self.scheduler.on_pool_events(events) and name not in self.in_flight:
            self.in_flight[name] = self.pools[name].snapshot()

    def settle(self) -> None:
        """All answers arrive."""
        while self.in_flight:
            name, snapshot = self.in_flight.popitem()
            if self.scheduler.on_snapshot(snapshot):
                self.in_flight[name] = self.pools[name].snapshot()


def new_scheduler(pools: dict[InstanceId, MemPool]) -> GlobalScheduler:
    scheduler = GlobalScheduler(policy_by_name("prompt-tree"), VirtualClock())
    for name, pool in pools.items():
        ready = Ready(name, "", "m", 4096, BLOCK, pool.blocks, 64, POINTS.fingerprint, "")
        scheduler.member_ready(Member(name, 1, Role.COLOCATED, ""), ready)
    return scheduler


def compute(pool: MemPool, prompt: Prompt) -> PoolEvents | None:
    """As an engine would: little room, so that it also evicts."""
    tokens = tokens_of(prompt)
    with pool.match(tokens, SPACE) as lease:
        missing = len(prompt) - len(lease.addrs)
        addrs = lease.detach().concat(pool.alloc_mem(missing))
    pool.insert(tokens, addrs, SPACE)
    pool.free_mem(addrs)
    return pool.take_events()


@settings(max_examples=150, deadline=None)
@given(script=steps, start=st.integers(0, 25), last=prompts)
def test_late_and_lossy_believes_the_same_as_one_that_heard_all(
    script: list[tuple[int, Prompt, bool]], start: int, last: Prompt
) -> None:
    names = [InstanceId("a"), InstanceId("b")]
    clock = VirtualClock()
    pools = {name: MemPool(POINTS, 8, instance=name, incarnation=1, clock=clock) for name in names}
    for pool in pools.values():
        pool.take_events()
    always, late = new_scheduler(pools), Late(pools)
    asked = {last}
    for at, (number, prompt, heard) in enumerate(script):
        if at == start:
            late = Late(pools)
        events = compute(pools[names[number]], prompt)
        if events is not None:
            assert not always.on_pool_events(events)
            if heard:
                late.hear(events)
        if heard and prompt == last:
            late.settle()
        asked.add(prompt)
    for name in names:
        # What was lost is noticed when more comes.
        events = compute(pools[name], (9,))
        assert events is not None
        always.on_pool_events(events)
        late.hear(events)
    late.settle()
    for prompt in asked:
        tokens = tokens_of(prompt)
        assert late.scheduler.state.match(SPACE, tokens).by_instance() == (
            always.state.match(SPACE, tokens).by_instance()
        )
    for scheduler in (always, late.scheduler):
        scheduler.state.check()
    for pool in pools.values():
        pool.check([])
        pool.close()
