"""The global prompt tree: which instances hold which prefix, as far as their pools have told.

Knows names of instances, tokens and nothing else: no load, no role, no time but the order of events.
"""

from __future__ import annotations

from collections import OrderedDict

from memserve.core.radix import Node, Path, RadixTree
from memserve.core.types import InstanceId, Namespace, Tokens
from memserve.scheduler.holders import Holders
from memserve.scheduler.holdings import Holdings, Numbers, Tier

NODE_BYTES = 700
"""What an edge takes beside its tokens, about: objects, dictionary entries, a mask."""
_TOKEN_BYTES = 4


class GlobalPromptTree:
    """Prefixes by namespace, one bitmask of holders per compressed edge.

    Only whole blocks of ``block_tokens`` count; a rest is ignored, as the pools ignore it. What an
    instance holds is prefix-closed. Branches that nobody holds any more are pruned at once.

    With ``memory`` it takes about so many bytes at most: the branches that were matched or stored longest
    ago are forgotten, from their ends. Events that concern them later are understood all the same.
    ``borrows``: see ``RadixTree``.
    """

    def __init__(
        self,
        block_tokens: int,
        numbers: Numbers | None = None,
        *,
        memory: int | None = None,
        borrows: bool = False,
    ) -> None:
        self.memory = 0
        """Bytes taken, about."""
        self._block_tokens = block_tokens
        self._limit = memory
        self._borrows = borrows
        self._trees: dict[Namespace, RadixTree[Holders]] = {}
        self._leaves: OrderedDict[Node[Holders], Namespace] = OrderedDict()
        """All leaves, those that were used longest ago first."""
        self._numbers = numbers or Numbers()
        self._held_blocks: dict[InstanceId, int] = {}

    @property
    def nodes(self) -> int:
        """Compressed edges in all namespaces."""
        return sum(tree.size for tree in self._trees.values())

    def held_tokens(self, instance: InstanceId) -> int:
        """Tokens of all prefixes that ``instance`` holds, shared ones counted once."""
        return self._held_blocks.get(instance, 0) * self._block_tokens

    def match(self, namespace: Namespace, tokens: Tokens) -> Holdings:
        """Who holds how much of ``tokens`` (contiguous int32[n]). What is asked for counts as used."""
        tree = self._trees.get(namespace)
        if tree is None:
            return Holdings()
        path = tree.walk(tokens)
        if not path.nodes:
            return Holdings()
        self._use(path.nodes[-1])
        return Holdings(_longest_first(self._collect_tiers(tree, path)))

    def store(self, instance: InstanceId, namespace: Namespace, tokens: Tokens) -> None:
        """``instance`` holds all whole blocks of ``tokens`` (contiguous int32[n]) from now on."""
        blocks = len(tokens) // self._block_tokens
        if not blocks:
            return
        tree = self._trees.get(namespace)
        if tree is None:
            tree = self._trees[namespace] = RadixTree(self._block_tokens, borrows=self._borrows)
        bit = 1 << self._numbers.enlist(instance)
        path = tree.walk(tokens)
        held = _credit(tree, path, bit)
        self._held_blocks[instance] = self._held_blocks.get(instance, 0) + blocks - held
        if path.blocks == blocks:
            self._use(path.nodes[-1])
            return
        before = self._weigh(tree)
        leaf = tree.extend(path, tokens, Holders(bit))
        self.memory += self._weigh(tree) - before
        if leaf.parent is not None:
            self._leaves.pop(leaf.parent, None)
        self._leaves[leaf] = namespace
        self._use(leaf)
        self._keep_within_limit()

    def remove(self, instance: InstanceId, namespace: Namespace, tokens: Tokens, keep: int) -> None:
        """Of the path ``tokens`` (contiguous int32[n]) ``instance`` holds only the first ``keep`` tokens.

        Everything it held below is gone with that, also on branches that leave the path later.
        """
        number = self._numbers.number(instance)
        tree = self._trees.get(namespace)
        if number is None or tree is None:
            return
        kept = keep // self._block_tokens
        path = tree.walk(tokens[: (kept + 1) * self._block_tokens])
        if path.blocks > kept:
            freed = self._release(namespace, tree, path.nodes[-1], 1 << number, path.tail - 1)
            self._held_blocks[instance] = self._held_blocks.get(instance, 0) - freed
        self._forget_if_empty(namespace)

    def drop_instance(self, instance: InstanceId) -> None:
        """Forget ``instance`` and everything it holds, before its number becomes another's."""
        self.forget(instance)
        self._held_blocks.pop(instance, None)

    def forget(self, instance: InstanceId) -> None:
        """``instance`` holds nothing: one pass over the tree's edges."""
        number = self._numbers.number(instance)
        if number is None or not self._held_blocks.get(instance):
            return
        for namespace, tree in list(self._trees.items()):
            tops = [node for node in tree.nodes() if node.parent is None]
            for node in tops:
                self._release(namespace, tree, node, 1 << number, 0)
            self._forget_if_empty(namespace)
        self._held_blocks[instance] = 0

    def keep_within(self, memory: int | None) -> None:
        """Take about so many bytes at most from now on; None: no limit."""
        self._limit = memory
        self._keep_within_limit()

    def check(self) -> None:
        """Raise ``AssertionError`` if masks, tree and counts contradict each other. Costs a full pass."""
        held = dict.fromkeys(self._held_blocks, 0)
        leaves = {leaf: name for name, tree in self._trees.items() for leaf in tree.leaves()}
        assert leaves == dict(self._leaves), "the order of use has other leaves than the trees"
        memory = sum(map(self._weigh, self._trees.values()))
        assert memory == self.memory, f"takes {self.memory} bytes, should be {memory}"
        assert self._limit is None or memory <= self._limit, f"{memory} bytes are more than {self._limit}"
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
        for name in Tier(0, seen, self._numbers.now).instances():
            number = self._numbers.number(name)
            assert number is not None, "a bit that belongs to no instance"
            held[name] += holders.depth(1 << number, size)

    def _collect_tiers(self, tree: RadixTree[Holders], path: Path[Holders]) -> list[Tier]:
        page, numbering = self._block_tokens, self._numbers.now
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

    # --- memory ---

    def _use(self, node: Node[Holders]) -> None:
        if not node.children:
            self._leaves.move_to_end(node)

    def _weigh(self, tree: RadixTree[Holders]) -> int:
        return tree.blocks * self._block_tokens * _TOKEN_BYTES + tree.size * NODE_BYTES

    def _keep_within_limit(self) -> None:
        while self._limit is not None and self.memory > self._limit:
            leaf, namespace = next(iter(self._leaves.items()))
            self._drop_leaf(namespace, leaf)

    def _drop_leaf(self, namespace: Namespace, leaf: Node[Holders]) -> None:
        tree, holders = self._trees[namespace], leaf.payload
        for depth, mask in ((tree.blocks_of(leaf), holders.full), *holders.ends.items()):
            for name in Tier(0, mask, self._numbers.now).instances():
                self._held_blocks[name] -= depth
        self._cut(namespace, tree, leaf, 0)
        self._forget_if_empty(namespace)

    def _cut(self, namespace: Namespace, tree: RadixTree[Holders], node: Node[Holders], keep: int) -> None:
        """Keep the first ``keep`` blocks of an edge and nothing below."""
        before, end = self._weigh(tree), node if keep else node.parent
        for dropped in tree.truncate(node, keep):
            self._leaves.pop(dropped, None)
        self.memory += self._weigh(tree) - before
        if end is not None and not end.children:
            self._leaves[end] = namespace

    def _release(
        self, namespace: Namespace, tree: RadixTree[Holders], node: Node[Holders], bit: int, keep: int
    ) -> int:
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
                waiting.extend(
                    (child, 0) for child in below if child.payload.full & bit or child.payload.ends
                )
            if not lower.payload.full:
                unheld.append(lower)
        for lower in unheld:
            if lower.attached:
                self._cut(namespace, tree, lower, lower.payload.longest(tree.blocks_of(lower)))
        return freed


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
