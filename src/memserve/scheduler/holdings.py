"""What a match in the prompt trees tells: instances by how much of a prompt they hold, or soon will.

Instances are numbered, so that a thousand holders of one prefix are one integer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple

from memserve.core.types import InstanceId

_NOBODY = InstanceId("")
_BIT_OF_DIGIT = bytes.maketrans(b"01", b"\x00\x01")


@dataclass(frozen=True, slots=True)
class Numbering:
    """Bit number of each instance; replaced, never changed, so that old ``Holdings`` stay true."""

    names: tuple[InstanceId, ...]
    numbers: dict[InstanceId, int]


class Numbers:
    """Gives instances their numbers, small ones: those of dismissed instances are given again."""

    def __init__(self) -> None:
        self.now = _numbered([])

    def number(self, instance: InstanceId) -> int | None:
        """The number of ``instance``, None if it has none."""
        return self.now.numbers.get(instance)

    def enlist(self, instance: InstanceId) -> int:
        """The number of ``instance``, its own until it is dismissed."""
        number = self.now.numbers.get(instance)
        if number is not None:
            return number
        names = list(self.now.names)
        free = names.index(_NOBODY) if _NOBODY in names else len(names)
        names[free : free + 1] = [instance]
        self.now = _numbered(names)
        return free

    def dismiss(self, instance: InstanceId) -> None:
        """Its number is free; every tree has dropped the instance by now."""
        if instance in self.now.numbers:
            self.now = _numbered([_NOBODY if name == instance else name for name in self.now.names])


def _numbered(names: list[InstanceId]) -> Numbering:
    return Numbering(tuple(names), {name: n for n, name in enumerate(names) if name != _NOBODY})


class Tier(NamedTuple):
    """The instances in ``mask`` hold exactly ``tokens`` tokens of the prompt."""

    tokens: int
    mask: int
    numbering: Numbering

    def instances(self) -> Iterator[InstanceId]:
        """Their names, in no meaningful order."""
        return compress(self.numbering.names, self._digits())

    def numbered(self) -> Iterator[tuple[int, InstanceId]]:
        """Their numbers and names."""
        return compress(enumerate(self.numbering.names), self._digits())

    def _digits(self) -> bytes:
        return bin(self.mask)[:1:-1].encode().translate(_BIT_OF_DIGIT)


class Holdings(NamedTuple):
    """Tokens of one prompt that each instance holds; those that hold nothing do not occur.

    Kept as a few ``tiers``, longest first, because thousands of instances may share a short prefix.
    ``coming``, likewise, is what instances will hold as soon as they have prefilled what was sent to them:
    not before their line of prefills has come to its end. It may be less than what they hold.
    ``lowered`` are those of which a part of what they hold lies below the device, in host memory or on disk,
    by what lies on the device, perhaps 0 tokens. The others have all of it there.
    """

    tiers: tuple[Tier, ...] = ()
    coming: tuple[Tier, ...] = ()
    lowered: tuple[Tier, ...] = ()

    def tokens(self, instance: InstanceId) -> int:
        """What ``instance`` holds, 0 if nothing."""
        if not self.tiers:
            return 0
        number = self.tiers[0].numbering.numbers.get(instance)
        bit = 0 if number is None else 1 << number
        return next((tier.tokens for tier in self.tiers if tier.mask & bit), 0)

    def on_device(self, instance: InstanceId) -> int:
        """What of it ``instance`` has on its device."""
        if self.lowered:
            number = self.lowered[0].numbering.numbers.get(instance)
            bit = 0 if number is None else 1 << number
            for tier in self.lowered:
                if tier.mask & bit:
                    return tier.tokens
        return self.tokens(instance)

    def device_tiers(self) -> tuple[Tier, ...]:
        """As ``tiers``, of what lies on devices: what can be sent to others."""
        if not self.lowered:
            return self.tiers
        some = masks_of(self.lowered)
        whole = (tier._replace(mask=tier.mask & ~some) for tier in self.tiers)
        return merge_tiers((*whole, *(tier for tier in self.lowered if tier.tokens)))

    def by_instance(self) -> dict[InstanceId, int]:
        """The same as a plain dictionary."""
        return {name: tier.tokens for tier in self.tiers for name in tier.instances()}

    def expected(self) -> Holdings:
        """What instances will hold when a request's turn comes there: what they do, and what is coming."""
        if not self.coming:
            return self
        tiers = merge_tiers((*self.tiers, *self.coming))
        if not self.lowered:
            return Holdings(tiers)
        # Who computes a prompt has all of it on the device afterwards.
        some = masks_of(self.lowered)
        computed = (tier._replace(mask=tier.mask & some) for tier in self.coming)
        return Holdings(tiers, lowered=short_of(tiers, merge_tiers((*self.lowered, *computed)), some))


def merge_tiers(tiers: Iterable[Tier]) -> tuple[Tier, ...]:
    """One tier per instance, its longest; longest first. All have the same numbering."""
    merged: list[Tier] = []
    seen = 0
    for tier in sorted(tiers, key=_tokens_of, reverse=True):
        fresh = tier.mask & ~seen
        if fresh:
            merged.append(tier._replace(mask=fresh))
            seen |= fresh
    return tuple(merged)


def masks_of(tiers: Iterable[Tier]) -> int:
    """Everyone who is in one of them."""
    mask = 0
    for tier in tiers:
        mask |= tier.mask
    return mask


def short_of(held: tuple[Tier, ...], on_device: tuple[Tier, ...], among: int) -> tuple[Tier, ...]:
    """Those of the mask ``among`` that hold more than they have ``on_device``, by what they have there.

    Both are longest first.
    """
    short: list[Tier] = []
    beyond = at = 0
    for tier in on_device:
        while at < len(held) and held[at].tokens > tier.tokens:
            beyond |= held[at].mask
            at += 1
        if mask := tier.mask & among & beyond:
            short.append(tier._replace(mask=mask))
    nothing = masks_of(held) & among & ~masks_of(on_device)
    if nothing:
        short.append(Tier(0, nothing, held[0].numbering))
    return tuple(short)


def _tokens_of(tier: Tier) -> int:
    return tier.tokens
