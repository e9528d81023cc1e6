"""Tells a transfer which layers of its blocks are computed, so that it can start before all are."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from memserve.core.errors import TransferAborted


class LayerGate:
    """Open for the first ``layers`` layers of a transfer's blocks. One producer, any number of transfers.

    The producer may be any thread; what it has written before ``open`` is there for whoever came through.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 0
        self._failure: str | None = None
        self._waiting: set[Callable[[], None]] = set()

    @property
    def layers(self) -> int:
        """How many layers are computed."""
        return self._open

    def open(self, layers: int) -> None:
        """The first ``layers`` layers of all blocks are computed. They stay so."""
        with self._lock:
            self._open = max(self._open, layers)
        self._wake()

    def fail(self, reason: str) -> None:
        """The other layers will not be computed: transfers that need them are aborted."""
        with self._lock:
            self._failure = reason
        self._wake()

    async def wait(self, layers: int) -> None:
        """Until the first ``layers`` layers are computed. Raises ``TransferAborted`` if they will not be."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(changed.set)

        with self._lock:
            self._waiting.add(wake)
        try:
            while self._open < layers:
                if self._failure is not None:
                    raise TransferAborted(f"layer {self._open} was not computed: {self._failure}")
                await changed.wait()
                changed.clear()
        finally:
            with self._lock:
                self._waiting.discard(wake)

    def _wake(self) -> None:
        with self._lock:
            for wake in self._waiting:
                wake()
