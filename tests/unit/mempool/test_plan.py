"""Splitting a copy into steps."""

from __future__ import annotations

import numpy as np
import pytest

from memserve.core.types import InstanceId
from memserve.mempool.address import Addresses, Tier, pack_first
from memserve.mempool.modes import Cut
from memserve.mempool.transfer.plan import plan_steps

WHOLE = Cut(1, 10, 4)


def addresses(*numbers: int) -> Addresses:
    return Addresses(InstanceId("a"), 1, pack_first(100, Tier.DEVICE)[list(numbers)])


@pytest.mark.parametrize(("step_bytes", "sizes"), [(1, [1] * 5), (20, [2, 2, 1]), (1000, [5])])
def test_steps_keep_order_and_bounds(step_bytes: int, sizes: list[int]) -> None:
    steps = plan_steps(addresses(4, 2, 9, 1, 7), addresses(10, 11, 12, 13, 14), WHOLE, step_bytes=step_bytes)
    assert [len(step.src) for step in steps] == sizes
    assert np.concatenate([step.src for step in steps]).tolist() == [4, 2, 9, 1, 7]
    assert np.concatenate([step.dst for step in steps]).tolist() == [10, 11, 12, 13, 14]


def test_nothing_to_copy_is_no_step() -> None:
    assert plan_steps(addresses(), addresses(), WHOLE) == []
