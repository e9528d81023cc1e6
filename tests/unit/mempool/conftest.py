"""A small pool on a virtual clock."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from memserve.core.clock import VirtualClock
from memserve.core.types import InstanceId
from memserve.mempool import KVLayout, MemPool

LAYOUT = KVLayout("tiny", layers=1, kv_heads=1, head_dim=2, block_tokens=4)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def pool(clock: VirtualClock) -> Iterator[MemPool]:
    made = MemPool(LAYOUT, 8, instance=InstanceId("a"), incarnation=1, clock=clock)
    yield made
    made.check()
    made.close()


def prompt(*blocks: int, extra: int = 0) -> np.ndarray:
    """Tokens of blocks that are named by numbers, and ``extra`` tokens of one more."""
    whole = np.repeat(np.array(blocks, np.int32), LAYOUT.block_tokens)
    return np.concatenate((whole, np.full(extra, 7777, np.int32)))
