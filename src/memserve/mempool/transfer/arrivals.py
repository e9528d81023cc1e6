"""One transfer's bytes on their way in: which have arrived, their checksums, and who still writes.

Three kinds, by who writes: ``Shared`` memory is written by the sender, a ``Remote`` arrival by a network in
its name, a ``Streamed`` one by a thread here.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from memserve._native import checksum_blocks
from memserve.core.errors import MemServeError, PeerLost, ProtocolError
from memserve.mempool.arena import UnitMemory

Checksums = NDArray[np.uint64]
_AT_ONCE_BYTES = 1 << 20
"""Fewer are verified in the event loop: quicker than waking a thread."""


class Arrival(Protocol):
    """What the receiver asks of a transfer's arrival, in the event loop."""

    trusted: bool
    """Whether the sender writes, and so has to say that it has stopped."""

    def take_progress(self) -> bool:
        """Whether anything has arrived since this was last asked."""

    async def checksums(self) -> Checksums:
        """Of all units, as they lie in memory, once the sender has sent all: uint64[n]."""

    def stop(self, error: MemServeError, then: Callable[[], None]) -> None:
        """The transfer has failed with ``error``; call ``then`` once nobody here writes any more.

        Of several calls the first counts.
        """


class SharedArrival:
    """Units that the sender writes; verified piece by piece as it says that they are written."""

    trusted = True

    def __init__(self, pointers: NDArray[np.uint64], unit_bytes: int, workers: Executor) -> None:
        self._pointers = pointers
        self._unit_bytes = unit_bytes
        self._workers = workers
        self._verified = 0
        self._parts: list[asyncio.Future[Checksums]] = []
        self._progress = False
        self._stopped = False

    def written(self, first: int, units: int) -> None:
        """The sender has written ``units`` units from ``first`` on. Verifies them in the background.

        They must come in order; what does not is verified in the end, with the rest.
        """
        if first != self._verified or units < 1 or first + units > len(self._pointers):
            return
        self._progress = True
        self._verified += units
        part = self._pointers[first : first + units]
        loop = asyncio.get_running_loop()
        self._parts.append(loop.run_in_executor(self._workers, checksum_blocks, part, self._unit_bytes))

    def take_progress(self) -> bool:
        progress, self._progress = self._progress, False
        return progress

    async def checksums(self) -> Checksums:
        rest = self._pointers[self._verified :]
        if len(rest) * self._unit_bytes <= _AT_ONCE_BYTES:
            last = checksum_blocks(rest, self._unit_bytes)
            return np.concatenate([*(await asyncio.gather(*self._parts)), last])
        self.written(self._verified, len(rest))
        return np.concatenate(await asyncio.gather(*self._parts))

    def stop(self, error: MemServeError, then: Callable[[], None]) -> None:
        if not self._stopped:
            self._stopped = True
            then()


class RemoteArrival(SharedArrival):
    """Units that the sender has a network write. What a lost sender has begun may come after its end.

    ``call_when_silent`` calls back once that cannot be any more.
    """

    def __init__(
        self,
        pointers: NDArray[np.uint64],
        unit_bytes: int,
        workers: Executor,
        call_when_silent: Callable[[Callable[[], None]], None],
    ) -> None:
        super().__init__(pointers, unit_bytes, workers)
        self._call_when_silent = call_when_silent

    def stop(self, error: MemServeError, then: Callable[[], None]) -> None:
        if isinstance(error, PeerLost) and not self._stopped:
            self._stopped = True
            self._call_when_silent(then)
        else:
            super().stop(error, then)


class StreamedArrival:
    """Units that a stream's thread writes into ``memory``, and verifies at once.

    The thread calls ``begin`` and ``finish``; between the two the blocks cannot be freed.
    """

    trusted = False

    def __init__(self, memory: UnitMemory) -> None:
        self._memory = memory
        self._units = len(memory.pointers)
        self._checksums = np.zeros(self._units, np.uint64)
        self._arrived = 0
        self._seen = 0
        self._lock = threading.Lock()
        self._writing = False
        self._stopped = False
        self._when_idle: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._complete: asyncio.Future[None] = self._loop.create_future()
        if not self._units:
            self._complete.set_result(None)

    # --- the stream's thread ---

    def begin(self, first: int, units: int, unit_bytes: int) -> list[memoryview] | None:
        """Where to write the next ``units`` units; None when the transfer is over. Then call ``finish``.

        Raises ``ProtocolError`` for units that are not the next ones, or of another size.
        """
        with self._lock:
            if self._stopped:
                return None
            if unit_bytes != self._memory.unit_bytes:
                raise ProtocolError(f"units of {unit_bytes} bytes came instead of {self._memory.unit_bytes}")
            if first != self._arrived or not 0 < units <= self._units - first:
                raise ProtocolError(
                    f"units {first} to {first + units} came when {self._arrived} of {self._units} had"
                )
            self._writing = True
        return self._memory.views(first, units)

    def finish(self, units: int) -> None:
        """The next ``units`` units are in place; 0 when the stream broke off instead."""
        if units:
            first = self._arrived
            part = self._memory.pointers[first : first + units]
            self._checksums[first : first + units] = checksum_blocks(part, self._memory.unit_bytes)
        with self._lock:
            self._writing = False
            self._arrived += units
            idle, complete = self._when_idle, self._arrived == self._units
        if idle is not None:
            self._loop.call_soon_threadsafe(idle)
        elif complete:
            self._loop.call_soon_threadsafe(self._announce)

    # --- the event loop ---

    def take_progress(self) -> bool:
        progress, self._seen = self._arrived != self._seen, self._arrived
        return progress

    async def checksums(self) -> Checksums:
        await asyncio.shield(self._complete)
        return self._checksums

    def stop(self, error: MemServeError, then: Callable[[], None]) -> None:
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            writing = self._writing
            if writing:
                self._when_idle = then
        if not self._complete.done():
            self._complete.set_exception(error)
            # Retrieved, in case that nobody waits for it.
            self._complete.exception()
        if not writing:
            then()

    def _announce(self) -> None:
        if not self._complete.done():
            self._complete.set_result(None)
