"""Steps of a transfer: everything once, in order, within bounds, and little left to verify after the last."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from memserve.core.types import InstanceId
from memserve.mempool.address import Addresses, Tier, pack_first
from memserve.mempool.modes import Cut
from memserve.mempool.transfer.plan import LAST_STEP_BYTES, STEP_BYTES, plan_steps


def some_blocks(count: int) -> Addresses:
    return Addresses(InstanceId("a"), 1, pack_first(max(count, 1), Tier.DEVICE)[:count])


@given(blocks=st.integers(0, 300), block_bytes=st.integers(1, 2 * STEP_BYTES))
def test_steps_cover_everything_and_the_last_of_several_is_short(blocks: int, block_bytes: int) -> None:
    addrs = some_blocks(blocks)
    steps = plan_steps(addrs, addrs, Cut(1, block_bytes, 4))
    sizes = [len(step.src) for step in steps]
    assert np.concatenate([[], *(step.src for step in steps)]).tolist() == list(range(blocks))
    assert all(np.array_equal(step.src, step.dst) for step in steps)
    assert all(1 <= size <= max(1, STEP_BYTES // block_bytes) for size in sizes)
    assert len(sizes) < 2 or sizes[-1] <= max(1, LAST_STEP_BYTES // block_bytes)


@given(
    blocks=st.integers(0, 40),
    layers=st.integers(1, 6),
    halves=st.sampled_from([1, 2]),
    unit_bytes=st.integers(1, STEP_BYTES),
    layerwise=st.booleans(),
)
def test_units_come_part_by_part_and_a_layer_waits_for_no_later_one(
    blocks: int, layers: int, halves: int, unit_bytes: int, layerwise: bool
) -> None:
    src, cut = some_blocks(blocks), Cut(layers * halves, unit_bytes, layers)
    dst = Addresses(src.instance, 1, src.packed[::-1])
    steps = plan_steps(src, dst, cut, layerwise=layerwise)
    units = [unit for step in steps for unit in zip(step.parts.tolist(), step.src.tolist(), strict=True)]
    assert units == [(part, block) for part in range(cut.parts) for block in range(blocks)]
    for step in steps:
        assert (step.src + step.dst == blocks - 1).all()
        assert 1 <= len(step.src) <= max(1, STEP_BYTES // unit_bytes)
        needed = int(step.parts.max()) // halves + 1
        assert step.layers == (needed if layerwise else layers)
        assert not layerwise or int(step.parts.min()) // halves + 1 == needed
