"""Moves a sequence's KV between instances: P to D after prefill, D to P after decode.

Knows who the peers are and how long to try; MemPool knows how blocks travel.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from memserve.core.clock import Clock
from memserve.core.errors import MemServeError, OutOfBlocks, Overloaded, PeerLost
from memserve.core.messages import Member
from memserve.core.types import InstanceId
from memserve.engine.overlap import Overlap
from memserve.engine.sequence import Sequence, to_adoption
from memserve.mempool.address import Origin
from memserve.mempool.layer_gate import LayerGate
from memserve.mempool.modes import TransferMode
from memserve.mempool.pool import MemPool
from memserve.mempool.results import Transferred
from memserve.mempool.transport import Attachment

_RETRY_SECONDS = 0.02
"""Pause before asking a full receiver again; it frees blocks once per finished request."""


@dataclass(frozen=True, slots=True)
class HeadStart:
    """A prompt that is handed over while it is computed: ``ready`` tells of layers, ``adoption`` comes last.

    Whoever computes it sets or cancels ``adoption`` when the step is over.
    """

    overlap: Overlap
    mode: TransferMode
    ready: LayerGate
    adoption: asyncio.Future[bytes]


@dataclass(frozen=True, slots=True)
class Delivered:
    """How a sequence was handed over in the end; ``overlap`` is ``NONE`` where a head start was lost."""

    overlap: Overlap
    transferred: Transferred


class Carrier(Protocol):
    """What the engine asks of KV transport."""

    async def hand_over(
        self, sequence: Sequence, *, with_insert: bool, head: HeadStart | None = None
    ) -> Delivered:
        """Give a prefilled sequence to ``sequence.decode_on``. Raises ``MemServeError`` if it stays here."""
        ...

    async def send_ahead(self, sequence: Sequence, blocks: int) -> Transferred:
        """Publish the first ``blocks`` blocks, which are computed, on ``sequence.decode_on``.

        Raises ``MemServeError``.
        """
        ...

    async def send_back(self, sequence: Sequence) -> int:
        """Send computed KV to ``sequence.prefilled_on``; returns bytes moved. Raises ``MemServeError``."""
        ...


class PoolCarrier:
    """Carries KV through MemPool's transfer calls to the members of the cluster."""

    def __init__(self, instance: InstanceId, pool: MemPool, clock: Clock, *, timeout: float) -> None:
        self._instance = instance
        self._pool = pool
        self._clock = clock
        self._timeout = timeout

    def set_members(self, members: tuple[Member, ...]) -> None:
        """Learn who lives; what the others had reserved here is freed."""
        self._pool.set_peers(tuple(member for member in members if member.instance != self._instance))

    async def hand_over(
        self, sequence: Sequence, *, with_insert: bool, head: HeadStart | None = None
    ) -> Delivered:
        if head is not None:
            try:
                done = await self._send_early(sequence, head, with_insert=with_insert)
                return Delivered(head.overlap, done)
            except MemServeError as error:
                # Before the first token nothing can have been adopted, so there is nothing to be lost.
                if head.adoption.done() and not isinstance(error, (OutOfBlocks, Overloaded)):
                    raise
            await head.adoption
        return Delivered(Overlap.NONE, await self._send_late(sequence, with_insert=with_insert))

    async def send_ahead(self, sequence: Sequence, blocks: int) -> Transferred:
        assert sequence.decode_on is not None and sequence.addrs is not None
        return await self._pool.transfer_with_insert(
            sequence.decode_on,
            sequence.buffer[: blocks * self._pool.layout.block_tokens],
            sequence.addrs[:blocks],
            sequence.namespace,
        )

    async def _send_early(self, sequence: Sequence, head: HeadStart, *, with_insert: bool) -> Transferred:
        return await self._send(
            sequence, head.adoption, with_insert=with_insert, mode=head.mode, ready=head.ready
        )

    async def _send_late(self, sequence: Sequence, *, with_insert: bool) -> Transferred:
        """A prefilled sequence, again and again while its receiver is full."""
        attachment = to_adoption(sequence, self._instance)
        deadline = self._clock.now() + self._timeout
        while True:
            try:
                return await self._send(sequence, attachment, with_insert=with_insert)
            except (OutOfBlocks, Overloaded) as error:
                if self._clock.now() > deadline:
                    raise Overloaded(
                        f"{sequence.decode_on} had no room for {self._timeout:g} s: {error}"
                    ) from error
            await asyncio.sleep(_RETRY_SECONDS)

    async def send_back(self, sequence: Sequence) -> int:
        assert sequence.prefilled_on is not None and sequence.addrs is not None
        full = sequence.computed // self._pool.layout.block_tokens
        if full == 0:
            return 0
        done = await self._pool.transfer_with_insert(
            sequence.prefilled_on,
            sequence.buffer[: full * self._pool.layout.block_tokens],
            sequence.addrs[:full],
            sequence.namespace,
            origin=Origin.BACKFLOW,
        )
        return done.bytes

    async def _send(
        self,
        sequence: Sequence,
        attachment: Attachment,
        *,
        with_insert: bool,
        mode: TransferMode | None = None,
        ready: LayerGate | None = None,
    ) -> Transferred:
        assert sequence.decode_on is not None and sequence.addrs is not None
        peer, addrs, prompt = sequence.decode_on, sequence.addrs, sequence.buffer[: sequence.prompt_length]
        if not with_insert:
            return await self._pool.transfer(peer, addrs, attachment=attachment, mode=mode, ready=ready)
        return await self._pool.transfer_with_insert(
            peer,
            prompt,
            addrs,
            sequence.namespace,
            origin=Origin.PEER,
            attachment=attachment,
            mode=mode,
            ready=ready,
        )


class NoPeers:
    """The carrier of an instance that stands alone; asking it to carry is refused."""

    async def hand_over(
        self, sequence: Sequence, *, with_insert: bool, head: HeadStart | None = None
    ) -> Delivered:
        raise PeerLost(f"{sequence.decode_on} is unknown to an instance without peers")

    async def send_ahead(self, sequence: Sequence, blocks: int) -> Transferred:
        raise PeerLost(f"{sequence.decode_on} is unknown to an instance without peers")

    async def send_back(self, sequence: Sequence) -> int:
        raise PeerLost(f"{sequence.prefilled_on} is unknown to an instance without peers")
