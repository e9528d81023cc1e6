"""The bounded event log."""

from __future__ import annotations

import numpy as np

from memserve.core.messages import Moved, Removed, Stored
from memserve.core.types import InstanceId, Namespace, pack_tokens
from memserve.mempool.address import Tier
from memserve.mempool.events import EventLog

NS = Namespace("m")
TOKENS = np.arange(2, dtype=np.int32)


def followed(limit_bytes: int = 1 << 20) -> EventLog:
    log = EventLog(InstanceId("a"), 3, limit_bytes)
    assert log.take() is None
    return log


def test_a_reader_that_is_too_slow_sees_a_gap() -> None:
    log = followed(limit_bytes=10)
    for _ in range(3):
        log.stored(NS, TOKENS)
    batch = log.take()
    assert batch is not None
    assert (batch.instance, batch.incarnation) == ("a", 3)
    assert batch.seq > 0
    assert batch.seq + len(batch.events) == log.next_seq == 3


def test_batches_follow_each_other_without_a_gap_otherwise() -> None:
    log = followed()
    log.stored(NS, TOKENS)
    log.removed(NS, [TOKENS, TOKENS + 2], 2)
    first = log.take()
    log.stored(NS, TOKENS)
    second = log.take()
    assert first is not None
    assert second is not None
    packed = pack_tokens(np.arange(4, dtype=np.int32))
    assert first.events == (Stored(NS, pack_tokens(TOKENS)), Removed(NS, packed, 2))
    assert (first.seq, second.seq) == (0, 2)
    assert log.take() is None


def test_a_reader_that_comes_late_sees_a_gap_once() -> None:
    log, called = EventLog(InstanceId("a"), 1), []
    log.stored(NS, TOKENS)
    log.removed(NS, [TOKENS], 0)
    log.follow(lambda: called.append(1))
    batch = log.take()
    assert batch is not None
    assert (batch.seq, batch.events, len(called)) == (2, (), 1)
    assert log.take() is None
    log.stored(NS, TOKENS)
    assert len(called) == 2


def test_a_snapshot_stands_for_what_was_before_it() -> None:
    log = EventLog(InstanceId("a"), 1)
    log.stored(NS, TOKENS)
    log.forget()
    assert log.take() is None
    log.stored(NS, TOKENS)
    batch = log.take()
    assert batch is not None
    assert batch.seq == 1


def test_a_move_says_what_lies_where() -> None:
    log = followed()
    log.moved(NS, TOKENS, 1, Tier.DISK)
    batch = log.take()
    assert batch is not None
    assert batch.events == (Moved(NS, pack_tokens(TOKENS), 1, "disk"),)
