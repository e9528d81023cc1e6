"""The local prompt trees, one per namespace: which block holds the KV of which tokens. Pure.

Knows block numbers and in which tier an edge's blocks lie; whether a block is referenced is the block
table's business. An edge lies in one tier as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memserve.core.radix import Node, Path, RadixTree
from memserve.core.types import Namespace, Tokens
from memserve.mempool.address import BlockNumbers, Tier
from memserve.mempool.usage import Usage


class IndexEntry:
    """What an edge of a prompt tree carries: ``blocks`` int32[edge blocks] and their past in ``usage``.

    ``tier`` is where the blocks lie, ``lowered`` how many children lie further down.
    """

    __slots__ = ("blocks", "lowered", "namespace", "tier", "usage")

    def __init__(
        self, namespace: Namespace, blocks: NDArray[np.int32], usage: Usage, tier: Tier = Tier.DEVICE
    ) -> None:
        self.namespace = namespace
        self.blocks = blocks
        self.tier = tier
        self.lowered = 0
        self.usage = usage

    def split(self, at: int) -> IndexEntry:
        """Part of the radix tree's payload contract: keep the blocks before ``at``, return the rest."""
        lower = IndexEntry(self.namespace, _own(self.blocks[at:]), self.usage.split(at), self.tier)
        lower.lowered, self.lowered = self.lowered, 0
        self.blocks = _own(self.blocks[:at])
        return lower

    def shorten(self, at: int) -> None:
        """Part of the radix tree's payload contract: keep only the blocks before ``at``."""
        self.blocks = _own(self.blocks[:at])
        self.lowered = 0
        self.usage.shorten(at)

    def append(self, at: int, tail: IndexEntry) -> None:
        """Part of the radix tree's payload contract: the edge of ``at`` blocks grows by ``tail``'s."""
        assert self.tier is tail.tier, f"an edge in {self.tier} cannot grow by blocks in {tail.tier}"
        assert at == len(self.blocks), f"an edge of {at} blocks has {len(self.blocks)} block numbers"
        self.blocks = np.concatenate((self.blocks, tail.blocks))
        self.usage.append(tail.usage)


IndexNode = Node[IndexEntry]


class Found(NamedTuple):
    """The longest indexed prefix: the ``path`` on which it lies, and block numbers per edge, int32[n]."""

    edges: list[NDArray[np.int32]]
    path: Path[IndexEntry]

    @property
    def blocks(self) -> BlockNumbers:
        """All block numbers in one: int64[n]."""
        return _join(self.edges)


class Dropped(NamedTuple):
    """What a removal took out of the index.

    ``path`` holds the tokens of edges from the root to the first block that is gone: what begins with them
    has only its first ``keep`` tokens left. ``edges`` are the block numbers of what is gone: int32[n] each.
    """

    path: list[Tokens]
    keep: int
    edges: list[NDArray[np.int32]]


class PromptIndex:
    """Prompt trees by namespace; a tree exists while it holds something. ``borrows``: see ``RadixTree``."""

    def __init__(self, block_tokens: int, *, borrows: bool = False) -> None:
        self.block_tokens = block_tokens
        self._borrows = borrows
        self._trees: dict[Namespace, RadixTree[IndexEntry]] = {}
        self._lower: dict[int, IndexNode] = {}

    @property
    def blocks(self) -> int:
        """Blocks in all trees."""
        return sum(tree.blocks for tree in self._trees.values())

    @property
    def nodes(self) -> int:
        """Nodes of all trees."""
        return sum(tree.size for tree in self._trees.values())

    def find(self, namespace: Namespace, tokens: Tokens) -> Found:
        """The longest prefix of ``tokens`` (int32[n]), in whole blocks."""
        tree = self._trees.get(namespace)
        if tree is None:
            return Found([], Path([], 0, 0))
        path = tree.walk(tokens)
        edges = [node.payload.blocks for node in path.nodes]
        if edges:
            edges[-1] = edges[-1][: path.tail]
        return Found(edges, path)

    def holder_of(self, block: int) -> IndexNode | None:
        """The node whose edge lies in ``block``, a block below the device; None if it is not indexed."""
        return self._lower.get(block)

    def add(
        self,
        namespace: Namespace,
        tokens: Tokens,
        found: Found,
        blocks: BlockNumbers,
        usage: Usage,
        tier: Tier = Tier.DEVICE,
    ) -> IndexNode:
        """Index ``blocks`` for what ``tokens`` has beyond ``found``, a fresh answer of :meth:`find`.

        Returns the leaf that now ends the path.
        """
        tree = self._trees.get(namespace)
        if tree is None:
            tree = self._trees[namespace] = RadixTree(self.block_tokens, borrows=self._borrows)
        path = found.path
        parent = path.nodes[-1] if path.nodes else None
        if parent is None or (parent.payload.tier is tier is Tier.DEVICE):
            leaf = tree.extend(path, tokens, IndexEntry(namespace, blocks.astype(np.int32), usage, tier))
            self._note_lower(leaf)
            return leaf
        if path.tail < tree.blocks_of(parent):
            parent = self.split(parent, path.tail)
            path = Path([*path.nodes[:-1], parent], path.tail, path.blocks)
        entry = IndexEntry(namespace, blocks.astype(np.int32), usage, tier)
        leaf = tree.extend(path, tokens, entry, grow=parent.payload.tier is tier)
        if tier > parent.payload.tier:
            parent.payload.lowered += 1
        self._note_lower(leaf)
        return leaf

    def split(self, node: IndexNode, at: int) -> IndexNode:
        """Cut ``node``'s edge after ``at`` blocks; returns the new upper node, ``node`` is the lower one."""
        upper = self._trees[node.payload.namespace].split(node, at)
        self._note_lower(upper)
        return upper

    def place(self, node: IndexNode, blocks: BlockNumbers, tier: Tier) -> IndexNode:
        """Say that ``node``'s edge lies in other blocks, all in ``tier``. Returns the node in its place.

        It is another one, so that whoever chooses among the nodes of the old tier forgets it.
        """
        entry, parent = node.payload, node.parent
        assert len(blocks) == len(entry.blocks), "an edge keeps its length"
        self._forget_lower(entry)
        if parent is not None:
            upper = parent.payload.tier
            parent.payload.lowered += int(tier > upper) - int(entry.tier > upper)
        entry.blocks, entry.tier = blocks.astype(np.int32), tier
        entry.lowered = sum(child.payload.tier > tier for child in node.children.values())
        fresh = self._trees[entry.namespace].renew(node)
        self._note_lower(fresh)
        return fresh

    def path_tokens(self, node: IndexNode) -> Tokens:
        """All tokens from the root to the end of ``node``'s edge: int32[n]."""
        return self._trees[node.payload.namespace].path_tokens(node)

    def drop(self, node: IndexNode, keep: int) -> Dropped:
        """Take all but the first ``keep`` blocks of ``node``'s edge, and all below it, out of the index."""
        entry, above = node.payload, node.parent
        tree = self._trees[entry.namespace]
        path = [node.key[: (keep + 1) * self.block_tokens]]
        while above is not None:
            path.append(above.key)
            above = above.parent
        path.reverse()
        kept = sum([len(part) for part in path]) - self.block_tokens
        gone = [entry.blocks[keep:]] if keep else []
        if entry.tier is not Tier.DEVICE:
            self._forget_lower(entry, keep)
        for lower in tree.truncate(node, keep):
            if lower is not node:
                self._forget_lower(lower.payload)
            gone.append(lower.payload.blocks)
        if keep:
            entry.lowered = 0
        elif node.parent is not None:
            node.parent.payload.lowered -= int(entry.tier > node.parent.payload.tier)
        if tree.size == 0:
            del self._trees[entry.namespace]
        return Dropped(path, kept, gone)

    def exclusive_end(self, namespace: Namespace, tokens: Tokens) -> tuple[IndexNode, int] | None:
        """Where to :meth:`drop` so that ``tokens`` is forgotten but nothing that does not begin with it.

        None when nothing of it may go: it is not there, or what is left of it is shared.
        """
        tree = self._trees.get(namespace)
        path = tree.walk(tokens) if tree is not None else None
        if tree is None or path is None or path.blocks == 0:
            return None
        node = path.nodes[-1]
        whole = path.blocks == len(tokens) // self.block_tokens
        trimmed = not node.children and path.tail == tree.blocks_of(node)
        if not whole and not trimmed:
            return None
        while node.parent is not None and len(node.parent.children) == 1:
            node = node.parent
        return node, 0

    def paths(self) -> Iterator[tuple[Namespace, Tokens]]:
        """Every longest indexed path with its namespace."""
        for namespace, tree in self._trees.items():
            for leaf in tree.leaves():
                yield namespace, tree.path_tokens(leaf)

    def lowered(self) -> Iterator[tuple[Namespace, Tokens, int, Tier]]:
        """Every edge below the device: its path, and the token of it with which the edge begins."""
        for namespace, tree in self._trees.items():
            for node in tree.nodes():
                if node.payload.tier is not Tier.DEVICE:
                    tokens = tree.path_tokens(node)
                    yield namespace, tokens, len(tokens) - len(node.key), node.payload.tier

    def all_blocks(self) -> BlockNumbers:
        """Every indexed block: int64[n], in no order."""
        return _join([node.payload.blocks for tree in self._trees.values() for node in tree.nodes()])

    def nodes_now(self) -> list[IndexNode]:
        """Every node, parents before their children; a copy, so that the trees may change meanwhile."""
        return [node for tree in self._trees.values() for node in tree.nodes()]

    def check(self) -> None:
        """Assert the trees' invariants and that no block is indexed twice."""
        for namespace, tree in self._trees.items():
            tree.check()
            assert tree.size > 0, f"an empty tree is kept for {namespace}"
            for node in tree.nodes():
                assert node.payload.namespace == namespace, "an entry lies in another namespace's tree"
                assert len(node.payload.blocks) == tree.blocks_of(node), "an edge lacks block numbers"
                node.payload.usage.check(tree.blocks_of(node))
                below = sum(child.payload.tier > node.payload.tier for child in node.children.values())
                device = sum(child.payload.tier is Tier.DEVICE for child in node.children.values())
                assert not device or node.payload.tier is Tier.DEVICE, "a device block lies under a lower one"
                assert node.payload.lowered == below, "lowered children are miscounted"
        lower = {number: node for node in self.nodes_now() if node.payload.tier for number in _numbers(node)}
        assert lower == self._lower, "a block below the device is known for another node"
        blocks = self.all_blocks()
        assert len(np.unique(blocks)) == len(blocks), "a block is indexed twice"

    def _note_lower(self, node: IndexNode) -> None:
        if node.payload.tier is not Tier.DEVICE:
            for number in _numbers(node):
                self._lower[number] = node

    def _forget_lower(self, entry: IndexEntry, keep: int = 0) -> None:
        if entry.tier is not Tier.DEVICE:
            for number in entry.blocks[keep:].tolist():
                del self._lower[number]


def open_children(node: IndexNode) -> int:
    """How many children lie in ``node``'s own tier or above: while there are any, its tail must stay."""
    return len(node.children) - node.payload.lowered


def parent_in_tier(node: IndexNode) -> IndexNode | None:
    """The parent, if it lies in the same tier: the one that may become a leaf there when ``node`` goes."""
    parent = node.parent
    return parent if parent is not None and parent.payload.tier is node.payload.tier else None


def _own(part: NDArray[np.int32]) -> NDArray[np.int32]:
    # Evicting block by block must not copy the rest each time, nor a few blocks keep many more alive.
    return part if part.base is not None and 2 * part.size >= part.base.size else part.copy()


def _numbers(node: IndexNode) -> list[int]:
    numbers: list[int] = node.payload.blocks.tolist()
    return numbers


def _join(parts: list[NDArray[np.int32]]) -> BlockNumbers:
    if len(parts) == 1:
        return parts[0].astype(np.int64)
    return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)
