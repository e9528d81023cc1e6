"""Whole buffers over sockets: any cut of the stream, stalls, ends."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.wire.channel import Channel, Stalled, open_channel

SHORT = 0.02


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    left, right = (open_channel(end, SHORT) for end in socket.socketpair())
    yield left, right
    left.close()
    right.close()


@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=20),
    cut=st.lists(st.integers(1, 5000), max_size=20),
)
def test_buffers_arrive_whole_however_the_other_side_cuts_them(sizes: list[int], cut: list[int]) -> None:
    sender, receiver = (open_channel(end, 5.0) for end in socket.socketpair())
    content = bytes(at % 251 for at in range(sum(sizes)))
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    sender.send([memoryview(content)[a:b] for a, b in itertools.pairwise(starts)])
    left = sum(sizes)
    buffers = []
    for size in [*cut, left]:
        if left:
            buffers.append(bytearray(min(size, left)))
            left -= len(buffers[-1])
    if left:
        buffers.append(bytearray(left))
    receiver.receive([memoryview(buffer) for buffer in buffers])
    assert b"".join(buffers) == content
    sender.close()
    receiver.close()


def test_more_buffers_than_one_call_takes() -> None:
    sender, receiver = (open_channel(end, 5.0) for end in socket.socketpair())
    content = [bytes([at % 251]) * 300 for at in range(2000)]
    thread = threading.Thread(target=sender.send, args=([memoryview(part) for part in content],))
    thread.start()
    buffers = [bytearray(300) for _ in content]
    receiver.receive([memoryview(buffer) for buffer in buffers])
    thread.join()
    assert buffers == content
    sender.close()
    receiver.close()


def test_a_silent_sender_and_a_receiver_that_does_not_read_are_stalls(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    with pytest.raises(Stalled, match="nothing comes"):
        left.receive([memoryview(bytearray(1))])
    with pytest.raises(Stalled, match="does not read"):
        right.send([memoryview(bytes(64 << 20))])


def test_the_end_of_a_stream_and_a_shut_one(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    right.send([memoryview(b"half")])
    right.shut()
    right.shut()
    with pytest.raises(EOFError, match="closed"):
        left.receive([memoryview(bytearray(8))])
    with pytest.raises(OSError):
        right.send([memoryview(b"more")])
