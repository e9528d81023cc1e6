"""The bounded event log."""

from __future__ import annotations

from memserve.core.messages import Stored
from memserve.core.types import InstanceId, Namespace
from memserve.mempool.events import EventLog

NS = Namespace("m")


def test_a_reader_that_is_too_slow_sees_a_gap() -> None:
    log = EventLog(InstanceId("a"), 3, limit_bytes=10)
    expected = 0
    for _ in range(3):
        log.append(Stored(NS, bytes(8)))
    batch = log.take()
    assert batch is not None
    assert (batch.instance, batch.incarnation) == ("a", 3)
    assert batch.seq > expected
    assert batch.seq + len(batch.events) == log.next_seq == 3


def test_batches_follow_each_other_without_a_gap_otherwise() -> None:
    log = EventLog(InstanceId("a"), 1)
    log.append(Stored(NS, b"x"))
    log.append(Stored(NS, b"y"))
    first = log.take()
    log.append(Stored(NS, b"z"))
    second = log.take()
    assert first is not None
    assert second is not None
    assert (first.seq, len(first.events), second.seq) == (0, 2, 2)
    assert log.take() is None
