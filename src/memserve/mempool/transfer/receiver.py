"""The receiving side: answers peers' handshakes, reservations and publications.

Order of a transfer: reserve (allocate) -> the sender copies -> publish (verify, then insert). What a sender
had reserved is freed when it aborts, when its connection ends, or after the deadline, once it says that it
has stopped writing.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import numpy as np

from memserve._native import checksum_blocks
from memserve.core.clock import Clock
from memserve.core.errors import (
    CorruptBlock,
    InvalidRequest,
    LayoutMismatch,
    MemServeError,
    PeerLost,
    ProtocolError,
    StaleAddress,
)
from memserve.core.messages import AbortTransfer, Hello, Message, Publish, Published, Reserve, Reserved
from memserve.core.types import InstanceId, unpack_tokens
from memserve.mempool.address import Addresses, Origin
from memserve.mempool.pool import MemPool
from memserve.mempool.reservations import Completed, Reservation
from memserve.mempool.stats import AbortCause
from memserve.wire import Connection

log = logging.getLogger(__name__)

Adopt = Callable[[bytes, Addresses], None]
"""Takes over references to the blocks that came with an attachment; raises ``MemServeError`` to refuse."""

_LONGEST_RESERVATION = 600.0
_ANSWER_SECONDS = 5.0
_SHORTEST_WAIT = 0.001


def require_same_layout(own: Hello, other: Hello) -> None:
    """Raise ``LayoutMismatch``, naming both layouts, unless their blocks are the same."""
    if own.layout_fingerprint != other.layout_fingerprint:
        raise LayoutMismatch(
            f"{own.instance} has [{own.layout_text}] and {other.instance} has [{other.layout_text}]; "
            "start both with the same model and block layout"
        )


class Receiver:
    """Serves peers that send to ``pool``; ``adopt`` takes over what comes with an attachment."""

    def __init__(self, pool: MemPool, clock: Clock, workers: Executor, adopt: Adopt) -> None:
        self.hello: Hello | None = None
        """What this side says in handshakes, once it listens."""
        self._pool = pool
        self._clock = clock
        self._workers = workers
        self._adopt = adopt
        self._publishing: dict[str, asyncio.Task[Completed]] = {}
        self._incarnations: dict[InstanceId, int] = {}
        self._links: set[InboundLink] = set()
        self._ending: set[asyncio.Task[None]] = set()

    def accept(self) -> InboundLink:
        """A handler for one more connection."""
        link = InboundLink(self)
        self._links.add(link)
        return link

    def drop_peer(self, instance: InstanceId, reason: str) -> None:
        """``instance`` is gone for good in the lives known so far: free what it had reserved."""
        for link in [x for x in self._links if x.peer is not None and x.peer.instance == instance]:
            link.close(reason)
        self._pool.drop_peer(instance, reason)

    async def close(self) -> None:
        """End all connections; what was reserved through them is freed."""
        for link in list(self._links):
            link.close("the pool is closing")
        tasks = [*self._ending, *self._publishing.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- what links ask for ---

    def greet(self, link: InboundLink, hello: Hello) -> Hello:
        """Admit a peer. Raises ``LayoutMismatch``, or ``StaleAddress`` for an earlier life of a known one."""
        assert self.hello is not None, "connections come only after the start"
        require_same_layout(self.hello, hello)
        known = self._incarnations.get(hello.instance, hello.incarnation)
        if hello.incarnation < known:
            raise StaleAddress(
                f"{hello.instance} incarnation {hello.incarnation} was replaced by incarnation {known}"
            )
        if hello.incarnation > known:
            self.drop_peer(hello.instance, f"{hello.instance} was restarted")
        self._incarnations[hello.instance] = hello.incarnation
        link.peer = hello
        return self.hello

    def reserve(self, link: InboundLink, peer: Hello, asked: Reserve) -> Reserved:
        """Hold and allocate what a transfer needs. Raises ``OutOfBlocks``."""
        if asked.blocks < 1 or not 0 < asked.seconds <= _LONGEST_RESERVATION:
            raise InvalidRequest(
                f"{asked.blocks} blocks for {asked.seconds} s; at least 1 block and at most "
                f"{_LONGEST_RESERVATION} s are possible",
                field="blocks",
            )
        reservation = self._pool.begin_incoming(
            asked.transfer,
            peer.instance,
            asked.namespace,
            unpack_tokens(asked.tokens),
            asked.blocks,
            asked.seconds,
        )
        if asked.transfer not in link.timers:
            self._watch(link, asked.transfer, asked.seconds)
        return Reserved(asked.transfer, len(reservation.held), reservation.fresh.to_bytes())

    async def publish(self, link: InboundLink, asked: Publish) -> Published:
        """Verify and publish. The same message again, even meanwhile, gets the same answer."""
        task = self._publishing.get(asked.transfer)
        if task is None:
            found = self._pool.find_incoming(asked.transfer)
            if isinstance(found, Completed):
                return Published(asked.transfer, found.inserted)
            task = asyncio.get_running_loop().create_task(self._verify_and_complete(found, asked))
            self._publishing[asked.transfer] = task
            task.add_done_callback(functools.partial(self._finish, asked.transfer))
        done = await asyncio.shield(task)
        link.stop_timer(asked.transfer)
        return Published(asked.transfer, done.inserted)

    def abort(self, link: InboundLink, transfer: str, cause: AbortCause, reason: str) -> None:
        """The sender has stopped writing for this transfer: free what it had reserved."""
        link.stop_timer(transfer)
        self._pool.abort_incoming(transfer, cause, reason)

    def forget(self, link: InboundLink, reason: str) -> None:
        """A connection has ended, and with it its sender's writing."""
        self._links.discard(link)
        for transfer in list(link.timers):
            self.abort(link, transfer, AbortCause.SENDER_LOST, reason)

    # --- inside ---

    def _finish(self, transfer: str, task: asyncio.Task[Completed]) -> None:
        del self._publishing[transfer]
        if not task.cancelled():
            # Retrieved here as well, in case that the sender, who would be told, is gone.
            task.exception()

    async def _verify_and_complete(self, reservation: Reservation, asked: Publish) -> Completed:
        try:
            await self._verify(reservation, asked)
            adopt = functools.partial(self._adopt, asked.attachment) if asked.attachment else None
            return self._pool.complete_incoming(asked.transfer, Origin(asked.origin), adopt)
        except MemServeError as error:
            cause = AbortCause.CORRUPT if isinstance(error, CorruptBlock) else AbortCause.REFUSED
            self._pool.abort_incoming(asked.transfer, cause, str(error))
            raise

    async def _verify(self, reservation: Reservation, asked: Publish) -> None:
        """Raise ``CorruptBlock`` unless each reserved block holds the bytes that the sender read."""
        told = np.frombuffer(asked.checksums, "<u8")
        pointers = self._pool.pointers(reservation.fresh)
        found = await asyncio.get_running_loop().run_in_executor(
            self._workers, checksum_blocks, pointers, self._pool.layout.block_bytes
        )
        if len(told) != len(found):
            raise CorruptBlock(f"transfer {asked.transfer}: {len(told)} checksums for {len(found)} blocks")
        wrong = int(np.count_nonzero(found != told))
        if wrong:
            raise CorruptBlock(
                f"transfer {asked.transfer}: {wrong} of {len(found)} blocks arrived with wrong bytes; "
                "all of them were thrown away"
            )

    def _watch(self, link: InboundLink, transfer: str, seconds: float) -> None:
        """Look at a transfer again after ``seconds``, or never if its link has let go of it by then."""
        loop = asyncio.get_running_loop()
        link.timers[transfer] = loop.call_later(max(seconds, _SHORTEST_WAIT), self._look, link, transfer)

    def _look(self, link: InboundLink, transfer: str) -> None:
        deadline, now = self._pool.incoming_deadline(transfer), self._clock.now()
        if deadline is None:
            link.stop_timer(transfer)
        elif deadline > now:
            self._watch(link, transfer, deadline - now)
        else:
            self._pool.expire()
            task = asyncio.get_running_loop().create_task(self._end_overdue(link, transfer))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def _end_overdue(self, link: InboundLink, transfer: str) -> None:
        """Have the sender of a revoked transfer stop, then free its blocks."""
        reason = "it made no progress before its deadline"
        log.warning("transfer %s: %s", transfer, reason)
        try:
            await link.ask(AbortTransfer(transfer, reason))
        except PeerLost as error:
            # A frozen sender could wake up in the middle of a copy. Its blocks go to nobody else before
            # its connection ends; ``forget`` frees them then.
            log.warning("transfer %s: its sender does not say that it has stopped: %s", transfer, error)
            return
        self.abort(link, transfer, AbortCause.EXPIRED, reason)


class InboundLink:
    """One peer's connection to a :class:`Receiver`."""

    def __init__(self, receiver: Receiver) -> None:
        self.peer: Hello | None = None
        self.timers: dict[str, asyncio.TimerHandle] = {}
        """One per transfer that was reserved through this connection and has not ended."""
        self._receiver = receiver
        self._connection: Connection | None = None

    def on_notify(self, connection: Connection, message: Any) -> None:
        if isinstance(message, AbortTransfer):
            self._receiver.abort(self, message.transfer, AbortCause.SENDER_ABORTED, message.reason)

    async def on_call(self, connection: Connection, message: Any) -> Message:
        self._connection = connection
        if isinstance(message, Hello):
            connection.label = message.instance
            return self._receiver.greet(self, message)
        if self.peer is None:
            raise ProtocolError(f"{type(message).__name__} before Hello")
        if isinstance(message, Reserve):
            return self._receiver.reserve(self, self.peer, message)
        if isinstance(message, Publish):
            return await self._receiver.publish(self, message)
        raise ProtocolError(f"a pool does not answer {type(message).__name__}")

    def on_close(self, connection: Connection, reason: str) -> None:
        self._receiver.forget(self, reason)

    def stop_timer(self, transfer: str) -> None:
        timer = self.timers.pop(transfer, None)
        if timer is not None:
            timer.cancel()

    async def ask(self, message: Message) -> Message:
        """Call the peer. Raises ``PeerLost`` when it does not answer soon."""
        assert self._connection is not None, "asked before the peer said anything"
        answer: Message = await self._connection.call(message, _ANSWER_SECONDS)
        return answer

    def close(self, reason: str) -> None:
        if self._connection is not None:
            self._connection.close(reason)
