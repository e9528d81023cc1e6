"""The sending side: one connection to a peer, the backend that moves blocks there, and the transfers.

Order of a transfer: reserve on the peer -> move the bytes -> publish there. Whatever goes wrong in between,
the peer is told to forget it, but not before the backend has really stopped: from then on the blocks may
belong to somebody else.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from memserve.core.clock import Clock
from memserve.core.errors import MemServeError, PeerLost, ProtocolError, StaleAddress, TransferAborted
from memserve.core.messages import (
    AbortTransfer,
    Allocate,
    Allocated,
    Copied,
    GiveBack,
    GivenBack,
    Hello,
    Message,
    Ok,
    Publish,
    Reserve,
    Reserved,
)
from memserve.core.types import InstanceId, Namespace, Tokens, pack_tokens
from memserve.mempool.address import Addresses, Origin, Tier
from memserve.mempool.layer_gate import LayerGate
from memserve.mempool.layout import KVLayout
from memserve.mempool.modes import TransferMode, choose_mode, cut_blocks
from memserve.mempool.results import Freed, Transferred
from memserve.mempool.transfer.backends import Moved, TransferBackend, Transmission
from memserve.mempool.transfer.plan import Step, plan_steps
from memserve.mempool.transfer.window import Window
from memserve.mempool.transport import Attachment
from memserve.wire import Connection


@dataclass(frozen=True, slots=True)
class SendOrder:
    """What to send: blocks ``src`` for ``tokens`` (empty: a plain transfer), by ``mode`` (None: as fits).

    With ``ready`` layers are sent once they are computed; with ``dst`` the peer's blocks are chosen here. An
    ``attachment`` that is a future is waited for before the publication.
    """

    tokens: Tokens
    src: Addresses
    namespace: Namespace
    origin: Origin
    attachment: Attachment
    mode: TransferMode | None = None
    ready: LayerGate | None = None
    dst: Addresses | None = None


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
    clock: Clock
    deadline: float
    copying: asyncio.Future[Moved] | None = None
    waited: float = 0.0
    """Seconds spent waiting for what was still being computed."""
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def stopped(self) -> bool:
        """Whether nothing more is to be written. For any thread."""
        return self._stop.is_set()

    def stop(self) -> None:
        self._stop.set()

    async def wait_for(self, ready: LayerGate, layers: int, seconds: float) -> None:
        """Until the layers are computed. Raises ``TransferAborted`` when told to stop or when time is up."""
        if ready.layers >= layers:
            return
        computed = asyncio.ensure_future(ready.wait(layers))
        try:
            await self._wait(computed, f"{layers} layers", seconds)
            computed.result()
        finally:
            computed.cancel()

    async def wait_for_attachment(self, attachment: Attachment, seconds: float) -> bytes:
        """What to attach. Raises ``TransferAborted`` when there will be nothing, or as ``wait_for``."""
        if isinstance(attachment, bytes):
            return attachment
        if not attachment.done():
            await self._wait(attachment, "its attachment", seconds)
        if attachment.cancelled():
            raise TransferAborted(f"transfer {self.transfer} was called off")
        return attachment.result()

    async def _wait(self, future: asyncio.Future[Any], what: str, seconds: float) -> None:
        stopped = asyncio.ensure_future(self._stop.wait())
        started = self.clock.now()
        try:
            await asyncio.wait((future, stopped), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            self.waited += self.clock.now() - started
        if not future.done():
            why = "it was told to stop" if self.stopped else f"that took longer than {seconds} s"
            raise TransferAborted(f"transfer {self.transfer} has waited for {what}: {why}")

    @property
    def writing(self) -> bool:
        return self.copying is not None and not self.copying.done()


class OutboundLink:
    """A connection to a peer's pool. Single-threaded but for the copying itself."""

    def __init__(
        self, layout: KVLayout, clock: Clock, limits: SendLimits, observe: Callable[[str], None]
    ) -> None:
        self._layout = layout
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
        async with self._window.room(len(order.src) * self._layout.block_bytes):
            done = await self._send(transfer, order)
        self._sent += 1
        self._sent_bytes += done.bytes
        return done

    async def _send(self, transfer: str, order: SendOrder) -> Transferred:
        peer, backend = self._require_open()
        mode = order.mode or choose_mode(
            self._layout,
            backend.name,
            len(order.src) * self._layout.block_bytes,
            gated=order.ready is not None,
        )
        cut, started = cut_blocks(self._layout, mode), self._clock.now()
        job = self._jobs[transfer] = _Job(transfer, self._clock, started + self._limits.reserve_seconds)
        reason = "the sender gave up"
        try:
            dst, answer = await self._reserve(transfer, order, mode)
            self._observe("reserved")
            layerwise = mode is TransferMode.BY_LAYER and order.ready is not None
            steps = plan_steps(order.src[answer.held :], dst, cut, layerwise=layerwise)
            moved = await self._move(job, steps, cut.unit_bytes, answer, order)
            self._observe("copied")
            sums = moved.checksums.astype("<u8").tobytes()
            attachment = await job.wait_for_attachment(order.attachment, self._limits.reserve_seconds)
            await self._call(Publish(transfer, sums, int(order.origin), attachment))
            self._observe("published")
            reason = ""
            size = len(dst) * self._layout.block_bytes
            seconds = self._clock.now() - started - job.waited
            return Transferred(answer.held, len(dst), size, moved.calls, mode, backend.name, seconds)
        except MemServeError as error:
            reason = str(error)
            if isinstance(error, TransferAborted) and self.closed:
                raise PeerLost(f"{peer.instance} was lost during a transfer") from error
            raise
        finally:
            job.stop()
            if reason:
                self._abort(job, reason)
            else:
                self._jobs.pop(transfer)

    async def allocate(self, loan: str, blocks: int, tier: Tier, seconds: float) -> Addresses:
        """Borrow blocks of the peer. Raises what ``MemPool.alloc_peer_mem`` names."""
        peer, _ = self._require_open()
        answer = await self._call(Allocate(loan, blocks, tier, seconds))
        if not isinstance(answer, Allocated):
            raise ProtocolError(f"{peer.instance} answered {type(answer).__name__} to Allocate")
        return Addresses.from_bytes(peer.instance, peer.incarnation, answer.addrs)

    async def give_back(self, addrs: Addresses) -> Freed:
        """End the loan of these blocks. Raises what ``MemPool.free_peer_mem`` names."""
        peer, _ = self._require_open()
        _require_life(addrs, peer)
        answer = await self._call(GiveBack(addrs.to_bytes()))
        if not isinstance(answer, GivenBack):
            raise ProtocolError(f"{peer.instance} answered {type(answer).__name__} to GiveBack")
        return Freed(answer.freed, answer.stale)

    def close(self, reason: str) -> None:
        """Stop all transfers, then end the connection: to the peer this means that nobody writes any more."""
        writing = [job.copying for job in self._jobs.values() if job.copying is not None and job.writing]
        for job in self._jobs.values():
            job.stop()
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
            job.stop()
            if job.copying is not None:
                await asyncio.wait([job.copying])
                if (lost := _lost_while_copying(job)) is not None:
                    raise lost
        return Ok()

    def on_close(self, connection: Connection, reason: str) -> None:
        for job in self._jobs.values():
            job.stop()
        if self._backend is not None:
            # A copy under way holds on to the mapping by itself; nobody else may keep a dead peer's memory.
            self._backend.close()
            self._backend = None

    # --- the steps ---

    async def _reserve(
        self, transfer: str, order: SendOrder, mode: TransferMode
    ) -> tuple[Addresses, Reserved]:
        """Where to copy to, and the peer's answer."""
        peer, backend = self._require_open()
        blocks, chosen = len(order.src), order.dst
        if chosen is not None:
            _require_life(chosen, peer)
        asked = Reserve(
            transfer,
            order.namespace,
            pack_tokens(order.tokens),
            blocks,
            self._limits.reserve_seconds,
            backend.name,
            mode.value,
            b"" if chosen is None else chosen.to_bytes(),
        )
        answer = await self._call(asked)
        if not isinstance(answer, Reserved):
            raise ProtocolError(f"{peer.instance} answered {type(answer).__name__} to Reserve")
        dst = Addresses.from_bytes(peer.instance, peer.incarnation, answer.dst)
        if answer.held + len(dst) != blocks:
            raise ProtocolError(f"{answer.held} + {len(dst)} blocks were reserved instead of {blocks}")
        if chosen is not None and dst != chosen[answer.held :]:
            raise ProtocolError(f"{peer.instance} reserved other blocks than those that were asked for")
        return dst, answer

    async def _move(
        self, job: _Job, steps: list[Step], unit_bytes: int, reserved: Reserved, order: SendOrder
    ) -> Moved:
        """Move all steps: at once, or as their layers become ready."""
        ready, published_at_once = order.ready, isinstance(order.attachment, bytes)
        if ready is None:
            return await self._transmit(job, steps, unit_bytes, reserved, 0, last=published_at_once)
        checksums, calls, first, at = [np.empty(0, np.uint64)], 0, 0, 0
        while at < len(steps):
            await job.wait_for(ready, steps[at].layers, self._limits.reserve_seconds)
            # Waiting was no idleness: its time is not the copy's.
            job.deadline = self._clock.now() + self._limits.reserve_seconds
            group = [step for step in steps[at:] if step.layers <= ready.layers]
            at += len(group)
            last = at == len(steps) and published_at_once
            moved = await self._transmit(job, group, unit_bytes, reserved, first, last=last)
            checksums.append(moved.checksums)
            calls += moved.calls
            first += len(moved.checksums)
        return Moved(np.concatenate(checksums), calls)

    async def _transmit(
        self, job: _Job, steps: list[Step], unit_bytes: int, reserved: Reserved, first: int, *, last: bool
    ) -> Moved:
        _, backend = self._require_open()
        loop = asyncio.get_running_loop()

        def written(first: int, units: int) -> None:
            loop.call_soon_threadsafe(self._tell_written, job, first, units)

        go_on = functools.partial(self._may_go_on, job)
        order = Transmission(reserved.ticket, steps, unit_bytes, first, last, go_on, written, reserved.memory)
        job.copying = loop.run_in_executor(backend.workers, backend.transmit, order)
        try:
            # Shielded: a cancelled future would say "done" while the thread still writes.
            return await asyncio.shield(job.copying)
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

    def _tell_written(self, job: _Job, first: int, units: int) -> None:
        if not job.stopped and self._connection is not None and not self._connection.closed:
            self._connection.notify(Copied(job.transfer, first, units))

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


def _require_life(addrs: Addresses, peer: Hello) -> None:
    """Raise ``StaleAddress`` for blocks of another life of the peer, or of another pool."""
    if (addrs.instance, addrs.incarnation) != (peer.instance, peer.incarnation):
        raise StaleAddress(
            f"blocks of {addrs.owner_text} mean nothing to {peer.instance} (incarnation {peer.incarnation})"
        )
