"""Moves a sequence's KV between instances: P to D after prefill, D to P after decode.

Knows who the peers are and how long to try; MemPool knows how blocks travel.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from memserve.core.clock import Clock
from memserve.core.errors import OutOfBlocks, Overloaded, PeerLost
from memserve.core.messages import Member
from memserve.core.types import InstanceId
from memserve.engine.sequence import Sequence, to_adoption
from memserve.mempool.address import Origin
from memserve.mempool.pool import MemPool

_RETRY_SECONDS = 0.02
"""Pause before asking a full receiver again; it frees blocks once per finished request."""


class Carrier(Protocol):
    """What the engine asks of KV transport."""

    async def hand_over(self, sequence: Sequence, *, with_insert: bool) -> None:
        """Give a prefilled sequence to ``sequence.decode_on``. Raises ``MemServeError`` if it stays here."""

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

    async def hand_over(self, sequence: Sequence, *, with_insert: bool) -> None:
        assert sequence.decode_on is not None and sequence.addrs is not None
        attachment = to_adoption(sequence, self._instance)
        deadline = self._clock.now() + self._timeout
        while True:
            try:
                await self._send(sequence, attachment, with_insert=with_insert)
                return
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

    async def _send(self, sequence: Sequence, attachment: bytes, *, with_insert: bool) -> None:
        assert sequence.decode_on is not None and sequence.addrs is not None
        if with_insert:
            await self._pool.transfer_with_insert(
                sequence.decode_on,
                sequence.buffer[: sequence.computed],
                sequence.addrs,
                sequence.namespace,
                origin=Origin.PEER,
                attachment=attachment,
            )
        else:
            await self._pool.transfer(sequence.decode_on, sequence.addrs, attachment=attachment)


class NoPeers:
    """The carrier of an instance that stands alone; asking it to carry is refused."""

    async def hand_over(self, sequence: Sequence, *, with_insert: bool) -> None:
        raise PeerLost(f"{sequence.decode_on} is unknown to an instance without peers")

    async def send_back(self, sequence: Sequence) -> int:
        raise PeerLost(f"{sequence.prefilled_on} is unknown to an instance without peers")
