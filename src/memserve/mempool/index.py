"""The local prompt trees, one per namespace: which block holds the KV of which tokens. Pure.

Knows block numbers only; whether a block is referenced is the block table's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memserve.core.radix import Node, Path, RadixTree
from memserve.core.types import Namespace, Tokens
from memserve.mempool.address import BlockNumbers


class IndexEntry:
    """What an edge of a prompt tree carries: ``blocks`` int32[edge blocks] and when it was last used."""

    __slots__ = ("blocks", "last_use", "namespace")

    def __init__(self, namespace: Namespace, blocks: NDArray[np.int32]) -> None:
        self.namespace = namespace
        self.blocks = blocks
        self.last_use = 0

    def split(self, at: int) -> IndexEntry:
        """Part of the radix tree's payload contract: keep the blocks before ``at``, return the rest."""
        lower = IndexEntry(self.namespace, self.blocks[at:].copy())
        lower.last_use = self.last_use
        self.blocks = self.blocks[:at].copy()
        return lower

    def append(self, at: int, tail: IndexEntry) -> None:
        """Part of the radix tree's payload contract: the edge of ``at`` blocks grows by ``tail``'s."""
        assert at == len(self.blocks), f"an edge of {at} blocks has {len(self.blocks)} block numbers"
        self.blocks = np.concatenate((self.blocks, tail.blocks))


IndexNode = Node[IndexEntry]


@dataclass(frozen=True, slots=True)
class Found:
    """The longest indexed prefix: ``blocks`` int64[n], and the path on which they lie."""

    blocks: BlockNumbers
    path: Path[IndexEntry]


@dataclass(frozen=True, slots=True)
class Dropped:
    """What a removal took out of the index.

    ``tokens`` is a path of which only the first ``keep`` tokens are left; ``blocks`` int64[n].
    ``new_leaf`` is the node that became a leaf by it.
    """

    namespace: Namespace
    tokens: Tokens
    keep: int
    blocks: BlockNumbers
    new_leaf: IndexNode | None


class PromptIndex:
    """Prompt trees by namespace; a tree exists while it holds something."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self._trees: dict[Namespace, RadixTree[IndexEntry]] = {}

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
            return Found(np.empty(0, np.int64), Path([], 0, 0))
        path = tree.walk(tokens)
        parts = [node.payload.blocks for node in path.nodes]
        if parts:
            parts[-1] = parts[-1][: path.tail]
        return Found(_join(parts), path)

    def add(self, namespace: Namespace, tokens: Tokens, found: Found, blocks: BlockNumbers) -> IndexNode:
        """Index ``blocks`` for what ``tokens`` has beyond ``found``, a fresh answer of :meth:`find`.

        Returns the leaf that now ends the path.
        """
        tree = self._trees.get(namespace)
        if tree is None:
            tree = self._trees[namespace] = RadixTree(self.block_tokens)
        return tree.extend(found.path, tokens, IndexEntry(namespace, blocks.astype(np.int32)))

    def drop(self, node: IndexNode, keep: int) -> Dropped:
        """Take all but the first ``keep`` blocks of ``node``'s edge, and all below it, out of the index."""
        namespace = node.payload.namespace
        tree = self._trees[namespace]
        tokens = tree.path_tokens(node)
        kept = len(tokens) - (tree.blocks_of(node) - keep) * self.block_tokens
        parent = node.parent
        payloads = tree.truncate(node, keep)
        new_leaf = node if keep else parent if parent is not None and not parent.children else None
        if tree.size == 0:
            del self._trees[namespace]
        return Dropped(namespace, tokens, kept, _join([entry.blocks for entry in payloads]), new_leaf)

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

    def all_blocks(self) -> BlockNumbers:
        """Every indexed block: int64[n], in no order."""
        return _join([node.payload.blocks for tree in self._trees.values() for node in tree.nodes()])

    def check(self) -> None:
        """Assert the trees' invariants and that no block is indexed twice."""
        for namespace, tree in self._trees.items():
            tree.check()
            assert tree.size > 0, f"an empty tree is kept for {namespace}"
            for node in tree.nodes():
                assert node.payload.namespace == namespace, "an entry lies in another namespace's tree"
                assert len(node.payload.blocks) == tree.blocks_of(node), "an edge lacks block numbers"
        blocks = self.all_blocks()
        assert len(np.unique(blocks)) == len(blocks), "a block is indexed twice"


def path_to(node: IndexNode) -> list[IndexNode]:
    """``node`` and what lies above it, from the bottom up."""
    path = []
    above: IndexNode | None = node
    while above is not None:
        path.append(above)
        above = above.parent
    return path


def _join(parts: list[NDArray[np.int32]]) -> BlockNumbers:
    if len(parts) == 1:
        return parts[0].astype(np.int64)
    return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)
