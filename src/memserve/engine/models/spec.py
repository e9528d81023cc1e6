"""What a decoder-only model is made of, however it was stored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from memserve.engine.models.rope import RopeScaling, rope_amplitude, rope_frequencies

Float = NDArray[np.float32]
Double = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Hyper-parameters of a decoder of the Llama kind; the last four are what sets families apart.

    ``identity`` names weights and numerics together: equal identities produce interchangeable KV.
    ``context`` is the longest supported context in tokens: the trained length, but no more than ``window``,
    the tokens a sliding window shows to each token, up to which it is plain causal attention.
    ``eos_tokens`` end a turn. ``attention_bias``: q, k and v have biases (Qwen2). ``qk_norm``: each head of q
    and k is normalised before its rotation (Qwen3).
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
    rope_scaling: RopeScaling | None = None
    window: int | None = None
    attention_bias: bool = False
    qk_norm: bool = False

    def rope_frequencies(self) -> Double:
        """Radians per token of each pair of dimensions, float64[head_dim / 2]."""
        return rope_frequencies(self.rope_theta, self.head_dim, self.rope_scaling)

    def rope_amplitude(self) -> float:
        """The factor on the cosines and sines of rotations."""
        return rope_amplitude(self.rope_scaling)


@dataclass(slots=True)
class LayerWeights:
    """One layer, float32, row-major [outputs, inputs]; q and k rows in half-split (neox) rope order.

    Biases: float32[outputs]; ``q_norm`` and ``k_norm``: float32[head_dim], shared by all heads.
    """

    attention_norm: Float
    q: Float
    k: Float
    v: Float
    o: Float
    ffn_norm: Float
    gate: Float
    up: Float
    down: Float
    q_bias: Float | None = None
    k_bias: Float | None = None
    v_bias: Float | None = None
    q_norm: Float | None = None
    k_norm: Float | None = None


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
    q_bias: Float | None = None
    k_bias: Float | None = None
    v_bias: Float | None = None
    q_norm: Float | None = None
    k_norm: Float | None = None


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """All weights, each layer read when it is asked for; ``head`` None: tied to the embedding."""

    spec: ModelSpec
    embedding: Matrix
    output_norm: Float
    head: Matrix | None
    layers: Iterable[StoredLayer]
