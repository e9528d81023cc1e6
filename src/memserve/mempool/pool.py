"""MemPool: all KV memory of an instance behind one API (design: mempool.md; paper, section 4).

What happens inside one process is in ``local``; here are the transfers. Knows no sockets: they go through an
attached endpoint. Single-threaded: one event loop owns a pool; other threads may only read and write the
memory of blocks they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from memserve._native import common_prefix
from memserve.core.clock import Clock
from memserve.core.errors import ConfigError, InvalidRequest, MemServeError, OutOfBlocks, TransferAborted
from memserve.core.messages import Member
from memserve.core.types import InstanceId, Namespace, Tokens
from memserve.mempool.address import Addresses, Origin, numbers_of
from memserve.mempool.disk import DiskTier
from memserve.mempool.eviction import EvictionPolicy
from memserve.mempool.layout import KVLayout
from memserve.mempool.local import LocalPool
from memserve.mempool.reservations import Completed, Reservation, ReservationTable
from memserve.mempool.results import Transferred
from memserve.mempool.stats import AbortCause
from memserve.mempool.transport import Transport


class MemPool(LocalPool):
    """The KV pool of ``instance`` in its life ``incarnation``: ``blocks`` blocks of ``layout``.

    Below them lie ``host_blocks`` in main memory and those of ``disk``, if given. Calls come in three groups:
    memory (``alloc_mem``, ``free_mem``, ``swap_out``, ``swap_in``, ``retain``, ``pointers``), index
    (``insert``, ``match``, ``delete``, ``pin``) and distributed (``transfer``, ``transfer_with_insert``).
    """

    def __init__(
        self,
        layout: KVLayout,
        blocks: int,
        *,
        instance: InstanceId,
        incarnation: int,
        clock: Clock,
        eviction: EvictionPolicy | None = None,
        host_blocks: int = 0,
        disk: DiskTier | None = None,
    ) -> None:
        super().__init__(
            layout,
            blocks,
            instance=instance,
            incarnation=incarnation,
            clock=clock,
            eviction=eviction,
            host_blocks=host_blocks,
            disk=disk,
        )
        self._reservations = ReservationTable()
        self._transport: Transport | None = None

    # --- distributed ----------------------------------------------------------------------------------

    def attach(self, transport: Transport) -> None:
        """Let transfers go through ``transport``."""
        self._transport = transport

    def set_peers(self, members: tuple[Member, ...]) -> None:
        """Learn which other pools live; whatever the missing ones had reserved here is freed."""
        self._require_transport().set_peers(members)

    async def transfer(self, peer: InstanceId, src: Addresses, *, attachment: bytes = b"") -> Transferred:
        """Copy blocks to ``peer``, where ``attachment`` says who takes them over.

        Errors: see :meth:`transfer_with_insert`.
        """
        self.pointers(src)
        return await self._require_transport().transfer(peer, src, attachment=attachment)

    async def transfer_with_insert(
        self,
        peer: InstanceId,
        tokens: Tokens,
        src: Addresses,
        namespace: Namespace,
        *,
        origin: Origin = Origin.PEER,
        attachment: bytes = b"",
    ) -> Transferred:
        """Copy to ``peer`` what it lacks of the KV of ``tokens``, and publish it there in one go.

        ``src`` covers ``tokens``. The last, partly filled block travels only together with an
        ``attachment``, whose taker gets references to all blocks of the path. All or nothing: raises
        ``PeerLost``, ``PeerOutOfBlocks``, ``CorruptBlock``, ``LeaseExpired``, ``TransferAborted``,
        ``LayoutMismatch`` or what the taker raised, and then the peer has kept nothing.
        """
        self.pointers(src)
        return await self._require_transport().transfer_with_insert(
            peer, tokens, src, namespace, origin=origin, attachment=attachment
        )

    # --- transfers into this pool, driven by the transport ----------------------------------------------

    def begin_incoming(
        self,
        transfer: str,
        peer: InstanceId,
        namespace: Namespace,
        tokens: Tokens,
        blocks: int,
        seconds: float,
    ) -> Reservation:
        """Reserve the ``blocks`` blocks of ``tokens``: hold what is cached, allocate the rest as incoming.

        With empty ``tokens`` all blocks are allocated. The same request again gives the same reservation.
        Raises ``OutOfBlocks``, ``InvalidRequest``, or how the transfer ended if it has.
        """
        known = self._reservations.find(transfer)
        if known is not None and known.same_request(peer, namespace, tokens, blocks):
            return self._reservations.require(transfer)
        if known is not None or self._reservations.outcome(transfer) is not None:
            raise InvalidRequest(f"transfer id {transfer} was used for something else", field="transfer")
        full = len(tokens) // self.layout.block_tokens
        if len(tokens) and not full <= blocks <= self.layout.blocks_for(len(tokens)):
            raise InvalidRequest(f"{blocks} blocks do not fit {len(tokens)} tokens", field="blocks")
        with self._lease(tokens, namespace, None) as lease:
            held = self.swap_in(lease.addrs)
        try:
            fresh = self.alloc_mem(blocks - len(held))
        except OutOfBlocks:
            self.free_mem(held)
            raise
        self._table.mark_incoming(numbers_of(fresh.packed), True)
        deadline = self._clock.now() + seconds
        reservation = Reservation(transfer, peer, namespace, tokens, held, fresh, seconds, deadline)
        self._reservations.add(reservation)
        return reservation

    def find_incoming(self, transfer: str) -> Reservation | Completed:
        """The reservation to publish, its deadline renewed, or what the transfer brought if it has published.

        Raises ``LeaseExpired``, ``StaleAddress`` for an unknown one, or how the transfer ended.
        """
        done = self._reservations.outcome(transfer)
        if done is not None:
            return done
        reservation = self._reservations.require(transfer)
        reservation.deadline = self._clock.now() + reservation.seconds
        return reservation

    def incoming_deadline(self, transfer: str) -> float | None:
        """Until when a reservation may stand without progress (clock seconds); None if none stands."""
        reservation = self._reservations.find(transfer)
        return None if reservation is None else reservation.deadline

    def incoming_gain(self, tokens: Tokens, namespace: Namespace) -> int:
        """How many more tokens of the prefix transfers under way will publish here, beyond what is cached."""
        promised = max(
            (
                common_prefix(reservation.tokens, tokens)
                for reservation in self._reservations
                if reservation.namespace == namespace and not reservation.revoked
            ),
            default=0,
        )
        whole = promised // self.layout.block_tokens
        if whole == 0:
            return 0
        return max(0, whole - len(self._index.find(namespace, tokens).blocks)) * self.layout.block_tokens

    def complete_incoming(
        self, transfer: str, origin: Origin, adopt: Callable[[Addresses], None] | None = None
    ) -> Completed:
        """Publish: the verified blocks become readable and are indexed. Call once per transfer.

        ``adopt`` takes over references to all blocks of the path. If it raises they are released, and its
        error is what the transfer ended with; without it the blocks just stay cached. Raises
        ``LeaseExpired``, or ``InvalidRequest`` when the part of the path that was held is used for other
        tokens by now; the reservation stands then, to be aborted.
        """
        reservation = self._reservations.require(transfer)
        addrs = reservation.addrs
        inserted = self.insert(reservation.tokens, addrs, reservation.namespace, origin)
        self._table.mark_incoming(numbers_of(reservation.fresh.packed), False)
        done = Completed(transfer, inserted.new)
        outcome: Completed | MemServeError = TransferAborted(f"transfer {transfer}: its taker failed")
        try:
            if adopt is not None:
                adopt(addrs)
            outcome = done
        except MemServeError as error:
            outcome = error
            raise
        finally:
            self._reservations.end(transfer, outcome)
            if outcome is not done:
                self._counters.aborts[AbortCause.REFUSED] += 1
            if outcome is not done or adopt is None:
                self.free_mem(addrs)
        self._counters.received += 1
        self._counters.received_bytes += len(reservation.fresh) * self.layout.block_bytes
        return done

    def abort_incoming(self, transfer: str, cause: AbortCause, reason: str) -> None:
        """End a transfer without publishing and free what it had reserved. Its writer must have stopped.

        Repeating it, or aborting what never was, is harmless; the id can not be used any more.
        """
        reservation = self._reservations.abort(transfer, reason)
        if reservation is None:
            return
        self._counters.aborts[cause] += 1
        self._table.mark_incoming(numbers_of(reservation.fresh.packed), False)
        self.free_mem(reservation.addrs)

    def drop_peer(self, instance: InstanceId, reason: str) -> int:
        """A death notice: abort all that ``instance`` had reserved. Returns how many transfers that were."""
        standing = self._reservations.of_peer(instance)
        for reservation in standing:
            self.abort_incoming(reservation.transfer, AbortCause.SENDER_LOST, reason)
        return len(standing)

    def expire(self) -> tuple[str, ...]:
        """End leases and pins past their deadline, and revoke overdue transfers, whose ids are returned.

        A revoked transfer can not publish. Its blocks stay incoming until :meth:`abort_incoming` says that
        the writer has stopped: a sender that wakes up late must find nobody else's KV under its pen.
        """
        now = self._clock.now()
        self._end_overdue(now)
        return tuple(reservation.transfer for reservation in self._reservations.revoke_overdue(now))

    def count_sent(self, size: int) -> None:
        """For the transport: a transfer of ``size`` bytes was published by a peer."""
        self._counters.sent += 1
        self._counters.sent_bytes += size

    def check(self, holdings: Iterable[Addresses] | None = None) -> None:
        """Assert every invariant. With ``holdings``, all that callers hold, references must equal them."""
        super().check(holdings)
        incoming = sum(len(x.fresh) for x in self._reservations)
        assert incoming == self._table.counts().incoming, "incoming blocks without a reservation"

    # --- inside ---------------------------------------------------------------------------------------

    def _own_holdings(self) -> Iterator[Addresses]:
        yield from super()._own_holdings()
        yield from (reservation.addrs for reservation in self._reservations)

    def _require_transport(self) -> Transport:
        if self._transport is None:
            raise ConfigError("this pool has no transfer endpoint; attach one before transferring")
        return self._transport
