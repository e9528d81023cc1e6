"""Records on disk whose prompt is not indexed: after a restart, until somebody computes what they continue.

Pure. Their places count as free; who takes one for something else says so with ``forget``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from memserve.core.types import Namespace
from memserve.mempool.disk_record import Key, Record, child_key


@dataclass(frozen=True, slots=True)
class Orphan:
    """A record at a place of the disk tier; ``key`` names the prompt that ends with it."""

    place: int
    record: Record
    key: Key


class Orphans:
    """Orphans by place, and by the prompt that they continue."""

    def __init__(self) -> None:
        self._at: dict[int, Orphan] = {}
        self._below: dict[Key, dict[bytes, Orphan]] = {}

    def __len__(self) -> int:
        return len(self._at)

    @property
    def places(self) -> list[int]:
        return list(self._at)

    @property
    def namespaces(self) -> set[Namespace]:
        return {orphan.record.namespace for orphan in self._at.values()}

    def of(self, namespace: Namespace) -> list[int]:
        """The places of a namespace's orphans."""
        return [place for place, orphan in self._at.items() if orphan.record.namespace == namespace]

    def add(self, place: int, record: Record) -> int | None:
        """Remember a record; of two for the same tokens the last one. Returns the place of the other."""
        known = self.find(record.parent, record.tokens)
        if known is not None and known.record.sequence > record.sequence:
            return place
        if known is not None:
            self.forget(known.place)
        orphan = Orphan(place, record, child_key(record.parent, record.tokens))
        self._at[place] = orphan
        self._below.setdefault(record.parent, {})[record.tokens] = orphan
        return None if known is None else known.place

    def find(self, parent: Key, tokens: bytes) -> Orphan | None:
        """The orphaned block ``tokens`` after the prompt ``parent``."""
        return self._below.get(parent, {}).get(tokens)

    def forget(self, place: int) -> None:
        """This place holds, or will hold, something else. Unknown places are ignored."""
        orphan = self._at.pop(place, None)
        if orphan is None:
            return
        siblings = self._below[orphan.record.parent]
        del siblings[orphan.record.tokens]
        if not siblings:
            del self._below[orphan.record.parent]

    def chains(self, key: Key) -> list[list[Orphan]]:
        """What continues the prompt ``key``: a list of blocks for each longest one, oldest first."""
        found: list[list[Orphan]] = []
        waiting = [(orphan, 0) for orphan in self._children(key)]
        chain: list[Orphan] = []
        while waiting:
            orphan, depth = waiting.pop()
            chain[depth:] = [orphan]
            below = self._children(orphan.key)
            waiting.extend((child, depth + 1) for child in below)
            if not below:
                found.append(list(chain))
        found.sort(key=lambda blocks: blocks[-1].record.sequence)
        return found

    def _children(self, key: Key) -> Iterable[Orphan]:
        return self._below.get(key, {}).values()
