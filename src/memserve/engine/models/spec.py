"""What a decoder-only model is made of, however it was stored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Hyper-parameters of a Llama-family model.

    ``identity`` names weights and numerics together: equal identities produce interchangeable KV.
    ``context`` is the trained context length in tokens. ``eos_tokens`` end a turn.
    """

    identity: str
    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    context: int
    rms_epsilon: float
    rope_theta: float
    eos_tokens: tuple[int, ...]


@dataclass(slots=True)
class LayerWeights:
    """One layer, float32, row-major [outputs, inputs]; q and k rows in half-split (neox) rope order."""

    attention_norm: Float
    q: Float
    k: Float
    v: Float
    o: Float
    ffn_norm: Float
    gate: Float
    up: Float
    down: Float


@dataclass(slots=True)
class ModelWeights:
    """All weights; ``embedding`` and ``head``: float32[vocabulary, hidden], one array in tied models."""

    spec: ModelSpec
    embedding: Float
    output_norm: Float
    head: Float
    layers: list[LayerWeights] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """Blocks of the GGML type ``kind``; ``rows``: uint8[outputs, bytes], each of ``inputs`` weights."""

    kind: str
    rows: NDArray[np.uint8]
    inputs: int


Matrix = Float | StoredMatrix
"""float32[outputs, inputs], or blocks that hold as many."""


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """:class:`LayerWeights` with matrices as the file holds them."""

    attention_norm: Float
    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    ffn_norm: Float
    gate: Matrix
    up: Matrix
    down: Matrix


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """All weights, each layer read when it is asked for; ``head`` None: tied to the embedding."""

    spec: ModelSpec
    embedding: Matrix
    output_norm: Float
    head: Matrix | None
    layers: Iterable[StoredLayer]
