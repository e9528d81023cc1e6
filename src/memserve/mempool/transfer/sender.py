"""The sending side: one connection to a peer, the backend that moves blocks there, and the transfers.

Order of a transfer: reserve on the peer -> move the bytes -> publish there. Whatever goes wrong in between,
the peer is told to forget it, but not before the backend has really stopped: from then on the blocks may
belong to somebody else.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memserve.core.clock import Clock
from memserve.core.errors import MemServeError, PeerLost, ProtocolError, TransferAborted
from memserve.core.messages import AbortTransfer, Copied, Hello, Message, Ok, Publish, Reserve, Reserved
from memserve.core.types import InstanceId, Namespace, Tokens, pack_tokens
from memserve.mempool.address import Addresses, Origin
from memserve.mempool.results import Transferred
from memserve.mempool.transfer.backends import TransferBackend, Transmission
from memserve.mempool.transfer.plan import plan_steps
from memserve.mempool.transfer.window import Window
from memserve.wire import Connection


@dataclass(frozen=True, slots=True)
class SendOrder:
    """What to send: blocks ``src`` of ``arena`` for ``tokens`` (empty: a plain transfer)."""

    tokens: Tokens
    src: Addresses
    namespace: Namespace
    origin: Origin
    attachment: bytes


@dataclass(frozen=True, slots=True)
class SendLimits:
    """How long a peer keeps blocks without progress and may take to answer, and bytes on their way to it."""

    reserve_seconds: float
    call_seconds: float
    link_bytes: int


@dataclass(frozen=True, slots=True)
class LinkState:
    """How blocks go to ``peer``, how many transfers and bytes have gone, and bytes on their way now."""

    peer: InstanceId
    backend: str
    sent: int
    sent_bytes: int
    under_way_bytes: int


@dataclass(slots=True)
class _Job:
    """A transfer under way. ``copying`` is the worker's part, once it has begun."""

    transfer: str
    deadline: float
    stopped: bool = False
    copying: asyncio.Future[NDArray[np.uint64]] | None = None

    @property
    def writing(self) -> bool:
        return self.copying is not None and not self.copying.done()


class OutboundLink:
    """A connection to a peer's pool. Single-threaded but for the copying itself."""

    def __init__(
        self, block_bytes: int, clock: Clock, limits: SendLimits, observe: Callable[[str], None]
    ) -> None:
        self._block_bytes = block_bytes
        self._clock = clock
        self._limits = limits
        self._observe = observe
        self._window = Window(limits.link_bytes)
        self._jobs: dict[str, _Job] = {}
        self._sent = 0
        self._sent_bytes = 0
        self._connection: Connection | None = None
        self._peer: Hello | None = None
        self._backend: TransferBackend | None = None

    def open(self, connection: Connection, peer: Hello, backend: TransferBackend) -> None:
        """The handshake is done: ``backend`` leads to the peer's memory."""
        self._connection = connection
        self._peer = peer
        self._backend = backend
        if connection.closed:
            self.on_close(connection, "lost during the handshake")

    @property
    def closed(self) -> bool:
        return self._connection is None or self._connection.closed

    @property
    def state(self) -> LinkState | None:
        """None once the link is gone."""
        if self._peer is None or self._backend is None:
            return None
        return LinkState(
            self._peer.instance, self._backend.name, self._sent, self._sent_bytes, self._window.used
        )

    async def send(self, transfer: str, order: SendOrder) -> Transferred:
        """Reserve, move, publish; all or nothing. Raises what ``MemPool.transfer_with_insert`` names."""
        async with self._window.room(len(order.src) * self._block_bytes):
            done = await self._send(transfer, order)
        self._sent += 1
        self._sent_bytes += done.bytes
        return done

    async def _send(self, transfer: str, order: SendOrder) -> Transferred:
        assert self._peer is not None, "sent before the handshake"
        job = self._jobs[transfer] = _Job(transfer, self._clock.now() + self._limits.reserve_seconds)
        reason = "the sender gave up"
        try:
            dst, answer = await self._reserve(transfer, order)
            held = answer.held
            self._observe("reserved")
            checksums = await self._transmit(job, order.src[held:], dst, answer)
            self._observe("copied")
            await self._call(
                Publish(transfer, checksums.astype("<u8").tobytes(), int(order.origin), order.attachment)
            )
            self._observe("published")
            reason = ""
            return Transferred(held, len(dst), len(dst) * self._block_bytes)
        except MemServeError as error:
            reason = str(error)
            raise
        finally:
            job.stopped = True
            if reason:
                self._abort(job, reason)
            else:
                self._jobs.pop(transfer)

    def close(self, reason: str) -> None:
        """Stop all transfers, then end the connection: to the peer this means that nobody writes any more."""
        writing = [job.copying for job in self._jobs.values() if job.copying is not None and job.writing]
        for job in self._jobs.values():
            job.stopped = True
        if self._backend is not None:
            self._backend.interrupt()
        if writing:
            writing[0].add_done_callback(lambda _: self.close(reason))
        elif self._connection is not None:
            self._connection.close(reason)

    # --- what the peer says ---

    def on_notify(self, connection: Connection, message: Any) -> None:
        self.close(f"unexpected {type(message).__name__}")

    async def on_call(self, connection: Connection, message: Any) -> Message:
        """The peer has run out of patience with a transfer: answer once nothing is written any more."""
        if not isinstance(message, AbortTransfer):
            raise ProtocolError(f"a sender does not answer {type(message).__name__}")
        job = self._jobs.get(message.transfer)
        if job is not None:
            job.stopped = True
            if job.copying is not None:
                await asyncio.wait([job.copying])
                if (lost := _lost_while_copying(job)) is not None:
                    raise lost
        return Ok()

    def on_close(self, connection: Connection, reason: str) -> None:
        for job in self._jobs.values():
            job.stopped = True
        if self._backend is not None:
            # A copy under way holds on to the mapping by itself; nobody else may keep a dead peer's memory.
            self._backend.close()
            self._backend = None

    # --- the steps ---

    async def _reserve(self, transfer: str, order: SendOrder) -> tuple[Addresses, Reserved]:
        """Where to copy to, and the peer's answer."""
        peer, backend = self._require_open()
        blocks = len(order.src)
        asked = Reserve(
            transfer,
            order.namespace,
            pack_tokens(order.tokens),
            blocks,
            self._limits.reserve_seconds,
            backend.name,
        )
        answer = await self._call(asked)
        if not isinstance(answer, Reserved):
            raise ProtocolError(f"{peer.instance} answered {type(answer).__name__} to Reserve")
        dst = Addresses.from_bytes(peer.instance, peer.incarnation, answer.dst)
        if answer.held + len(dst) != blocks:
            raise ProtocolError(f"{answer.held} + {len(dst)} blocks were reserved instead of {blocks}")
        return dst, answer

    async def _transmit(
        self, job: _Job, src: Addresses, dst: Addresses, reserved: Reserved
    ) -> NDArray[np.uint64]:
        _, backend = self._require_open()
        loop = asyncio.get_running_loop()

        def written(first: int, blocks: int) -> None:
            loop.call_soon_threadsafe(self._tell_written, job, first, blocks)

        order = Transmission(
            reserved.ticket,
            plan_steps(src, dst, self._block_bytes),
            functools.partial(self._may_go_on, job),
            written,
            reserved.memory,
        )
        job.copying = loop.run_in_executor(backend.workers, backend.transmit, order)
        try:
            # Shielded: a cancelled future would say "done" while the thread still writes.
            return await asyncio.shield(job.copying)
        except TransferAborted as error:
            if self.closed:
                raise PeerLost(f"{dst.instance} was lost during a copy") from error
            raise
        except PeerLost as error:
            # The way to the peer is cut, so this link is of no use any more; the next one starts afresh.
            self.close(str(error))
            raise

    def _may_go_on(self, job: _Job) -> bool:
        # Called in the worker thread, before each step of the copy. To come so far is progress.
        self._observe("copying")
        now = self._clock.now()
        if job.stopped or now >= job.deadline:
            return False
        job.deadline = now + self._limits.reserve_seconds
        return True

    def _tell_written(self, job: _Job, first: int, blocks: int) -> None:
        if not job.stopped and self._connection is not None and not self._connection.closed:
            self._connection.notify(Copied(job.transfer, first, blocks))

    def _abort(self, job: _Job, reason: str) -> None:
        """Tell the peer that nothing is written any more, as soon as that is true."""
        if job.copying is not None and job.writing:
            job.copying.add_done_callback(lambda _: self._abort(job, reason))
            return
        self._jobs.pop(job.transfer, None)
        if (lost := _lost_while_copying(job)) is not None:
            # Not even that is known of what was under way; the end of the connection says so.
            self.close(str(lost))
        if self._connection is not None and not self._connection.closed:
            self._connection.notify(AbortTransfer(job.transfer, reason))

    def _require_open(self) -> tuple[Hello, TransferBackend]:
        if self._peer is None or self._backend is None:
            raise PeerLost("the link to the peer was lost")
        return self._peer, self._backend

    async def _call(self, message: Message) -> Any:
        if self._connection is None:
            raise PeerLost("the connection was never opened")
        return await self._connection.call(message, self._limits.call_seconds)


def _lost_while_copying(job: _Job) -> PeerLost | None:
    """How the way to the peer was cut, once the copying has ended. Counts as looking at its failure."""
    if job.copying is None or job.copying.cancelled():
        return None
    error = job.copying.exception()
    return error if isinstance(error, PeerLost) else None
