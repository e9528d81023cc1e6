"""The receiving side: answers peers' handshakes, reservations and publications.

Order of a transfer: reserve (allocate) -> bytes arrive and are verified -> publish (compare, then insert).
What a sender had reserved is freed when it aborts, when its connection ends, or after the deadline, but not
before whoever writes has stopped: the sender itself into shared memory, a thread here for a stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from memserve.core.clock import Clock
from memserve.core.errors import (
    CorruptBlock,
    InvalidRequest,
    LayoutMismatch,
    MemServeError,
    PeerLost,
    ProtocolError,
    StaleAddress,
    TransferAborted,
)
from memserve.core.messages import (
    AbortTransfer,
    Allocate,
    Allocated,
    Copied,
    GiveBack,
    GivenBack,
    Hello,
    Message,
    Publish,
    Published,
    Reserve,
    Reserved,
)
from memserve.core.types import InstanceId, unpack_tokens
from memserve.mempool.address import Addresses, Origin, Tier, numbers_of
from memserve.mempool.layout import KVLayout
from memserve.mempool.modes import Cut, TransferMode, cut_blocks
from memserve.mempool.pool import MemPool
from memserve.mempool.reservations import Completed, Reservation
from memserve.mempool.stats import AbortCause
from memserve.mempool.transfer.arrivals import (
    Arrival,
    Checksums,
    RemoteArrival,
    SharedArrival,
    StreamedArrival,
)
from memserve.mempool.transfer.backends import NIXL, TCP
from memserve.mempool.transfer.nixl import NixlTarget
from memserve.mempool.transfer.nixl_agent import Agent
from memserve.mempool.transfer.plan import spread_units
from memserve.mempool.transfer.streams import StreamListener
from memserve.wire import Connection
from memserve.wire.channel import Channel

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
            "start both with the same model, kv_cache_dtype and block layout"
        )


@dataclass(frozen=True, slots=True)
class _Incoming:
    """A transfer that stands: its arrival, and the link through which it was reserved."""

    arrival: Arrival
    ticket: int
    link: InboundLink
    memory: bytes = b""
    """How the sender can write to it by nixl."""


class Receiver:
    """Serves peers that send to ``pool``; ``adopt`` takes over what comes with an attachment."""

    def __init__(self, pool: MemPool, clock: Clock, workers: Executor, adopt: Adopt) -> None:
        self.hello: Hello | None = None
        """What this side says in handshakes, once it listens."""
        self.streams: StreamListener | None = None
        """Where streams of blocks arrive, if they may."""
        self.nixl: NixlTarget | None = None
        """Through what networks write blocks, if they may."""
        self._pool = pool
        self._clock = clock
        self._workers = workers
        self._adopt = adopt
        self._incoming: dict[str, _Incoming] = {}
        self._tickets = itertools.count(1)
        self._publishing: dict[str, asyncio.Task[Completed]] = {}
        self._incarnations: dict[InstanceId, int] = {}
        self._links: set[InboundLink] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._loan_timer: asyncio.TimerHandle | None = None

    def accept(self) -> InboundLink:
        """A handler for one more connection."""
        link = InboundLink(self)
        self._links.add(link)
        return link

    def drop_peer(self, instance: InstanceId, reason: str) -> None:
        """``instance`` is gone for good in the lives known so far: free what it had reserved or borrowed."""
        for link in [x for x in self._links if x.peer is not None and x.peer.instance == instance]:
            link.close(reason)
        self._pool.end_loans(instance)

    async def close(self) -> None:
        """End all connections; what was reserved through them, or lent, is freed."""
        for link in list(self._links):
            link.close("the pool is closing")
        for instance in self._incarnations:
            self._pool.end_loans(instance)
        if self._loan_timer is not None:
            self._loan_timer.cancel()
        tasks = [*self._ending, *self._publishing.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.streams is not None:
            await self.streams.close()
        if self.nixl is not None:
            await self.nixl.close()

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
        answer = self.hello
        if self.streams is not None:
            link.stream_name = self.streams.expect(link)
            answer = msgspec.structs.replace(answer, stream=link.stream_name)
        self._end_earlier_links(link, hello)
        return answer

    async def reserve(self, link: InboundLink, peer: Hello, asked: Reserve) -> Reserved:
        """Hold and allocate what a transfer needs. Raises ``OutOfBlocks``."""
        assert self.hello is not None, "connections come only after the start"
        if asked.backend not in self.hello.backends:
            raise InvalidRequest(f"blocks cannot come by {asked.backend} here", field="backend")
        if asked.blocks < 1 or not 0 < asked.seconds <= _LONGEST_RESERVATION:
            raise InvalidRequest(
                f"{asked.blocks} blocks for {asked.seconds} s; at least 1 block and at most "
                f"{_LONGEST_RESERVATION} s are possible",
                field="blocks",
            )
        cut = _cut_of(self._pool.layout, asked.mode)
        agent = None if self.nixl is None or asked.backend != NIXL else await self.nixl.current()
        reservation = self._pool.begin_incoming(
            asked.transfer,
            peer.instance,
            asked.namespace,
            unpack_tokens(asked.tokens),
            asked.blocks,
            asked.seconds,
            self._own(asked.dst) if asked.dst else None,
        )
        incoming = self._incoming.get(asked.transfer)
        if incoming is None:
            incoming = self._expect(link, asked.backend, agent, cut, reservation)
            self._incoming[asked.transfer] = incoming
            self._watch(link, asked.transfer, asked.seconds)
        dst = reservation.fresh.to_bytes()
        return Reserved(asked.transfer, len(reservation.held), dst, incoming.ticket, incoming.memory)

    def lend(self, peer: Hello, asked: Allocate) -> Allocated:
        """Allocate blocks for a peer. Raises ``OutOfBlocks``, ``InvalidRequest``, ``ConfigError``."""
        if asked.blocks < 1 or asked.tier not in list(Tier) or not 0 < asked.seconds <= _LONGEST_RESERVATION:
            raise InvalidRequest(
                f"{asked.blocks} blocks of tier {asked.tier} for {asked.seconds} s; at least 1 block of a "
                f"memory tier and at most {_LONGEST_RESERVATION} s are possible",
                field="blocks",
            )
        lent = self._pool.lend(asked.loan, peer.instance, asked.blocks, Tier(asked.tier), asked.seconds)
        self._watch_loans()
        return Allocated(asked.loan, lent.to_bytes())

    def take_back(self, peer: Hello, asked: GiveBack) -> GivenBack:
        """Free what was lent to a peer. Raises ``InvalidRequest`` while a transfer writes there."""
        freed = self._pool.take_back(peer.instance, self._own(asked.addrs))
        return GivenBack(freed.freed, freed.stale)

    def written(self, asked: Copied) -> None:
        """A sender has written some blocks into shared memory. What is too late is of no interest."""
        incoming = self._incoming.get(asked.transfer)
        if incoming is not None and isinstance(incoming.arrival, SharedArrival):
            incoming.arrival.written(asked.first, asked.units)
            self._renew(asked.transfer)

    async def publish(self, link: InboundLink, asked: Publish) -> Published:
        """Verify and publish. The same message again, even meanwhile, gets the same answer."""
        task = self._publishing.get(asked.transfer)
        if task is None:
            found = self._pool.find_incoming(asked.transfer)
            if isinstance(found, Completed):
                return Published(asked.transfer, found.inserted)
            incoming = self._incoming[asked.transfer]
            task = asyncio.get_running_loop().create_task(self._verify_and_complete(incoming, asked))
            self._publishing[asked.transfer] = task
            task.add_done_callback(functools.partial(self._finish, asked.transfer))
        done = await asyncio.shield(task)
        link.stop_timer(asked.transfer)
        return Published(asked.transfer, done.inserted)

    def abort(self, link: InboundLink, transfer: str, cause: AbortCause, reason: str) -> None:
        """The sender has stopped writing for this transfer: free what it had reserved."""
        link.stop_timer(transfer)
        self._end(transfer, cause, reason)

    def forget(self, link: InboundLink, reason: str) -> None:
        """A connection has ended, and with it its sender's writing."""
        self._links.discard(link)
        if self.streams is not None:
            self.streams.forget(link.stream_name)
        for transfer in list(link.timers):
            self.abort(link, transfer, AbortCause.SENDER_LOST, reason)

    # --- inside ---

    def _own(self, raw: bytes) -> Addresses:
        return Addresses.from_bytes(self._pool.instance, self._pool.incarnation, raw)

    def _watch_loans(self) -> None:
        """See to it that loans end in time, whether or not anybody else calls ``expire``."""
        deadline = self._pool.next_loan_deadline()
        if self._loan_timer is not None:
            self._loan_timer.cancel()
            self._loan_timer = None
        if deadline is not None:
            later = max(deadline - self._clock.now(), _SHORTEST_WAIT)
            self._loan_timer = asyncio.get_running_loop().call_later(later, self._end_loans)

    def _end_loans(self) -> None:
        self._pool.expire()
        self._watch_loans()

    def _finish(self, transfer: str, task: asyncio.Task[Completed]) -> None:
        del self._publishing[transfer]
        if not task.cancelled():
            # Retrieved here as well, in case that the sender, who would be told, is gone.
            task.exception()

    def _expect(
        self, link: InboundLink, backend: str, agent: Agent | None, cut: Cut, reservation: Reservation
    ) -> _Incoming:
        arena, size = self._pool.arena, cut.unit_bytes
        blocks, parts = spread_units(numbers_of(reservation.fresh.packed), cut)
        ticket = next(self._tickets)
        if backend == TCP:
            streamed = link.arrivals[ticket] = StreamedArrival(arena.units(blocks, parts, size))
            return _Incoming(streamed, ticket, link)
        pointers = arena.map.unit_pointers(blocks, parts, size)
        if self.nixl is not None and agent is not None:
            link.writes_by_nixl = True
            silence = functools.partial(self.nixl.call_when_silent, agent)
            remote = RemoteArrival(pointers, size, self._workers, silence)
            return _Incoming(remote, ticket, link, agent.offer())
        return _Incoming(SharedArrival(pointers, size, self._workers), ticket, link)

    async def _verify_and_complete(self, incoming: _Incoming, asked: Publish) -> Completed:
        try:
            _require_equal(asked, await incoming.arrival.checksums())
            adopt = functools.partial(self._adopt, asked.attachment) if asked.attachment else None
            done = self._pool.complete_incoming(asked.transfer, Origin(asked.origin), adopt)
        except MemServeError as error:
            cause = AbortCause.CORRUPT if isinstance(error, CorruptBlock) else AbortCause.REFUSED
            self._end(asked.transfer, cause, str(error))
            raise
        self._forget_incoming(asked.transfer)
        self._watch_loans()
        return done

    def _end(self, transfer: str, cause: AbortCause, reason: str) -> None:
        """Free what a transfer had reserved, once nobody here writes to it."""

        def release() -> None:
            self._forget_incoming(transfer)
            self._pool.abort_incoming(transfer, cause, reason)
            self._watch_loans()

        incoming = self._incoming.get(transfer)
        if incoming is None:
            release()
        else:
            error = PeerLost if cause is AbortCause.SENDER_LOST else TransferAborted
            incoming.arrival.stop(error(f"transfer {transfer} was ended: {reason}"), release)

    def _end_earlier_links(self, link: InboundLink, hello: Hello) -> None:
        """A peer connects again only after its last connection, whose end may not have been seen here yet.

        By nixl it must be: the agent that the peer is told of next would be replaced upon it.
        """
        for earlier in [x for x in self._links if x is not link and x.writes_by_nixl]:
            if earlier.peer is not None and earlier.peer.instance == hello.instance:
                earlier.close(f"{hello.instance} has connected again")

    def _forget_incoming(self, transfer: str) -> None:
        incoming = self._incoming.pop(transfer, None)
        if incoming is not None:
            incoming.link.arrivals.pop(incoming.ticket, None)

    def _renew(self, transfer: str) -> None:
        with contextlib.suppress(MemServeError):
            # What has ended or was revoked meanwhile is dealt with where that happened.
            self._pool.find_incoming(transfer)

    def _watch(self, link: InboundLink, transfer: str, seconds: float) -> None:
        """Look at a transfer again within ``seconds``, or never if its link has let go of it by then."""
        loop = asyncio.get_running_loop()
        # Early enough to see progress before the deadline that it moves.
        later = max(seconds / 2, _SHORTEST_WAIT)
        link.timers[transfer] = loop.call_later(later, self._look, link, transfer)

    def _look(self, link: InboundLink, transfer: str) -> None:
        incoming = self._incoming.get(transfer)
        if incoming is not None and incoming.arrival.take_progress():
            self._renew(transfer)
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
        incoming = self._incoming.get(transfer)
        if incoming is not None and not incoming.arrival.trusted:
            self.abort(link, transfer, AbortCause.EXPIRED, reason)
            if transfer in self._incoming:
                # It stands still in the middle of a chunk, and so does all that comes behind it.
                link.close(f"its stream of blocks stands still: {reason}")
                return
        try:
            await link.ask(AbortTransfer(transfer, reason))
        except PeerLost as error:
            # A frozen sender could wake up in the middle of a copy. Its blocks go to nobody else before
            # its connection ends; ``forget`` frees them then.
            log.warning("transfer %s: its sender does not say that it has stopped: %s", transfer, error)
            return
        self.abort(link, transfer, AbortCause.EXPIRED, reason)


def _cut_of(layout: KVLayout, mode: str) -> Cut:
    """Raises ``InvalidRequest`` for a mode that is unknown here or does not go with the layout."""
    if mode not in list(TransferMode):
        raise InvalidRequest(f"mode {mode!r} is unknown here", field="mode")
    return cut_blocks(layout, TransferMode(mode))


def _require_equal(asked: Publish, found: Checksums) -> None:
    """Raise ``CorruptBlock`` unless each block that arrived holds the bytes that the sender read."""
    told = np.frombuffer(asked.checksums, "<u8")
    if len(told) != len(found):
        raise CorruptBlock(f"transfer {asked.transfer}: {len(told)} checksums for {len(found)} units")
    wrong = int(np.count_nonzero(found != told))
    if wrong:
        raise CorruptBlock(
            f"transfer {asked.transfer}: {wrong} of {len(found)} units arrived with wrong bytes; "
            "all of them were thrown away"
        )


class InboundLink:
    """One peer's connection to a :class:`Receiver`."""

    def __init__(self, receiver: Receiver) -> None:
        self.peer: Hello | None = None
        self.timers: dict[str, asyncio.TimerHandle] = {}
        """One per transfer that was reserved through this connection and has not ended."""
        self.arrivals: dict[int, StreamedArrival] = {}
        """Where the blocks of each ticket go, for the stream's thread."""
        self.stream_name = b""
        self.writes_by_nixl = False
        self._receiver = receiver
        self._connection: Connection | None = None
        self._channel: Channel | None = None

    def on_notify(self, connection: Connection, message: Any) -> None:
        if isinstance(message, AbortTransfer):
            self._receiver.abort(self, message.transfer, AbortCause.SENDER_ABORTED, message.reason)
        elif isinstance(message, Copied):
            self._receiver.written(message)

    async def on_call(self, connection: Connection, message: Any) -> Message:
        self._connection = connection
        if isinstance(message, Hello):
            connection.label = message.instance
            return self._receiver.greet(self, message)
        if self.peer is None:
            raise ProtocolError(f"{type(message).__name__} before Hello")
        if isinstance(message, Reserve):
            return await self._receiver.reserve(self, self.peer, message)
        if isinstance(message, Publish):
            return await self._receiver.publish(self, message)
        if isinstance(message, Allocate):
            return self._receiver.lend(self.peer, message)
        if isinstance(message, GiveBack):
            return self._receiver.take_back(self.peer, message)
        raise ProtocolError(f"a pool does not answer {type(message).__name__}")

    def on_close(self, connection: Connection, reason: str) -> None:
        if self._channel is not None:
            self._channel.shut()
        self._receiver.forget(self, reason)

    def find_arrival(self, ticket: int) -> StreamedArrival | None:
        return self.arrivals.get(ticket)

    def stream_opened(self, channel: Channel) -> None:
        self._channel = channel
        if self._connection is None or self._connection.closed:
            channel.shut()

    def stream_ended(self, reason: str) -> None:
        # What is missing of its transfers will not come any more.
        self.close(f"the stream of blocks ended: {reason}")

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
