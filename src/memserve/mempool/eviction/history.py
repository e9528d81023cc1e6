"""What became of prefixes, cached still or not: a bounded table of fingerprints. Pure.

It remembers ``CHUNK_BLOCKS`` blocks at a time, at fixed distances from a prompt's start. A chunk's
fingerprint covers every eighth token before it and some of its first block. That may take two prompts that
differ in a word for one, which costs a statistic, never a wrong block.
"""

from __future__ import annotations

import zlib

import numpy as np

from memserve._native import recall_prefix
from memserve.core.types import Namespace, Tokens

CHUNK_BLOCKS = 32
"""So many that the table is small, so few that prompts seldom part within a chunk."""
_PLACE_BYTES = 16
MOST_USES = 255
"""Uses that can be remembered."""


Past = tuple[int, int, int, float]
"""So many consecutive chunks (first) have the same uses, follows and stamp; see ``usage.Run``."""


class PrefixHistory:
    """Room for ``capacity`` chunks, rounded up to a power of two, of blocks of ``block_tokens`` tokens.

    Direct-mapped: a new chunk takes the place of an old one, so every operation costs the same.
    """

    def __init__(self, capacity: int, block_tokens: int) -> None:
        self._span = CHUNK_BLOCKS * block_tokens
        self._table = np.zeros(_PLACE_BYTES << max(capacity - 1, 1).bit_length(), np.uint8)
        self._seeds: dict[Namespace, int] = {}

    def recall(self, namespace: Namespace, tokens: Tokens, follows: int, now: float) -> list[Past]:
        """What is remembered of the chunks of ``tokens`` (int32[n]) from the first to the last known one.

        One that was overwritten is taken to be like the next, which cannot have been here without it. From
        now on all of them were used once more; those that are new follow what was used ``follows`` times.
        """
        return recall_prefix(self._table, tokens, self._span, self._seed(namespace), follows, now)

    def _seed(self, namespace: Namespace) -> int:
        seed = self._seeds.get(namespace)
        if seed is None:
            text = "\0".join((namespace.model, namespace.adapter, namespace.salt))
            seed = self._seeds[namespace] = zlib.crc32(text.encode()) << 32 | 1
        return seed
