"""Pinned prompts: cached KV that stays on the device until a deadline. Pure; frees nothing itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from memserve.core.types import Namespace, Tokens
from memserve.mempool.address import Addresses

PINNED_SHARE = 0.5
"""How much of the device pins may hold in all: what is pinned, requests cannot use."""


@dataclass(frozen=True, slots=True, eq=False)
class Pin:
    """One reference to each of ``addrs``, which hold ``tokens``, until ``deadline`` (clock seconds)."""

    namespace: Namespace
    tokens: Tokens
    addrs: Addresses
    deadline: float


class PinTable:
    """Pins by what they pin; at most ``limit`` different blocks in all."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._pins: dict[tuple[Namespace, bytes], Pin] = {}

    def __iter__(self) -> Iterator[Pin]:
        return iter(list(self._pins.values()))

    def blocks_with(self, addrs: Addresses) -> int:
        """Different blocks that would be pinned with ``addrs``."""
        return len(np.unique(np.concatenate([addrs.packed, *(pin.addrs.packed for pin in self)])))

    @property
    def blocks(self) -> int:
        """Different blocks that are pinned."""
        parts = [pin.addrs.packed for pin in self]
        return len(np.unique(np.concatenate(parts))) if parts else 0

    def add(self, pin: Pin) -> Pin | None:
        """Remember a pin; returns the one for the same tokens that it replaces."""
        replaced = self.take(pin.namespace, pin.tokens)
        self._pins[_key(pin.namespace, pin.tokens)] = pin
        return replaced

    def take(self, namespace: Namespace, tokens: Tokens) -> Pin | None:
        """Forget a pin and return it; None if there is none."""
        return self._pins.pop(_key(namespace, tokens), None)


def _key(namespace: Namespace, tokens: Tokens) -> tuple[Namespace, bytes]:
    return namespace, tokens.tobytes()
