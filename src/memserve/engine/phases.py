"""The paper's milestones as one table (MemServe, section 5): what each instance does with KV, and when.

Pure. The engine reads a row and acts on its columns; there is no branch on a row's name anywhere.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Handoff(enum.Enum):
    """How a prefilled prompt reaches the decode instance."""

    NONE = "none"
    TRANSFER = "transfer"
    TRANSFER_WITH_INSERT = "transfer_with_insert"


@dataclass(frozen=True, slots=True)
class Phases:
    """One row. A colocated instance has nobody to hand over to, so only the two inserts concern it."""

    name: str
    insert_after_prefill: bool
    handoff: Handoff
    insert_after_decode: bool
    backflow: bool

    @property
    def reuses(self) -> bool:
        """Whether prompts are looked up in the pool's index at all."""
        return self.insert_after_prefill or self.insert_after_decode


_TABLE = (
    Phases("pd-basic", False, Handoff.TRANSFER, False, False),
    Phases("pd-caching-1", True, Handoff.TRANSFER, False, False),
    Phases("pd-caching-2", True, Handoff.TRANSFER_WITH_INSERT, True, False),
    Phases("pd-caching-3", True, Handoff.TRANSFER_WITH_INSERT, True, True),
    Phases("colocated", True, Handoff.NONE, True, False),
)
PHASES = {row.name: row for row in _TABLE}
