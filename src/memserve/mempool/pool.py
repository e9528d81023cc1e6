"""MemPool: all KV memory of an instance behind one API (design: mempool.md; paper, section 4).

What happens inside one process is in ``local``; here are the transfers. Knows no sockets: they go through an
attached endpoint. Single-threaded: one event loop owns a pool; other threads may only read and write the
memory of blocks they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from memserve._native import common_prefix
from memserve.core.clock import Clock
from memserve.core.errors import ConfigError, InvalidRequest, MemServeError, PeerOutOfBlocks, TransferAborted
from memserve.core.messages import Member
from memserve.core.types import InstanceId, Namespace, Tokens
from memserve.mempool.address import Addresses, Origin, Tier, numbers_of
from memserve.mempool.disk import DiskTier
from memserve.mempool.eviction import EvictionPolicy
from memserve.mempool.layer_gate import LayerGate
from memserve.mempool.layout import KVLayout
from memserve.mempool.loans import Loan, LoanTable
from memserve.mempool.local import LocalPool
from memserve.mempool.modes import TransferMode
from memserve.mempool.reservations import Completed, Reservation, ReservationTable
from memserve.mempool.results import Freed, Transferred
from memserve.mempool.stats import AbortCause, PoolStats, Traffic
from memserve.mempool.transport import Attachment, Transport


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
        borrows_tokens: bool = False,
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
            borrows_tokens=borrows_tokens,
        )
        self._reservations = ReservationTable()
        self._loans = LoanTable()
        self._traffic = Traffic()
        self._transport: Transport | None = None

    # --- distributed ----------------------------------------------------------------------------------

    def attach(self, transport: Transport) -> None:
        """Let transfers go through ``transport``."""
        self._transport = transport

    def set_peers(self, members: tuple[Member, ...]) -> None:
        """Learn which other pools live; whatever the missing ones had reserved here is freed."""
        self._require_transport().set_peers(members)

    async def transfer(
        self,
        peer: InstanceId,
        src: Addresses,
        *,
        attachment: Attachment = b"",
        mode: TransferMode | None = None,
        ready: LayerGate | None = None,
        dst: Addresses | None = None,
    ) -> Transferred:
        """Copy blocks to ``peer``: to new ones, where ``attachment`` says who takes them over, or to ``dst``.

        Options and errors: see :meth:`transfer_with_insert`.
        """
        self.pointers(src)
        return await self._require_transport().transfer(
            peer, src, attachment=attachment, mode=mode, ready=ready, dst=dst
        )

    async def transfer_with_insert(
        self,
        peer: InstanceId,
        tokens: Tokens,
        src: Addresses,
        namespace: Namespace,
        *,
        origin: Origin = Origin.PEER,
        attachment: Attachment = b"",
        mode: TransferMode | None = None,
        ready: LayerGate | None = None,
        dst: Addresses | None = None,
    ) -> Transferred:
        """Copy to ``peer`` what it lacks of the KV of ``tokens``, and publish it there in one go.

        ``src`` covers ``tokens``. The last, partly filled block travels only together with an
        ``attachment``, whose taker gets references to all blocks of the path. ``mode`` says in which pieces
        and in which order, and is chosen if None. With ``ready`` the blocks are still being computed: nothing
        is read before the gate is open for it, and ``attachment`` may be a future, which is waited for at the
        end; cancelling it aborts the transfer. With ``dst`` (see :meth:`alloc_peer_mem`) ``src[i]`` goes to
        ``dst[i]``, but for what the peer has already; the loan goes on.

        All or nothing: raises ``PeerLost``, ``PeerOutOfBlocks``, ``CorruptBlock``, ``LeaseExpired``,
        ``TransferAborted``, ``LayoutMismatch`` or what the taker raised, and then the peer has kept nothing;
        ``InvalidRequest`` for a mode that the layout does not have, ``StaleAddress`` for a ``dst`` that is
        not lent any more.
        """
        self.pointers(src)
        return await self._require_transport().transfer_with_insert(
            peer,
            tokens,
            src,
            namespace,
            origin=origin,
            attachment=attachment,
            mode=mode,
            ready=ready,
            dst=dst,
        )

    async def offload(self, peer: InstanceId, n: int) -> int:
        """Let ``peer`` have what the device would give up next: about ``n`` blocks, and what they continue.

        For a pool that is about to shrink or to leave. The KV stays here too. Returns how many blocks went:
        fewer where the peer has them, or has no room for more. Raises what :meth:`transfer_with_insert` does.
        """
        sent = 0
        for namespace, tokens in self._tiers.coldest(n):
            with self._lease(tokens, namespace, None, use=False) as lease:
                on_disk = lease.tiers == Tier.DISK
                src = lease.addrs[: int(on_disk.argmax())] if on_disk.any() else lease.addrs
                whole = tokens[: len(src) * self.layout.block_tokens]
                try:
                    sent += (await self.transfer_with_insert(peer, whole, src, namespace)).sent
                except PeerOutOfBlocks:
                    break
        return sent

    async def alloc_peer_mem(
        self, peer: InstanceId, n: int, tier: Tier = Tier.DEVICE, *, seconds: float = 60.0
    ) -> Addresses:
        """``alloc_mem`` on a peer: ``n`` of its blocks, as ``dst`` of transfers to it.

        They are lent: the peer frees them when this instance dies, or ``seconds`` (at most 600) after their
        last use by a transfer. Raises ``PeerOutOfBlocks``, ``PeerLost``.
        """
        return await self._require_transport().allocate(peer, n, tier, seconds)

    async def free_peer_mem(self, addrs: Addresses) -> Freed:
        """``free_mem`` on the peer that has lent ``addrs``; KV that was inserted there stays cached.

        What is not lent any more counts as stale. Raises ``PeerLost``, or ``InvalidRequest`` while a transfer
        writes there.
        """
        return await self._require_transport().give_back(addrs)

    # --- transfers into this pool, driven by the transport ----------------------------------------------

    def begin_incoming(
        self,
        transfer: str,
        peer: InstanceId,
        namespace: Namespace,
        tokens: Tokens,
        blocks: int,
        seconds: float,
        dst: Addresses | None = None,
    ) -> Reservation:
        """Reserve the ``blocks`` blocks of ``tokens``: hold what is cached, allocate the rest as incoming.

        With empty ``tokens`` all blocks are allocated. With ``dst``, blocks lent to ``peer``, nothing is
        allocated: ``dst[i]`` is for the i-th block. The same request again gives the same reservation.
        Raises ``OutOfBlocks``, ``InvalidRequest``, ``StaleAddress``, or how the transfer ended if it has.
        """
        known = self._reservations.find(transfer)
        if known is not None and known.same_request(peer, namespace, tokens, blocks, dst):
            return self._reservations.require(transfer)
        if known is not None or self._reservations.outcome(transfer) is not None:
            raise InvalidRequest(f"transfer id {transfer} was used for something else", field="transfer")
        full = len(tokens) // self.layout.block_tokens
        if len(tokens) and not full <= blocks <= self.layout.blocks_for(len(tokens)):
            raise InvalidRequest(f"{blocks} blocks do not fit {len(tokens)} tokens", field="blocks")
        if dst is not None and len(dst) != blocks:
            raise InvalidRequest(f"{len(dst)} addresses for {blocks} blocks", field="dst")
        with self._lease(tokens, namespace, None) as lease:
            held = self.swap_in(lease.addrs)
        loans: tuple[Loan, ...] = ()
        try:
            if dst is None:
                fresh = self.alloc_mem(blocks - len(held))
            else:
                fresh = dst[len(held) :]
                loans = self._begin_write(peer, fresh, indexed=len(tokens) > 0)
        except MemServeError:
            self.free_mem(held)
            raise
        self._table.mark_incoming(numbers_of(fresh.packed), True)
        deadline = self._clock.now() + seconds
        reservation = Reservation(transfer, peer, namespace, tokens, held, fresh, seconds, deadline, loans)
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
        now = self._clock.now()
        reservation.deadline = now + reservation.seconds
        self._loans.renew(reservation.loans, now)
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
        return max(0, whole * self.layout.block_tokens - self.count_cached(tokens, namespace))

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
        fresh = numbers_of(reservation.fresh.packed)
        self._table.mark_incoming(fresh, False)
        if reservation.loans:
            # The taker's, or until the end of this call; the peer's own stay with its loans.
            self._table.retain(fresh)
            self._end_write(reservation)
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
        self.free_mem(reservation.owned)
        self._end_write(reservation)

    def drop_peer(self, instance: InstanceId, reason: str) -> int:
        """A death notice: abort all that ``instance`` had reserved, and end its loans.

        Returns how many transfers that were.
        """
        standing = self._reservations.of_peer(instance)
        for reservation in standing:
            self.abort_incoming(reservation.transfer, AbortCause.SENDER_LOST, reason)
        self.end_loans(instance)
        return len(standing)

    def expire(self) -> tuple[str, ...]:
        """End leases, pins and loans past their deadline, and revoke overdue transfers, and return their ids.

        A revoked transfer can not publish. Its blocks stay incoming until :meth:`abort_incoming` says that
        the writer has stopped: a sender that wakes up late must find nobody else's KV under its pen.
        """
        now = self._clock.now()
        self._end_overdue(now)
        self._free_all(self._loans.end_overdue(now))
        return tuple(reservation.transfer for reservation in self._reservations.revoke_overdue(now))

    # --- blocks lent to peers -------------------------------------------------------------------------

    def lend(self, loan: str, peer: InstanceId, n: int, tier: Tier, seconds: float) -> Addresses:
        """Allocate ``n`` blocks for ``peer``, until it gives them back or has not used them for ``seconds``.

        The same ``loan`` again gives the same blocks. Raises what ``alloc_mem`` raises.
        """
        known = self._loans.find(loan)
        if known is not None and (known.peer, len(known.addrs)) == (peer, n):
            return known.addrs
        if known is not None:
            raise InvalidRequest(f"loan {loan} was made for something else", field="loan")
        addrs = self.alloc_mem(n, tier)
        self._loans.add(Loan(loan, peer, addrs, seconds, self._clock.now() + seconds))
        return addrs

    def take_back(self, peer: InstanceId, addrs: Addresses) -> Freed:
        """Free what ``peer`` gives back; what was not lent to it (any more) counts as stale.

        Raises ``InvalidRequest`` while a transfer writes to these blocks.
        """
        packed = addrs.packed if self._owns(addrs) else addrs.packed[:0]
        freed = self._free_all(self._loans.take_back(peer, packed))
        return Freed(freed, len(addrs) - freed)

    def end_loans(self, peer: InstanceId) -> None:
        """``peer`` is gone: free what was lent to it, as soon as no transfer writes there."""
        self._free_all(self._loans.end_of_peer(peer))

    def next_loan_deadline(self) -> float | None:
        """When :meth:`expire` may find a loan that has run out (clock seconds); None if there are none."""
        return self._loans.next_deadline()

    # --- observation ----------------------------------------------------------------------------------

    def count_sent(self, peer: InstanceId, done: Transferred) -> None:
        """For the transport: a transfer was published by ``peer``."""
        self._counters.sent += 1
        self._counters.sent_bytes += done.bytes
        self._counters.spared_bytes += done.held * self.layout.block_bytes
        self._traffic.count(peer, done)

    def stats(self) -> PoolStats:
        """State and counters as a frozen value. Costs a pass over the block table."""
        return replace(super().stats(), lent=self._loans.blocks, traffic=self._traffic.links())

    def check(self, holdings: Iterable[Addresses] | None = None) -> None:
        """Assert every invariant. With ``holdings``, all that callers hold, references must equal them."""
        super().check(holdings)
        incoming = sum(len(x.fresh) for x in self._reservations)
        assert incoming == self._table.counts().incoming, "incoming blocks without a reservation"

    # --- inside ---------------------------------------------------------------------------------------

    def _own_holdings(self) -> Iterator[Addresses]:
        yield from super()._own_holdings()
        yield from (reservation.owned for reservation in self._reservations)
        yield from (loan.addrs for loan in self._loans)

    def _begin_write(self, peer: InstanceId, dst: Addresses, *, indexed: bool) -> tuple[Loan, ...]:
        """Raises unless ``peer`` may write to these blocks now, and they may be indexed if that is wanted."""
        numbers = self._numbers(dst)
        loans = self._loans.covering(peer, dst.packed)
        if not self._table.all_writable(numbers):
            raise InvalidRequest("blocks to write to must be free of other KV and transfers", field="dst")
        if indexed and not self._table.all_on_device(numbers):
            raise InvalidRequest("blocks that are published must lie on the device", field="dst")
        self._loans.begin_write(loans, self._clock.now())
        return loans

    def _end_write(self, reservation: Reservation) -> None:
        self._free_all(self._loans.end_write(reservation.loans, self._clock.now()))

    def _free_all(self, ended: Iterable[Addresses]) -> int:
        return sum(self.free_mem(addrs).freed for addrs in ended)

    def _require_transport(self) -> Transport:
        if self._transport is None:
            raise ConfigError("this pool has no transfer endpoint; attach one before transferring")
        return self._transport
