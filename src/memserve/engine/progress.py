"""Hears on the event loop how far a running forward pass is. Polls nothing, takes none of the pass's time."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from memserve.engine.runners.base import LayerSignal


class LayerListener:
    """An eventfd and what is to be called when a pass adds to it. For one pass at a time."""

    def __init__(self) -> None:
        self._fd = -1
        self._layers = 0
        self._heard: Callable[[int], None] | None = None

    def start(self, every: int, heard: Callable[[int], None]) -> LayerSignal:
        """What to give to the next pass; ``heard(n)`` is called when it has done n layers of its tiles."""
        if self._fd < 0:
            self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._layers, self._heard = 0, heard
        asyncio.get_running_loop().add_reader(self._fd, self._read)
        return LayerSignal(self._fd, every)

    def stop(self) -> None:
        """The pass is over. Harmless if none was heard."""
        if self._heard is not None:
            self._heard = None
            asyncio.get_running_loop().remove_reader(self._fd)
            self._take()

    def close(self) -> None:
        """Let go of the descriptor; no pass uses it any more."""
        self.stop()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read(self) -> None:
        self._layers += self._take()
        if self._heard is not None:
            self._heard(self._layers)

    def _take(self) -> int:
        try:
            return os.eventfd_read(self._fd)
        except BlockingIOError:
            return 0
