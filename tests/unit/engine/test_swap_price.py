"""What an engine tells of bringing KV up to its device: a guess, then what it measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memserve.core.clock import VirtualClock
from memserve.core.types import InstanceId, Namespace, RequestId, SamplingParams, as_tokens
from memserve.engine.pace import StepTimes
from memserve.engine.phases import PHASES
from memserve.engine.sequence import new_sequence
from memserve.engine.sequence_blocks import SequenceBlocks
from memserve.mempool import Addresses, DiskTier, KVLayout, MemPool, Tier

SPACE = Namespace("m")
SECONDS = {Tier.DEVICE: 0.0, Tier.HOST: 1e-3, Tier.DISK: 6e-3}
"""What a block takes to come up."""


class TimedPool(MemPool):
    """Takes its time to swap in, on a clock that stands still otherwise."""

    def swap_in(self, addrs: Addresses) -> Addresses:
        assert isinstance(self._clock, VirtualClock)
        self._clock.advance(sum(SECONDS[Tier(tier)] for tier in addrs.tiers.tolist()))
        return super().swap_in(addrs)


Make = Callable[..., tuple[TimedPool, SequenceBlocks]]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[TimedPool] = []

    def make_pool(host: int = 0, disk: int = 0) -> tuple[TimedPool, SequenceBlocks]:
        clock = VirtualClock()
        pool = TimedPool(
            KVLayout("tiny", 1, 1, 16),
            20,
            instance=InstanceId("c"),
            incarnation=1,
            clock=clock,
            host_blocks=host,
            disk=DiskTier(tmp_path, disk) if disk else None,
        )
        made.append(pool)
        return pool, SequenceBlocks(pool, PHASES["colocated"], StepTimes(), clock)

    yield make_pool
    for pool in made:
        pool.check(())
        pool.close()


def use_swapped_out(pool: TimedPool, blocks: SequenceBlocks, count: int = 4) -> None:
    """Compute a prompt of ``count`` blocks and one token, swap it out, and ask for it again."""
    for _ in range(2):
        tokens = as_tokens(range(count * 16 + 1))
        sequence = new_sequence(RequestId("r"), SPACE, tokens, SamplingParams(max_tokens=1))
        assert blocks.take(sequence)
        sequence.computed = count * 16
        blocks.publish(sequence)
        blocks.release(sequence)
        assert pool.swap_out(count) in (0, count)


def test_nothing_without_lower_tiers(make: Make) -> None:
    assert make()[1].swap_seconds(0, 0) == 0.0


def test_a_guess_before_anything_was_measured(make: Make) -> None:
    host, disk = make(host=4)[1].swap_seconds(0, 0), make(disk=4)[1].swap_seconds(0, 0)
    assert 0 < host < disk


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
def test_what_was_measured(make: Make, tier: Tier) -> None:
    pool, blocks = make(host=8) if tier is Tier.HOST else make(disk=8)
    use_swapped_out(pool, blocks)
    lie = (4, 0) if tier is Tier.HOST else (0, 4)
    assert pool.stats().swapped_in_blocks == 4
    assert blocks.swap_seconds(*lie) == pytest.approx(SECONDS[tier] / 16)
    assert blocks.swap_seconds(0, 0) == pytest.approx(SECONDS[tier] / 16), "where the next would go"


def test_tiers_count_by_what_lies_there(make: Make) -> None:
    _, blocks = make(host=4, disk=4)
    host, disk = blocks.swap_seconds(1, 0), blocks.swap_seconds(0, 1)
    assert blocks.swap_seconds(3, 1) == pytest.approx((3 * host + disk) / 4)
