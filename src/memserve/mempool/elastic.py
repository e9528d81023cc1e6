"""How large each tier is to be: adds blocks, and takes them out of use while requests go on.

Nothing has to move for a tier to shrink: blocks are retired wherever they lie, free ones first, then the
coldest historical ones, and their pages go back to the system one by one.
"""

from __future__ import annotations

from memserve.core.errors import ConfigError, InvalidRequest
from memserve.core.types import InstanceId
from memserve.mempool.address import MAX_BLOCKS, Tier
from memserve.mempool.arena import Arena, Extent
from memserve.mempool.blocks import BlockTable
from memserve.mempool.results import Resized
from memserve.mempool.shelf import DiskShelf
from memserve.mempool.tiers import Tiers


class Elastic:
    """Resizes the tiers of one pool. ``surplus`` is how many blocks of each tier are still to be retired."""

    def __init__(
        self, table: BlockTable, tiers: Tiers, arena: Arena, shelf: DiskShelf | None, instance: InstanceId
    ) -> None:
        self.surplus = [0 for _ in Tier]
        self._table = table
        self._tiers = tiers
        self._arena = arena
        self._shelf = shelf
        self._instance = instance

    def resize(self, tier: Tier, blocks: int) -> Resized:
        """See ``LocalPool.resize``."""
        if blocks < (1 if tier is Tier.DEVICE else 0):
            raise InvalidRequest(f"the {tier.name.lower()} tier cannot have {blocks} blocks", field="blocks")
        more = blocks - self._table.capacity[tier]
        if more > 0:
            self._grow(more, tier)
        self.surplus[tier] = max(0, -more)
        self.settle()
        return Resized(self._table.capacity[tier] - self.surplus[tier], self.surplus[tier])

    def settle(self) -> None:
        """Retire what is not held any more of the blocks that are too many."""
        if any(self.surplus):
            for tier in Tier:
                self._shrink(tier)

    def _grow(self, more: int, tier: Tier) -> None:
        if tier is Tier.DISK and self._shelf is None:
            raise ConfigError("this pool has no directory for a disk tier; give one when it starts")
        if self._table.blocks + more > MAX_BLOCKS:
            raise InvalidRequest(f"a pool cannot have more than {MAX_BLOCKS} blocks", field="blocks")
        retired = self._table.retired_in(tier)
        added = Extent(self._table.blocks, max(0, more - retired))
        if added.blocks and tier is not Tier.DISK:
            self._arena.grow(added, f"memserve-{self._instance}-{tier.name.lower()}")
        if added.blocks and self._shelf is not None and tier is Tier.DISK:
            self._shelf.grow(added)
        if added.blocks:
            self._table.grow(added.blocks, tier)
        if more > added.blocks and tier is not Tier.DISK:
            self._arena.reused += 1
        self._table.bring_back(more - added.blocks, tier)

    def _shrink(self, tier: Tier) -> None:
        if not self.surplus[tier]:
            return
        missing = self.surplus[tier] - self._table.free_in(tier)
        if missing > 0 and self._table.historical_in(tier):
            self._tiers.shed(missing, tier)
        count = min(self.surplus[tier], self._table.free_in(tier))
        if not count:
            return
        numbers = self._table.retire(count, tier)
        self.surplus[tier] -= count
        if tier is not Tier.DISK:
            self._arena.give_back(numbers)
        elif self._shelf is not None:
            self._shelf.give_back(numbers)
