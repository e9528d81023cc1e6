"""A peer's memory stays mapped while a copy goes there, whatever other threads find out meanwhile."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest

from memserve.mempool.address import BlockNumbers
from memserve.mempool.arena import Arena, Extent
from memserve.mempool.transfer.backends import Transmission
from memserve.mempool.transfer.plan import Step
from memserve.mempool.transfer.shm import SharedMemoryBackend

BLOCK = 4096


@dataclass(frozen=True)
class Interrupted(Step):
    """Another thread gets its turn when the addresses of ``dst`` are known and nothing is copied yet."""

    meanwhile: Callable[[], None] = lambda: None

    def __getattribute__(self, name: str) -> object:
        if name == "src":
            object.__getattribute__(self, "meanwhile")()
        return object.__getattribute__(self, name)


@pytest.fixture
def workers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as threads:
        yield threads


def numbers(*values: int) -> BlockNumbers:
    return np.array(values, np.int64)


def order(step: Step) -> Transmission:
    return Transmission(1, (step,), BLOCK, 0, True, lambda: True, lambda first, units: None)


def test_a_mapping_that_another_thread_replaces_lives_as_long_as_the_copy(
    workers: ThreadPoolExecutor,
) -> None:
    own, theirs = Arena.allocate(BLOCK, 1, "own"), Arena.allocate(BLOCK, 1, "theirs")
    own.block_memory(0)[:] = 7
    attached = Arena.attach(BLOCK, theirs.fds, theirs.extents)
    theirs.grow(Extent(1, 1), "theirs")
    mapped: list[weakref.ref[Arena]] = []

    def extend(known: Arena) -> Arena:
        arena = known.extended(theirs.fds, theirs.extents)
        mapped.append(weakref.ref(arena))
        return arena

    backend = SharedMemoryBackend(own, attached, workers, extend)

    def replace_the_mapping() -> None:
        if len(mapped) == 1:
            theirs.grow(Extent(2, 1), "theirs")
            backend.transmit(order(Step(numbers(0), numbers(2), numbers(0), 1)))
            assert mapped[0]() is not None, "it is unmapped, and the copy goes there all the same"

    backend.transmit(order(Interrupted(numbers(0), numbers(1), numbers(0), 1, replace_the_mapping)))
    assert len(mapped) == 2
    assert bytes(theirs.block_memory(1)) == bytes(theirs.block_memory(2)) == b"\7" * BLOCK
    assert mapped[0]() is None, "nobody needs it any more"
    own.close()
    theirs.close()
