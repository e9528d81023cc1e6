"""The vocabulary: names, roles, token arrays, sampling parameters, the ledger. Values only."""

from __future__ import annotations

import enum
from typing import NewType

import msgspec
import numpy as np
from numpy.typing import NDArray

InstanceId = NewType("InstanceId", str)
RequestId = NewType("RequestId", str)
Tokens = NDArray[np.int32]
"""Token ids: int32[n]."""


class Role(enum.StrEnum):
    """What an instance does: prefill only, decode only, or both."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"

    @property
    def prefills(self) -> bool:
        return self is not Role.DECODE

    @property
    def decodes(self) -> bool:
        return self is not Role.PREFILL


class FinishReason(enum.StrEnum):
    """Why a request ended: a stop token or string, a length limit, or the client went away."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class Namespace(msgspec.Struct, frozen=True, array_like=True):
    """KV cache is shared only inside one namespace: same model, same adapter, same tenant salt."""

    model: str
    adapter: str = ""
    salt: str = ""


class SamplingParams(msgspec.Struct, frozen=True):
    """How to choose tokens and when to stop.

    ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 switch the filters off. ``logprobs`` is the
    number of alternatives to report per token (0: the chosen token only, None: nothing). ``first_index``
    numbers the first sampled token: a continuation goes on with the random numbers of what it continues.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    first_index: int = 0


class Ledger(msgspec.Struct, frozen=True):
    """Where each prompt token's KV came from, in tokens. The counts add up to the prompt's length."""

    computed: int = 0
    local: int = 0
    host: int = 0
    disk: int = 0
    peer: int = 0
    backflow: int = 0

    @property
    def cached(self) -> int:
        return self.local + self.host + self.disk + self.peer + self.backflow

    @property
    def prompt(self) -> int:
        return self.computed + self.cached


class StepPrices(msgspec.Struct, frozen=True, array_like=True):
    """What an engine's steps cost, in seconds: ``step`` for each one, ``row`` for a stream that decodes a
    token, ``proposed`` for a token that is checked along with it, ``token`` for a prompt token;
    ``row_context`` and ``token_context`` for each token of context that a row attends to.

    The defaults are those of a 135 M parameter model on two slow cores.
    """

    step: float = 1e-2
    row: float = 1e-3
    row_context: float = 1e-6
    proposed: float = 1e-3
    token: float = 1e-3
    token_context: float = 2e-7

    def decode_step(self, rows: float, context: float) -> float:
        """Seconds of a step in which ``rows`` streams decode over ``context`` tokens together."""
        return self.step + self.row * rows + self.row_context * context


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probability of a chosen token and of its best alternatives."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def as_tokens(values: object) -> Tokens:
    """Return a contiguous int32[n] array of ``values`` (a list or an integer array)."""
    return np.ascontiguousarray(values, dtype=np.int32)


def pack_tokens(*parts: Tokens) -> bytes:
    """Token ids, one part after the other, as little-endian int32 bytes, for messages."""
    return b"".join([part.astype("<i4", copy=False).data for part in parts])


def unpack_tokens(raw: bytes) -> Tokens:
    """Inverse of :func:`pack_tokens`."""
    return np.frombuffer(raw, dtype="<i4").astype(np.int32, copy=False)
