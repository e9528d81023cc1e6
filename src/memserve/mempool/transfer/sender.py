"""The sending side: one connection to a peer whose arena is mapped here, and the transfers that go over it.

Order of a transfer: reserve on the peer -> copy into its memory -> publish there. Whatever goes wrong in
between, the peer is told to forget it, but not before the copy has really stopped: from then on the
blocks may belong to somebody else.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memserve.core.clock import Clock
from memserve.core.errors import MemServeError, PeerLost, ProtocolError, TransferAborted
from memserve.core.messages import AbortTransfer, Hello, Message, Ok, Publish, Reserve, Reserved
from memserve.core.types import Namespace, Tokens, pack_tokens
from memserve.mempool.address import Addresses, Origin
from memserve.mempool.arena import Arena
from memserve.mempool.results import Transferred
from memserve.mempool.transfer.plan import plan_steps
from memserve.mempool.transfer.shm import SharedMemoryCopy
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
    """Seconds: how long a peer keeps blocks without progress, and how long it may take to answer."""

    reserve_seconds: float
    call_seconds: float


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
        self,
        own: Arena,
        clock: Clock,
        workers: Executor,
        limits: SendLimits,
        observe: Callable[[str], None],
    ) -> None:
        self._own = own
        self._clock = clock
        self._workers = workers
        self._limits = limits
        self._observe = observe
        self._jobs: dict[str, _Job] = {}
        self._connection: Connection | None = None
        self._peer: Hello | None = None
        self._arena: Arena | None = None

    def open(self, connection: Connection, peer: Hello, arena: Arena) -> None:
        """The handshake is done: ``arena`` is the peer's memory, mapped here."""
        self._connection = connection
        self._peer = peer
        self._arena = arena

    @property
    def closed(self) -> bool:
        return self._connection is None or self._connection.closed

    async def send(self, transfer: str, order: SendOrder) -> Transferred:
        """Reserve, copy, publish; all or nothing. Raises what ``MemPool.transfer_with_insert`` names."""
        assert self._peer is not None, "sent before the handshake"
        job = self._jobs[transfer] = _Job(transfer, self._clock.now() + self._limits.reserve_seconds)
        reason = "the sender gave up"
        try:
            dst, held = await self._reserve(transfer, order)
            self._observe("reserved")
            checksums = await self._copy(job, order.src[held:], dst)
            self._observe("copied")
            await self._call(
                Publish(transfer, checksums.astype("<u8").tobytes(), int(order.origin), order.attachment)
            )
            self._observe("published")
            reason = ""
            return Transferred(held, len(dst), len(dst) * self._own.block_bytes)
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
        return Ok()

    def on_close(self, connection: Connection, reason: str) -> None:
        for job in self._jobs.values():
            job.stopped = True
        # A copy under way holds on to the mapping by itself; nobody else may keep a dead peer's memory.
        self._arena = None

    # --- the steps ---

    async def _reserve(self, transfer: str, order: SendOrder) -> tuple[Addresses, int]:
        """Where to copy to, and how many blocks of the path the peer holds already."""
        assert self._peer is not None, "sent before the handshake"
        blocks = len(order.src)
        asked = Reserve(
            transfer, order.namespace, pack_tokens(order.tokens), blocks, self._limits.reserve_seconds
        )
        answer = await self._call(asked)
        if not isinstance(answer, Reserved):
            raise ProtocolError(f"{self._peer.instance} answered {type(answer).__name__} to Reserve")
        dst = Addresses.from_bytes(self._peer.instance, self._peer.incarnation, answer.dst)
        if answer.held + len(dst) != blocks:
            raise ProtocolError(f"{answer.held} + {len(dst)} blocks were reserved instead of {blocks}")
        return dst, answer.held

    async def _copy(self, job: _Job, src: Addresses, dst: Addresses) -> NDArray[np.uint64]:
        if self._arena is None:
            raise PeerLost(f"{dst.instance} was lost before the copy")
        copy = SharedMemoryCopy(self._own, self._arena, plan_steps(src, dst, self._own.block_bytes))
        may_go_on = functools.partial(self._may_go_on, job)
        job.copying = asyncio.get_running_loop().run_in_executor(self._workers, copy.run, may_go_on)
        try:
            # Shielded: a cancelled future would say "done" while the thread still writes.
            return await asyncio.shield(job.copying)
        except TransferAborted as error:
            if self._connection is not None and self._connection.closed:
                raise PeerLost(f"{self._connection.label} was lost during a copy") from error
            raise

    def _may_go_on(self, job: _Job) -> bool:
        # Called in the worker thread, before each step of the copy.
        self._observe("copying")
        return not job.stopped and self._clock.now() < job.deadline

    def _abort(self, job: _Job, reason: str) -> None:
        """Tell the peer that nothing is written any more, as soon as that is true."""
        if job.copying is not None and job.writing:
            job.copying.add_done_callback(lambda _: self._abort(job, reason))
            return
        self._jobs.pop(job.transfer, None)
        if job.copying is not None and not job.copying.cancelled():
            # Retrieved, so that a failure nobody waits for any more is not reported as forgotten.
            job.copying.exception()
        if self._connection is not None and not self._connection.closed:
            self._connection.notify(AbortTransfer(job.transfer, reason))

    async def _call(self, message: Message) -> Any:
        if self._connection is None:
            raise PeerLost("the connection was never opened")
        return await self._connection.call(message, self._limits.call_seconds)
