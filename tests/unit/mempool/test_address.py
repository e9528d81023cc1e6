"""Packed addresses."""

from __future__ import annotations

import numpy as np
import pytest

from memserve.core.errors import StaleAddress
from memserve.core.types import InstanceId
from memserve.mempool.address import MAX_BLOCKS, Addresses, Tier, numbers_of, pack_first

A = InstanceId("a")


def test_the_three_parts_do_not_touch_each_other() -> None:
    packed = pack_first(3, Tier.DISK) | np.uint64(0xFFFFFFFF)
    addrs = Addresses(A, 1, packed)
    assert addrs.blocks.tolist() == [0, 1, 2]
    assert addrs.generations.tolist() == [0xFFFFFFFF] * 3
    assert (packed >> np.uint64(62)).tolist() == [Tier.DISK] * 3


def test_the_largest_block_number_survives() -> None:
    packed = np.array([(MAX_BLOCKS - 1) << 32], np.uint64)
    assert numbers_of(packed).tolist() == [MAX_BLOCKS - 1]
    assert Addresses(A, 1, packed).blocks.dtype == np.int32


def test_bytes_round_trip() -> None:
    addrs = Addresses(A, 4, pack_first(5, Tier.DEVICE))
    assert Addresses.from_bytes(A, 4, addrs.to_bytes()) == addrs
    assert Addresses.from_bytes(A, 5, addrs.to_bytes()) != addrs


def test_slices_and_concatenation_keep_the_order() -> None:
    addrs = Addresses(A, 1, pack_first(6, Tier.DEVICE))
    assert addrs[4:].concat(addrs[:2]).blocks.tolist() == [4, 5, 0, 1]
    assert len(addrs[2:3]) == 1


@pytest.mark.parametrize("other", [("b", 1), ("a", 2)])
def test_blocks_of_different_owners_are_not_joined(other: tuple[str, int]) -> None:
    mine = Addresses(A, 1, pack_first(1, Tier.DEVICE))
    with pytest.raises(StaleAddress, match="cannot join"):
        mine.concat(Addresses(InstanceId(other[0]), other[1], pack_first(1, Tier.DEVICE)))
