"""The blocks of sequences: looked up and allocated, grown, published, given up and given back.

Decides by measured costs whether KV in a lower tier is brought up or computed again. Knows no queues.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

from memserve.core.clock import Clock
from memserve.core.errors import OutOfBlocks
from memserve.core.types import Ledger
from memserve.engine.account import PromptAccount
from memserve.engine.cost import LinearCost
from memserve.engine.pace import StepTimes
from memserve.engine.phases import Phases
from memserve.engine.sequence import Sequence
from memserve.mempool.address import Addresses, Tier
from memserve.mempool.match import Match
from memserve.mempool.pool import MemPool

_SWAP_PRIOR = (1e-4, 5e-4)
"""Seconds to bring one block up from host and from disk; the first blocks correct the scale."""
_RETRY = 0.9
"""A tier that is left alone counts as having been this much quicker than expected: it is tried again."""


class SequenceBlocks:
    """Hands blocks of ``pool`` to sequences as ``phases`` say; ``times`` knows what computing costs."""

    def __init__(self, pool: MemPool, phases: Phases, times: StepTimes, clock: Clock) -> None:
        self._pool = pool
        self._phases = phases
        self._times = times
        self._clock = clock
        self._swaps = LinearCost(_SWAP_PRIOR)
        self._preempted_swap = 0
        self._preempted_recompute = 0
        self._accounted = np.zeros(len(Ledger.__struct_fields__), np.int64)

    def counters(self) -> Mapping[str, float]:
        """What has been done so far, for metrics."""
        accounted = zip(Ledger.__struct_fields__, self._accounted.tolist(), strict=True)
        return {
            "preempted_swap": float(self._preempted_swap),
            "preempted_recompute": float(self._preempted_recompute),
            **{f"prompt_tokens_{source}": float(tokens) for source, tokens in accounted},
        }

    def swap_seconds(self, host: int, disk: int) -> float:
        """Seconds per token to swap in KV of which so many blocks lie on host and on disk; 0 without tiers.

        Where nothing lies below the device yet it is the price of where it would go.
        """
        if not host + disk:
            host, disk = (int(self._pool.size_of(tier) > 0) for tier in (Tier.HOST, Tier.DISK))
            disk = 0 if host else disk
        tokens = (host + disk) * self._pool.layout.block_tokens
        return self._swaps.predict((host, disk)) / tokens if tokens else 0.0

    def take(self, sequence: Sequence) -> bool:
        """Look the tokens up in the pool and allocate what is missing; False if there is no room now."""
        pool, limit = self._pool, sequence.length - 1 if self._phases.reuses else 0
        with pool.match(sequence.tokens, sequence.namespace, limit_tokens=limit) as match:
            wanted = match.addrs[: self._worth_using(match)]
            try:
                cached, fresh = self._bring_up(wanted, pool.layout.blocks_for(sequence.length))
            except OutOfBlocks:
                return False
            if len(wanted) < len(match.addrs):
                left = _in_tiers(match.tiers[len(wanted) :])
                self._swaps.learn(left, self._swaps.predict(left) * _RETRY)
            self._account(sequence, match, len(cached))
        sequence.computed = len(cached) * pool.layout.block_tokens
        self.hold(sequence, cached.concat(fresh))
        return True

    def grow(self, sequence: Sequence, ahead: int = 0) -> bool:
        """See to blocks for the next token and ``ahead`` more; False where there are none."""
        assert sequence.addrs is not None
        missing = self._pool.layout.blocks_for(sequence.length + ahead) - sequence.blocks_held
        if missing <= 0:
            return True
        try:
            self.hold(sequence, sequence.addrs.concat(self._pool.alloc_mem(missing)))
        except OutOfBlocks:
            return False
        return True

    def trim(self, sequence: Sequence) -> None:
        """Give back what :meth:`grow` has taken ahead and the next token does not need."""
        assert sequence.addrs is not None
        needed = self._pool.layout.blocks_for(sequence.length)
        if sequence.blocks_held > needed:
            self._pool.free_mem(sequence.addrs[needed:])
            self.hold(sequence, sequence.addrs[:needed])

    def reach(self, sequence: Sequence, ahead: int) -> int:
        """For how many tokens after the next one there are blocks: ``ahead``, or fewer."""
        if self.grow(sequence, ahead):
            return ahead
        return sequence.blocks_held * self._pool.layout.block_tokens - sequence.length

    def hold(self, sequence: Sequence, addrs: Addresses) -> None:
        """Let the sequence have ``addrs`` from now on."""
        sequence.addrs = addrs
        sequence.pointers = self._pool.pointers(addrs)

    def publish(self, sequence: Sequence) -> None:
        """Insert the computed KV into the index, where the phases ask for it."""
        decoded = sequence.sampled > 1 or sequence.prefilled_on is not None
        wanted = self._phases.insert_after_decode if decoded else self._phases.insert_after_prefill
        if wanted and sequence.addrs is not None:
            self._pool.insert(sequence.buffer[: sequence.computed], sequence.addrs, sequence.namespace)

    def release(self, sequence: Sequence) -> None:
        """Let go of all blocks; what was published stays cached."""
        if sequence.addrs is not None:
            self._pool.free_mem(sequence.addrs)
            sequence.addrs = None
            sequence.pointers = np.empty(0, np.uint64)
        sequence.computed = 0

    def give_up(self, victim: Sequence) -> None:
        """Take a preempted sequence's blocks: its KV goes down a tier where it pays to fetch it back.

        Without lower tiers it stays cached as long as nobody needs the room. Where computing it again is
        quicker than the tiers below it is dropped, so that nobody waits for it to be written there.
        """
        tiers = [tier for tier in (Tier.HOST, Tier.DISK) if self._pool.size_of(tier)]
        blocks = victim.computed // self._pool.layout.block_tokens
        if victim.account is not None:
            victim.account.lose(victim.computed)
        swap = False
        if tiers and blocks and self._phases.reuses:
            below = np.full(blocks, tiers[0], np.uint8)
            swap = self._pays_to_swap(below, 0)
        if swap or not tiers:
            self.publish(victim)
        self.release(victim)
        if swap:
            self._preempted_swap += 1
        else:
            self._preempted_recompute += 1

    def settle_account(self, sequence: Sequence) -> Ledger | None:
        """The ledger of a prompt that is computed now; None if it was settled before, here or elsewhere."""
        if sequence.account is None:
            return None
        ledger, sequence.account = sequence.account.ledger(), None
        self._accounted += np.array(msgspec.structs.astuple(ledger))
        return ledger

    def _account(self, sequence: Sequence, match: Match, blocks: int) -> None:
        """Note where the first ``blocks`` blocks, those that are used of ``match``, came from."""
        if sequence.sampled:
            return
        if sequence.account is None:
            sequence.account = PromptAccount(sequence.prompt_length, self._pool.layout.block_tokens)
        sequence.account.find(match.origins[:blocks], match.tiers[:blocks])

    def _worth_using(self, match: Match) -> int:
        """How many of the matched blocks to use: what lies below only if computing it takes longer."""
        tiers = match.tiers
        upper = int(np.count_nonzero(tiers == Tier.DEVICE))
        if upper == len(tiers) or self._pays_to_swap(tiers[upper:], upper):
            return len(tiers)
        return upper

    def _pays_to_swap(self, tiers: NDArray[np.uint8], behind: int) -> bool:
        """Whether blocks in ``tiers`` come up sooner than they are computed, with ``behind`` before them."""
        step = self._pool.layout.block_tokens
        computing = self._times.prefill_seconds(behind * step, len(tiers) * step)
        return self._swaps.predict(_in_tiers(tiers)) <= computing

    def _bring_up(self, wanted: Addresses, need: int) -> tuple[Addresses, Addresses]:
        """``wanted`` on the device, and new blocks up to ``need``. ``OutOfBlocks``: nothing is kept."""
        # The new blocks first: nothing is brought up for a request that must wait.
        held = [self._pool.alloc_mem(need - len(wanted))]
        try:
            cached = self._swap_in(wanted)
            held.append(cached)
            # Less comes up than was found if a block had been damaged on disk: that much is computed.
            held.append(self._pool.alloc_mem(need - len(cached) - len(held[0])))
        except OutOfBlocks:
            for addrs in held:
                self._pool.free_mem(addrs)
            raise
        return cached, held[0].concat(held[2])

    def _swap_in(self, wanted: Addresses) -> Addresses:
        tiers = wanted.tiers
        started = self._clock.now()
        cached = self._pool.swap_in(wanted)
        self._swaps.learn(_in_tiers(tiers[: len(cached)]), self._clock.now() - started)
        return cached


def _in_tiers(tiers: NDArray[np.uint8]) -> tuple[int, int]:
    """How many blocks lie on host and on disk."""
    return int(np.count_nonzero(tiers == Tier.HOST)), int(np.count_nonzero(tiers == Tier.DISK))
