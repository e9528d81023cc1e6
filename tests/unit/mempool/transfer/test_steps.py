"""Steps of a copy: everything once, in order, within bounds, and little left to verify after the last."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from memserve.core.types import InstanceId
from memserve.mempool.address import Addresses, Tier, pack_first
from memserve.mempool.modes import Cut
from memserve.mempool.transfer.plan import LAST_STEP_BYTES, STEP_BYTES, plan_steps


@given(blocks=st.integers(0, 300), block_bytes=st.integers(1, 2 * STEP_BYTES))
def test_steps_cover_everything_and_the_last_of_several_is_short(blocks: int, block_bytes: int) -> None:
    addrs = Addresses(InstanceId("a"), 1, pack_first(max(blocks, 1), Tier.DEVICE)[:blocks])
    steps = plan_steps(addrs, addrs, Cut(1, block_bytes, 4))
    sizes = [len(step.src) for step in steps]
    assert np.concatenate([[], *(step.src for step in steps)]).tolist() == list(range(blocks))
    assert all(np.array_equal(step.src, step.dst) for step in steps)
    assert all(1 <= size <= max(1, STEP_BYTES // block_bytes) for size in sizes)
    assert len(sizes) < 2 or sizes[-1] <= max(1, LAST_STEP_BYTES // block_bytes)
