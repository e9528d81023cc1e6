"""A compressed radix tree over token arrays, in whole blocks of tokens.

Knows tokens, edges and where they branch. What an edge is good for (addresses of KV blocks, who holds
them, how fresh they are) is the payload's business: see :class:`Payload`. No clock: recency belongs into
payloads. Token-exact, so it cannot confuse two prompts as hashes could.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np

from memserve._native import common_prefix, walk_edges
from memserve.core.types import Tokens


class Payload(Protocol):
    """What hangs on an edge. Positions are blocks, counted from the edge's start."""

    def split(self, at: int) -> Self:
        """Keep what concerns the blocks before ``at`` and return what concerns those from ``at`` on."""
        ...

    def shorten(self, at: int) -> None:
        """Keep only what concerns the blocks before ``at``."""
        ...

    def append(self, at: int, tail: Self) -> None:
        """Take over ``tail``, which concerns blocks that follow; the edge had ``at`` blocks so far."""
        ...


P = TypeVar("P", bound=Payload)


class Node(Generic[P]):
    """The end of an edge. ``key`` holds the edge's tokens: int32[n], n a positive multiple of a block.

    ``payload`` is the tree owner's to read and change; everything else is changed by the tree only. A top
    node has no parent; a node that was dropped is not ``attached``. A node keeps its identity when its
    edge is split (it then ends the lower part) and when it grows, so a leaf stays a leaf until dropped.
    """

    __slots__ = ("_room", "attached", "children", "key", "parent", "payload")

    def __init__(self, key: Tokens, parent: Node[P] | None, payload: P, *, borrowed: bool = False) -> None:
        self.key = key
        self.parent = parent
        self.payload = payload
        self.children: dict[bytes, Node[P]] = {}
        self.attached = True
        # What is borrowed has no room to grow in: it may not be written to.
        self._room = key[:0] if borrowed else key

    def _append_tokens(self, tokens: Tokens) -> None:
        # Spare room makes a growing session cost what is new, not what there was.
        size = len(self.key)
        grown = size + len(tokens)
        if grown > len(self._room):
            self._room = np.empty(grown + grown // 2, np.int32)
            self._room[:size] = self.key
        self._room[size:grown] = tokens
        self.key = self._room[:grown]

    def _set_tokens(self, tokens: Tokens) -> None:
        # A copy, so that no longer array is kept alive by this edge.
        self.key = self._room = tokens.copy()

    def _borrow_tokens(self, tokens: Tokens) -> None:
        self.key, self._room = tokens, tokens[:0]

    def _shorten(self, size: int) -> None:
        # Evicting block by block must not copy the whole edge each time.
        if 2 * size < len(self._room):
            self._set_tokens(self.key[:size])
        else:
            self.key = self.key[:size]


class Path(NamedTuple, Generic[P]):
    """How far a walk came: ``blocks`` whole blocks. Valid until the tree changes.

    ``nodes`` lie on it from the top down; all matched in full but the last, of which ``tail`` blocks did.
    """

    nodes: list[Node[P]]
    tail: int
    blocks: int


class RadixTree(Generic[P]):
    """Paths of token blocks. ``blocks`` counts the blocks of all edges, ``size`` the nodes.

    A tree that ``borrows`` refers to the arrays it is given: nobody may change them, and they live as long
    as any edge that refers to them. That saves copies where edges live no longer than the arrays anyway.
    """

    def __init__(self, block_tokens: int, *, borrows: bool = False) -> None:
        assert block_tokens > 0, f"a block of {block_tokens} tokens makes no sense"
        self.block_tokens = block_tokens
        self._borrows = borrows
        self.blocks = 0
        self.size = 0
        self._top: dict[bytes, Node[P]] = {}

    # --- reading ---

    def walk(self, tokens: Tokens) -> Path[P]:
        """Follow ``tokens`` (contiguous int32[n]) as far as whole blocks agree. Changes nothing."""
        return Path(*walk_edges(self._top, tokens, self.block_tokens))

    def blocks_of(self, node: Node[P]) -> int:
        """Blocks of ``node``'s own edge."""
        return len(node.key) // self.block_tokens

    def path_tokens(self, node: Node[P]) -> Tokens:
        """All tokens from the root to the end of ``node``'s edge: int32[n], the caller's own copy."""
        edges = []
        above: Node[P] | None = node
        while above is not None:
            edges.append(above.key)
            above = above.parent
        return np.concatenate(edges[::-1])

    def nodes(self) -> Iterator[Node[P]]:
        """Every node, parents before their children. The tree must not change meanwhile."""
        return _walk_down(self._top)

    def leaves(self) -> Iterator[Node[P]]:
        """Every node without children: one per longest path."""
        return (node for node in self.nodes() if not node.children)

    # --- changing ---

    def extend(self, path: Path[P], tokens: Tokens, payload: P, *, grow: bool = True) -> Node[P]:
        """Add the whole blocks of ``tokens`` beyond ``path``, which is a fresh walk of ``tokens``.

        ``payload`` concerns just the new blocks. A leaf that the path covers in full grows in place
        and is returned, if it may ``grow``; otherwise a new leaf is, after splitting the edge in which
        the path ends.
        """
        page = self.block_tokens
        end = len(tokens) // page * page
        added = tokens[path.blocks * page : end]
        assert len(added), f"nothing beyond the {path.blocks} blocks that are there"
        self.blocks += len(added) // page
        parent = path.nodes[-1] if path.nodes else None
        if parent is not None and path.tail < self.blocks_of(parent):
            parent = self.split(parent, path.tail)
        elif grow and parent is not None and not parent.children:
            parent.payload.append(path.tail, payload)
            if self._borrows:
                parent._borrow_tokens(tokens[path.blocks * page - len(parent.key) : end])
            else:
                parent._append_tokens(added)
            return parent
        leaf = self._new_node(added, parent, payload)
        self._children(parent)[self._edge_name(leaf)] = leaf
        self.size += 1
        return leaf

    def split(self, node: Node[P], at: int) -> Node[P]:
        """Cut ``node``'s edge after its first ``at`` blocks and return the new upper node.

        The upper node keeps the payload object, ``node`` gets the lower half that the payload splits off.
        """
        assert 0 < at < self.blocks_of(node), f"no place to split {self.blocks_of(node)} blocks at {at}"
        cut = at * self.block_tokens
        upper = self._new_node(node.key[:cut], node.parent, node.payload)
        self._children(node.parent)[self._edge_name(upper)] = upper
        node.payload = node.payload.split(at)
        if self._borrows:
            node._borrow_tokens(node.key[cut:])
        else:
            node._set_tokens(node.key[cut:])
        node.parent = upper
        upper.children[self._edge_name(node)] = node
        self.size += 1
        return upper

    def renew(self, node: Node[P]) -> Node[P]:
        """Let a new node stand in ``node``'s place, with its edge, payload and children; ``node`` is dropped.

        For payloads that change so much that nobody may go on knowing the node as what it was.
        """
        fresh = Node(node.key, node.parent, node.payload)
        fresh._room, fresh.children = node._room, node.children
        for child in fresh.children.values():
            child.parent = fresh
        self._children(node.parent)[self._edge_name(node)] = fresh
        node.children, node.attached = {}, False
        return fresh

    def truncate(self, node: Node[P], keep: int) -> list[Node[P]]:
        """Keep the first ``keep`` blocks of ``node``'s edge; drop the rest and everything below.

        Returns the nodes that were dropped, upper ones first. With ``keep`` 0 that includes ``node``; its
        parent stays, perhaps as a leaf now.
        """
        assert node.attached, "this node was dropped before"
        blocks = self.blocks_of(node)
        assert 0 <= keep <= blocks, f"cannot keep {keep} of {blocks} blocks"
        dropped: list[Node[P]] = []
        if node.children:
            dropped += _walk_down(node.children)
            self.blocks -= sum(map(self.blocks_of, dropped))
            node.children.clear()
        self.blocks -= blocks - keep
        if keep == 0:
            del self._children(node.parent)[self._edge_name(node)]
            dropped.insert(0, node)
        elif keep < blocks:
            node.payload.shorten(keep)
            node._shorten(keep * self.block_tokens)
        self.size -= len(dropped)
        for lower in dropped:
            lower.attached = False
            # Without a cycle among them they, and their tokens, go at once.
            lower.children.clear()
        return dropped

    def check(self) -> None:
        """Assert every invariant of the structure (not of payloads). Costs a pass over the tree."""
        size = blocks = 0
        for node in self.nodes():
            size += 1
            blocks += self.blocks_of(node)
            assert len(node.key) > 0, "an edge is empty"
            assert len(node.key) % self.block_tokens == 0, "an edge is not whole blocks"
            assert node.attached, "a dropped node is still linked"
            assert self._children(node.parent).get(self._edge_name(node)) is node, "a link is wrong"
        assert (size, blocks) == (self.size, self.blocks), (
            f"{(self.size, self.blocks)} should be {(size, blocks)}"
        )

    # --- inside ---

    def _new_node(self, tokens: Tokens, parent: Node[P] | None, payload: P) -> Node[P]:
        return Node(tokens if self._borrows else tokens.copy(), parent, payload, borrowed=self._borrows)

    def _children(self, parent: Node[P] | None) -> dict[bytes, Node[P]]:
        return self._top if parent is None else parent.children

    def _edge_name(self, node: Node[P]) -> bytes:
        return node.key[: self.block_tokens].tobytes()


def common_tokens(one: Tokens, other: Tokens, block_tokens: int) -> int:
    """Tokens that both paths (contiguous int32[n]) begin with, in whole blocks."""
    return common_prefix(one, other) // block_tokens * block_tokens


def _walk_down(top: dict[bytes, Node[P]]) -> Iterator[Node[P]]:
    waiting = list(top.values())
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(node.children.values())
