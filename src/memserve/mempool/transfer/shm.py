"""The shared-memory backend: hands out the arena's descriptors, maps a peer's, copies unit by unit.

Descriptors travel over an abstract Unix socket to processes of the same user; nothing has a name in the
file system. A copy is one pass of native code without the GIL, which also computes the checksums.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Executor

import msgspec
import numpy as np

from memserve._native import copy_blocks
from memserve.core.errors import PeerLost, StaleAddress, TransferAborted
from memserve.core.messages import Hello
from memserve.mempool.address import BlockNumbers
from memserve.mempool.arena import MOST_SEGMENTS, Arena, Extent
from memserve.mempool.transfer.backends import SHM, Moved, Transmission
from memserve.mempool.transfer.plan import Step
from memserve.wire.connection import same_user
from memserve.wire.sockets import open_socket

log = logging.getLogger(__name__)

_MOST_BYTES = 1 << 14
"""More than the description of ``MOST_SEGMENTS`` segments takes."""
_ANNOUNCE_BYTES = 1 << 20
"""Of steps that may all go, so much is announced at once: each announcement wakes a thread over there."""


class _Segments(msgspec.Struct, frozen=True, array_like=True):
    """What comes with the descriptors, which are in the same order."""

    incarnation: int
    extents: tuple[tuple[int, int], ...]


class DescriptorServer:
    """Gives the arena's descriptors to whoever of the same user connects to ``address`` (``@name``)."""

    def __init__(self, address: str, arena: Arena, incarnation: int) -> None:
        self.address = address
        self._arena = arena
        self._incarnation = incarnation
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._socket.bind("\0" + address.removeprefix("@"))
        self._socket.listen()
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._serve)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()

    def _serve(self) -> None:
        with contextlib.suppress(BlockingIOError):
            asked, _ = self._socket.accept()
            with asked:
                self._send(asked)

    def _send(self, asked: socket.socket) -> None:
        if not same_user(asked):
            log.warning("refused the arena to a process of another user")
            return
        with contextlib.suppress(OSError):
            described = _Segments(self._incarnation, self._arena.extents)
            socket.send_fds(asked, [msgspec.msgpack.encode(described)], self._arena.fds)


def receive_arena(hello: Hello, known: Arena, timeout: float) -> Arena:
    """Map what ``known`` lacks of the arena of the peer that said ``hello``.

    Blocks for at most about ``timeout`` seconds. Raises ``PeerLost``, ``StaleAddress`` when another life of
    the peer answers, ``LayoutMismatch``.
    """
    try:
        with open_socket(hello.fd_address, timeout) as asked:
            raw, fds, _, _ = socket.recv_fds(asked, _MOST_BYTES, MOST_SEGMENTS)
    except OSError as error:
        raise PeerLost(f"{hello.instance} does not hand out its arena: {error}") from error
    with _closing(fds):
        try:
            described = msgspec.msgpack.decode(raw, type=_Segments)
        except msgspec.DecodeError as error:
            raise PeerLost(f"{hello.instance} does not hand out its arena: {error}") from error
        if len(fds) != len(described.extents):
            raise PeerLost(f"{hello.instance} handed out {len(fds)} of {len(described.extents)} segments")
        if described.incarnation != hello.incarnation:
            raise StaleAddress(f"{hello.instance} was restarted during the handshake; connect again")
        return known.extended(fds, [Extent(*extent) for extent in described.extents])


class SharedMemoryBackend:
    """Copies into ``peer``, the mapped arena of a peer, in threads of ``workers``.

    ``extend`` maps the segments that the peer has added since.
    """

    name = SHM

    def __init__(self, own: Arena, peer: Arena, workers: Executor, extend: Callable[[Arena], Arena]) -> None:
        self.workers = workers
        self._own = own
        self._peer = peer
        self._extend = extend

    def transmit(self, order: Transmission) -> Moved:
        checksums = [np.empty(0, np.uint64)]
        first, told, calls, size = order.first, order.first, 0, order.unit_bytes
        for at, step in enumerate(order.steps):
            if not order.may_go_on():
                raise TransferAborted("the copy was stopped half-way; nothing was published")
            # Held on to during the copy: another thread's may take its place meanwhile, mapped elsewhere.
            peer = self._map(step.dst)
            targets = peer.map.unit_pointers(step.dst, step.parts, size)
            sources = self._own.map.unit_pointers(step.src, step.parts, size)
            checksums.append(copy_blocks(targets, sources, size))
            first += len(step.src)
            ends = at + 1 == len(order.steps)
            if not order.last if ends else (first - told) * size >= _ANNOUNCE_BYTES:
                order.written(told, first - told)
                told = first
            calls += len(step.src) - self._joined(step, peer, size)
        return Moved(np.concatenate(checksums), calls)

    def _joined(self, step: Step, peer: Arena, size: int) -> int:
        """How many units continue the one before them on both sides."""
        there = peer.map.touching(step.dst, step.parts, size)
        return int(np.count_nonzero(there & self._own.map.touching(step.src, step.parts, size)))

    def interrupt(self) -> None:
        """Steps are short: a copy ends by itself when ``may_go_on`` says no."""

    def close(self) -> None:
        """The mapping goes with the last user of it; the threads are the endpoint's."""

    def _map(self, numbers: BlockNumbers) -> Arena:
        peer = self._peer
        if not peer.covers(numbers):
            peer = self._peer = self._extend(peer)
        if not peer.covers(numbers):
            raise PeerLost(f"blocks {numbers[:8].tolist()} lie outside of what the peer handed out")
        return peer


@contextlib.contextmanager
def _closing(fds: list[int]) -> Iterator[None]:
    try:
        yield
    finally:
        for fd in fds:
            os.close(fd)
