"""The global prompt tree: which instances hold which prefix, as far as their pools have told.

Knows names of instances, tokens and nothing else: no load, no role, no time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple

from memserve.core.radix import Node, Path, RadixTree
from memserve.core.types import InstanceId, Namespace, Tokens
from memserve.scheduler.holders import Holders

_NOBODY = InstanceId("")
_BIT_OF_DIGIT = bytes.maketrans(b"01", b"\x00\x01")


@dataclass(frozen=True, slots=True)
class _Numbering:
    """Bit number of each instance; replaced, never changed, so that old ``Holdings`` stay true."""

    names: tuple[InstanceId, ...]
    numbers: dict[InstanceId, int]

    def with_name(self, instance: InstanceId) -> _Numbering:
        """Give ``instance`` the first free number."""
        names = list(self.names)
        free = names.index(_NOBODY) if _NOBODY in names else len(names)
        names[free : free + 1] = [instance]
        return _numbered(names)

    def without_name(self, instance: InstanceId) -> _Numbering:
        return _numbered([_NOBODY if name == instance else name for name in self.names])


def _numbered(names: list[InstanceId]) -> _Numbering:
    return _Numbering(tuple(names), {name: n for n, name in enumerate(names) if name != _NOBODY})


class Tier(NamedTuple):
    """The instances in ``mask`` hold exactly ``tokens`` tokens of the prompt."""

    tokens: int
    mask: int
    numbering: _Numbering

    def instances(self) -> Iterator[InstanceId]:
        """Their names, in no meaningful order."""
        return compress(self.numbering.names, self._digits())

    def numbered(self) -> Iterator[tuple[int, InstanceId]]:
        """Their numbers and names."""
        return compress(enumerate(self.numbering.names), self._digits())

    def _digits(self) -> bytes:
        return bin(self.mask)[:1:-1].encode().translate(_BIT_OF_DIGIT)


@dataclass(frozen=True, slots=True)
class Holdings:
    """Tokens of one prompt that each instance holds; those that hold nothing do not occur.

    Kept as a few ``tiers``, longest first, because thousands of instances may share a short prefix.
    """

    tiers: tuple[Tier, ...] = ()

    def tokens(self, instance: InstanceId) -> int:
        """What ``instance`` holds, 0 if nothing."""
        if not self.tiers:
            return 0
        number = self.tiers[0].numbering.numbers.get(instance)
        bit = 0 if number is None else 1 << number
        return next((tier.tokens for tier in self.tiers if tier.mask & bit), 0)

    def by_instance(self) -> dict[InstanceId, int]:
        """The same as a plain dictionary."""
        return {name: tier.tokens for tier in self.tiers for name in tier.instances()}


class GlobalPromptTree:
    """Prefixes by namespace, one bitmask of holders per compressed edge.

    Only whole blocks of ``block_tokens`` count; a rest is ignored, as the pools ignore it. What an
    instance holds is prefix-closed. Branches that nobody holds any more are pruned at once.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._trees: dict[Namespace, RadixTree[Holders]] = {}
        self._numbering = _numbered([])
        self._held_blocks: dict[InstanceId, int] = {}

    @property
    def nodes(self) -> int:
        """Compressed edges in all namespaces."""
        return sum(tree.size for tree in self._trees.values())

    def held_tokens(self, instance: InstanceId) -> int:
        """Tokens of all prefixes that ``instance`` holds, shared ones counted once."""
        return self._held_blocks.get(instance, 0) * self._block_tokens

    def match(self, namespace: Namespace, tokens: Tokens) -> Holdings:
        """Who holds how much of ``tokens`` (contiguous int32[n])."""
        tree = self._trees.get(namespace)
        if tree is None:
            return Holdings()
        path = tree.walk(tokens)
        if not path.nodes:
            return Holdings()
        return Holdings(_longest_first(self._collect_tiers(tree, path)))

    def enlist(self, instance: InstanceId) -> int:
        """The number of ``instance``, its own until it is dropped. Small: free numbers are given again."""
        self._bit_for(instance)
        return self._numbering.numbers[instance]

    def store(self, instance: InstanceId, namespace: Namespace, tokens: Tokens) -> None:
        """``instance`` holds all whole blocks of ``tokens`` (contiguous int32[n]) from now on."""
        blocks = len(tokens) // self._block_tokens
        if not blocks:
            return
        tree = self._trees.setdefault(namespace, RadixTree(self._block_tokens))
        bit = self._bit_for(instance)
        path = tree.walk(tokens)
        held = _credit(tree, path, bit)
        if path.blocks < blocks:
            tree.extend(path, tokens, Holders(bit))
        self._held_blocks[instance] = self._held_blocks.get(instance, 0) + blocks - held

    def remove(self, instance: InstanceId, namespace: Namespace, tokens: Tokens, keep: int) -> None:
        """Of the path ``tokens`` (contiguous int32[n]) ``instance`` holds only the first ``keep`` tokens.

        Everything it held below is gone with that, also on branches that leave the path later.
        """
        number = self._numbering.numbers.get(instance)
        tree = self._trees.get(namespace)
        if number is None or tree is None:
            return
        kept = keep // self._block_tokens
        path = tree.walk(tokens[: (kept + 1) * self._block_tokens])
        if path.blocks > kept:
            freed = _release(tree, path.nodes[-1], 1 << number, path.tail - 1)
            self._held_blocks[instance] -= freed
        self._forget_if_empty(namespace)

    def drop_instance(self, instance: InstanceId) -> None:
        """Forget ``instance`` and everything it holds."""
        self.forget(instance)
        self._held_blocks.pop(instance, None)
        self._numbering = self._numbering.without_name(instance)

    def forget(self, instance: InstanceId) -> None:
        """``instance`` holds nothing: one pass over the tree's edges. It keeps its number."""
        number = self._numbering.numbers.get(instance)
        if number is None:
            return
        for namespace, tree in list(self._trees.items()):
            tops = [node for node in tree.nodes() if node.parent is None]
            for node in tops:
                _release(tree, node, 1 << number, 0)
            self._forget_if_empty(namespace)
        self._held_blocks[instance] = 0

    def check(self) -> None:
        """Raise ``AssertionError`` if masks, tree and counts contradict each other. Costs a full pass."""
        held = dict.fromkeys(self._held_blocks, 0)
        for tree in self._trees.values():
            tree.check()
            assert tree.size, "an empty namespace was kept"
            for node in tree.nodes():
                self._check_node(tree, node, held)
        assert held == self._held_blocks, f"{self._held_blocks} should be {held}"

    def _check_node(self, tree: RadixTree[Holders], node: Node[Holders], held: dict[InstanceId, int]) -> None:
        size, holders = tree.blocks_of(node), node.payload
        assert holders.longest(size) == size, "an edge is longer than what anybody holds"
        above = -1 if node.parent is None else node.parent.payload.full
        assert holders.mask & ~above == 0, "somebody holds an edge without the one above"
        seen = holders.full
        for depth, mask in holders.ends.items():
            assert 0 < depth < size, f"a holding ends after {depth} of {size} blocks"
            assert mask, "an end that belongs to nobody"
            assert seen & mask == 0, "an instance occurs twice on an edge"
            seen |= mask
        for name in Tier(0, seen, self._numbering).instances():
            number = self._numbering.numbers.get(name)
            assert number is not None, "a bit that belongs to no instance"
            held[name] += holders.depth(1 << number, size)

    def _bit_for(self, instance: InstanceId) -> int:
        number = self._numbering.numbers.get(instance)
        if number is None:
            self._numbering = self._numbering.with_name(instance)
            number = self._numbering.numbers.get(instance)
            assert number is not None
        return 1 << number

    def _collect_tiers(self, tree: RadixTree[Holders], path: Path[Holders]) -> list[Tier]:
        page, numbering = self._block_tokens, self._numbering
        tiers: list[Tier] = []
        above, at = path.nodes[0].payload.mask, 0
        last = path.nodes[-1]
        for node in path.nodes:
            holders = node.payload
            matched = path.tail if node is last else tree.blocks_of(node)
            here = holders.full
            if here != above:
                for depth, mask in holders.ends.items():
                    tiers.append(Tier((at + min(depth, matched)) * page, mask, numbering))
                    above &= ~mask
                if above != here:
                    tiers.append(Tier(at * page, above & ~here, numbering))
            at += matched
            above = here
        if above:
            tiers.append(Tier(at * page, above, numbering))
        return tiers

    def _forget_if_empty(self, namespace: Namespace) -> None:
        if not self._trees[namespace].size:
            del self._trees[namespace]


def _longest_first(tiers: list[Tier]) -> tuple[Tier, ...]:
    if len(tiers) > 1:
        tiers.sort(key=_tier_tokens, reverse=True)
    return tuple(tiers)


def _tier_tokens(tier: Tier) -> int:
    return tier.tokens


def _credit(tree: RadixTree[Holders], path: Path[Holders], bit: int) -> int:
    """Make ``bit`` hold all of ``path``; return the blocks of it that it held before."""
    held = 0
    last = path.nodes[-1] if path.nodes else None
    for node in path.nodes:
        size = tree.blocks_of(node)
        matched = path.tail if node is last else size
        if node.payload.full & bit:
            held += matched
            continue
        before = node.payload.depth(bit, size)
        held += min(before, matched)
        if before < matched:
            node.payload.set_depth(bit, matched, size)
    return held


def _longest_held(tree: RadixTree[Holders], node: Node[Holders], bit: int) -> int:
    """Blocks of ``node``'s edge that ``bit`` holds, if it holds nothing below; else 0."""
    if any(child.payload.mask & bit for child in node.children.values()):
        return 0
    return node.payload.depth(bit, tree.blocks_of(node))


def _release(tree: RadixTree[Holders], node: Node[Holders], bit: int, keep: int) -> int:
    """Leave ``bit`` only the first ``keep`` blocks of ``node``'s edge and nothing below it.

    Prunes what nobody holds any more. Returns the number of blocks given up.
    """
    freed = 0
    waiting, unheld = [(node, keep)], []
    while waiting:
        lower, left = waiting.pop()
        size = tree.blocks_of(lower)
        before = lower.payload.depth(bit, size)
        if before <= left:
            continue
        lower.payload.set_depth(bit, left, size)
        freed += before - left
        if before == size:
            below = lower.children.values()
            waiting.extend((child, 0) for child in below if child.payload.full & bit or child.payload.ends)
        if not lower.payload.full:
            unheld.append(lower)
    for lower in unheld:
        if lower.attached:
            tree.truncate(lower, lower.payload.longest(tree.blocks_of(lower)))
    return freed
