"""Sends peers what is cached here of other instances' prompts, when the scheduler asks for it.

Knows the pool and who asked; who computes what afterwards, others know.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import numpy as np

from memserve.core.errors import MemServeError
from memserve.core.messages import Message, PrefixSent, SendPrefix
from memserve.core.types import InstanceId, unpack_tokens
from memserve.mempool.address import Origin, Tier
from memserve.mempool.pool import MemPool

log = logging.getLogger(__name__)


class PrefixSender:
    """Each send is a task of its own; what it says in the end goes to ``emit``."""

    def __init__(self, instance: InstanceId, pool: MemPool, emit: Callable[[Message], None]) -> None:
        self._instance = instance
        self._pool = pool
        self._emit = emit
        self._under_way: set[asyncio.Task[None]] = set()

    def send(self, asked: SendPrefix) -> None:
        """Start sending; ends with a ``PrefixSent``, however it ends."""
        task = asyncio.get_running_loop().create_task(self._send(asked))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def close(self) -> None:
        """End what is under way."""
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _send(self, asked: SendPrefix) -> None:
        tokens = unpack_tokens(asked.tokens)
        sent = PrefixSent(asked.request, self._instance, 0, 0, 0.0, "nothing of it is cached any more")
        try:
            with self._pool.match(tokens, asked.namespace) as found:
                # What lies below the device would have to come up first, which takes room from others.
                on_device = int(np.count_nonzero(found.addrs.tiers == Tier.DEVICE))
                covered = on_device * self._pool.layout.block_tokens
                if covered:
                    done = await self._pool.transfer_with_insert(
                        asked.to,
                        tokens[:covered],
                        found.addrs[:on_device],
                        asked.namespace,
                        origin=Origin.PEER,
                    )
                    sent = PrefixSent(asked.request, self._instance, covered, done.bytes, done.seconds)
        except MemServeError as error:
            log.info("a prefix did not go to %s: %s", asked.to, error)
            sent = PrefixSent(asked.request, self._instance, 0, 0, 0.0, str(error))
        self._emit(sent)
