"""What a pool asks of whoever moves its blocks to other pools."""

from __future__ import annotations

import asyncio
from typing import Protocol

from memserve.core.messages import Member
from memserve.core.types import InstanceId, Namespace, Tokens
from memserve.mempool.address import Addresses, Origin, Tier
from memserve.mempool.layer_gate import LayerGate
from memserve.mempool.modes import TransferMode
from memserve.mempool.results import Freed, Transferred

Attachment = bytes | asyncio.Future[bytes]
"""What a transfer's taker is told; a future where that is known only once all layers are computed."""


class Transport(Protocol):
    """Moves blocks to other pools; contracts as in ``MemPool``, which hands its calls down."""

    def set_peers(self, members: tuple[Member, ...]) -> None: ...

    async def transfer(
        self,
        peer: InstanceId,
        src: Addresses,
        *,
        attachment: Attachment,
        mode: TransferMode | None,
        ready: LayerGate | None,
        dst: Addresses | None,
    ) -> Transferred: ...

    async def transfer_with_insert(
        self,
        peer: InstanceId,
        tokens: Tokens,
        src: Addresses,
        namespace: Namespace,
        *,
        origin: Origin,
        attachment: Attachment,
        mode: TransferMode | None,
        ready: LayerGate | None,
        dst: Addresses | None,
    ) -> Transferred: ...

    async def allocate(self, peer: InstanceId, n: int, tier: Tier, seconds: float) -> Addresses: ...

    async def give_back(self, addrs: Addresses) -> Freed: ...
