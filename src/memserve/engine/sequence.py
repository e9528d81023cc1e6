"""A request inside an engine: its tokens, how far its KV is computed, and the blocks that hold it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from memserve.core.types import (
    FinishReason,
    InstanceId,
    Namespace,
    RequestId,
    SamplingParams,
    Tokens,
    pack_tokens,
    unpack_tokens,
)
from memserve.engine.account import PromptAccount
from memserve.engine.speculation import Draft, Lookup
from memserve.mempool.address import Addresses


class Adoption(msgspec.Struct, frozen=True, array_like=True):
    """What a decode instance needs, besides the KV, to go on with a request."""

    request: RequestId
    namespace: Namespace
    tokens: bytes
    prompt_length: int
    sampling: SamplingParams
    prefilled_on: InstanceId
    trace: bool = False


class Patience:
    """Ends ``seconds`` after the last progress of what is waited for."""

    __slots__ = ("_deadline", "_progress", "_seconds")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._progress = -1
        self._deadline = 0.0

    def spent(self, progress: int, now: float) -> bool:
        """Whether it has ended by ``now``; ``progress`` only counts where it is more than ever before."""
        if progress > self._progress:
            self._progress, self._deadline = progress, now + self._seconds
        return now >= self._deadline


@dataclass(frozen=True, slots=True)
class Expected:
    """The KV of the first ``tokens`` tokens of the prompt, waited for until ``deadline`` (engine's clock)."""

    tokens: int
    deadline: float


@dataclass(slots=True, eq=False)
class Sequence:
    """``buffer[:length]`` are prompt and sampled tokens; the KV of ``buffer[:computed]`` is in ``addrs``."""

    request: RequestId
    namespace: Namespace
    prompt_length: int
    sampling: SamplingParams
    buffer: Tokens
    length: int
    computed: int = 0
    arrival: int = 0
    """Its place in the engine's order of arrival; preempted or not, it keeps it."""
    addrs: Addresses | None = None
    pointers: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    decode_on: InstanceId | None = None
    prefilled_on: InstanceId | None = None
    account: PromptAccount | None = None
    """Where the prompt's KV came from; None before any was looked for and after the ledger was sent."""
    ended: FinishReason | None = None
    patience: float | None = None
    """Until when to wait for KV on its way here, in the engine's clock; None if there was none so far."""
    fetch: Expected | None = None
    """What a peer was asked to send here; None when that is over."""
    leader_patience: Patience | None = None
    """With the sequence that computes what this one begins with; None if it has waited for none so far."""
    trace: bool = False
    draft: Draft | None = None
    """What its text says about how it may go on; None until somebody asks."""

    @property
    def tokens(self) -> Tokens:
        return self.buffer[: self.length]

    @property
    def sampled(self) -> int:
        """Tokens sampled so far."""
        return self.length - self.prompt_length

    @property
    def pending(self) -> int:
        """Tokens whose KV is still to be computed; 1 means a decode step."""
        return self.length - self.computed

    @property
    def wanted(self) -> int:
        """Tokens still to be sampled, at most."""
        return len(self.buffer) - self.length

    @property
    def blocks_held(self) -> int:
        return len(self.pointers)

    def draft_with(self, lookup: Lookup) -> Draft:
        """Its own draft, made by ``lookup`` when it is asked for first."""
        if self.draft is None:
            self.draft = Draft(lookup)
        return self.draft

    def append(self, token: int) -> None:
        self.buffer[self.length] = token
        self.length += 1

    def extend(self, tokens: Iterable[int], context: int) -> FinishReason | None:
        """Append ``tokens`` up to the one that ends the sequence, if one does; says why it ended."""
        for token in tokens:
            self.append(token)
            reason = self.finish_reason(context)
            if reason is not None:
                return reason
        return None

    def finish_reason(self, context: int) -> FinishReason | None:
        """Why the sequence ends with its last sampled token, or None."""
        if int(self.buffer[self.length - 1]) in self.sampling.stop_token_ids:
            return FinishReason.STOP
        if self.sampled >= self.sampling.max_tokens or self.length >= context:
            return FinishReason.LENGTH
        return None


def new_sequence(
    request: RequestId,
    namespace: Namespace,
    prompt: Tokens,
    sampling: SamplingParams,
    *,
    decode_on: InstanceId | None = None,
    trace: bool = False,
) -> Sequence:
    """A sequence of which nothing is computed yet."""
    buffer = np.empty(len(prompt) + sampling.max_tokens, np.int32)
    buffer[: len(prompt)] = prompt
    return Sequence(
        request, namespace, len(prompt), sampling, buffer, len(prompt), decode_on=decode_on, trace=trace
    )


def to_adoption(sequence: Sequence, here: InstanceId) -> bytes:
    """Encode what the decode instance needs; the KV travels separately."""
    return msgspec.msgpack.encode(
        Adoption(
            sequence.request,
            sequence.namespace,
            pack_tokens(sequence.tokens),
            sequence.prompt_length,
            sequence.sampling,
            here,
            sequence.trace,
        )
    )


def from_adoption(raw: bytes) -> Sequence:
    """Inverse of :func:`to_adoption`, with the KV of all but the last token computed."""
    adoption = msgspec.msgpack.decode(raw, type=Adoption)
    tokens = unpack_tokens(adoption.tokens)
    prompt = tokens[: adoption.prompt_length]
    sequence = new_sequence(
        adoption.request, adoption.namespace, prompt, adoption.sampling, trace=adoption.trace
    )
    for token in tokens[adoption.prompt_length :]:
        sequence.append(int(token))
    sequence.computed = sequence.length - 1
    sequence.prefilled_on = adoption.prefilled_on
    return sequence
