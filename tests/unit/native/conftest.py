"""A native model on a pool whose unwritten memory is NaN, and a float64 oracle of the same arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from memserve.engine.models.spec import LayerWeights, ModelWeights
from memserve.engine.models.tiny import tiny_weights
from memserve.engine.runners.base import ForwardBatch
from memserve.engine.runners.native import NativeRunner
from memserve.engine.runners.reference import quantise_int8

Double = NDArray[np.float64]
Logits = NDArray[np.float32]

SEGMENT = 256  # tokens; kSegmentTokens in native/kernels.h


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens ``begin`` to ``end`` of conversation ``sequence``."""

    sequence: int
    begin: int
    end: int


class PagedModel:
    """One runner and a pool of its own; conversations are made up of random tokens."""

    def __init__(
        self,
        weights: ModelWeights,
        *,
        isa: str,
        threads: int,
        context: int,
        sequences: int,
        kv_dtype: str,
    ) -> None:
        self.weights = weights
        self.runner = NativeRunner(weights, threads=threads, context=context, isa=isa, kv_dtype=kv_dtype)
        layout = self.runner.layout
        width = layout.blocks_for(context)
        self._pool = np.full(sequences * width * layout.block_bytes + 64, 0xFF, np.uint8)
        # Blocks lie in any order and only as aligned as their elements.
        order = np.random.default_rng(7).permutation(sequences * width).astype(np.uint64)
        first = np.uint64(self._pool.ctypes.data + 34)
        self._blocks = (first + order * np.uint64(layout.block_bytes)).reshape(sequences, width)
        vocabulary = weights.spec.vocabulary
        self.tokens = np.random.default_rng(11).integers(0, vocabulary, (sequences, context), np.int32)

    def forward(self, parts: Sequence[Rows]) -> list[Logits]:
        """One pass; logits of all rows, part by part."""
        counts = [part.end - part.begin for part in parts]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        batch = ForwardBatch(
            tokens=np.concatenate([self.tokens[p.sequence, p.begin : p.end] for p in parts]),
            positions=np.concatenate([np.arange(p.begin, p.end, dtype=np.int32) for p in parts]),
            starts=starts,
            blocks=self._known_blocks(parts),
            logit_rows=np.arange(starts[-1], dtype=np.int32),
        )
        return np.split(self.runner.forward(batch), starts[1:-1])

    def rows(self, sequence: int, begin: int, end: int) -> Rows:
        return Rows(sequence, begin, end)

    def kv_of(self, sequence: int) -> NDArray[np.uint8]:
        """A copy of a conversation's blocks, uint8[blocks, block_bytes]."""
        size = self.runner.layout.block_bytes
        places = self._blocks[sequence] - np.uint64(self._pool.ctypes.data + 34)
        return self._pool[34 : 34 + self._blocks.size * size].reshape(-1, size)[places // np.uint64(size)]

    def _known_blocks(self, parts: Sequence[Rows]) -> NDArray[np.uint64]:
        used = [-(-part.end // 16) for part in parts]
        blocks = np.zeros((len(parts), max(used)), np.uint64)
        for row, (part, count) in enumerate(zip(parts, used, strict=True)):
            blocks[row, :count] = self._blocks[part.sequence, :count]
        return blocks

    def close(self) -> None:
        self.runner.close()


Build = Callable[..., PagedModel]


@pytest.fixture
def build() -> Iterator[Build]:
    """Build PagedModels that are closed after the test; keywords of ``tiny_weights`` shape the model."""
    built: list[PagedModel] = []

    def make(
        isa: str,
        *,
        threads: int = 1,
        context: int = 64,
        sequences: int = 1,
        kv_dtype: str = "bf16",
        change: Callable[[ModelWeights], None] = lambda weights: None,
        **shape: int,
    ) -> PagedModel:
        weights = tiny_weights(3, **shape)
        change(weights)
        exact_in_bf16(weights)
        model = PagedModel(
            weights, isa=isa, threads=threads, context=context, sequences=sequences, kv_dtype=kv_dtype
        )
        built.append(model)
        return model

    yield make
    for model in built:
        model.close()


@pytest.fixture
def oracle() -> Callable[..., Double]:
    return oracle_logits


def rounded(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """To the nearest bf16, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def exact_in_bf16(weights: ModelWeights) -> ModelWeights:
    """The same model with matrices that bf16 can hold, so that packing them loses nothing."""
    tied = weights.head is weights.embedding
    weights.embedding = rounded(weights.embedding)
    weights.head = weights.embedding if tied else rounded(weights.head)
    for layer in weights.layers:
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            setattr(layer, name, rounded(getattr(layer, name)))
    return weights


def rounded_int8(values: Double) -> Double:
    """Vectors of the last axis to int8 and back."""
    scales, steps = quantise_int8(values.astype(np.float32))
    return scales[..., None].astype(np.float64) * steps


def oracle_logits(weights: ModelWeights, tokens: NDArray[np.int32], kv_dtype: str = "bf16") -> Double:
    """Logits of all rows: float64, rounded exactly where the kernels round (not: weights of V in int8)."""
    x = weights.embedding[tokens].astype(np.float64)
    for layer in weights.layers:
        x = x + _attention(weights, layer, rounded(_normed(weights, x, layer.attention_norm)), kv_dtype)
        h = rounded(_normed(weights, x, layer.ffn_norm)).astype(np.float64)
        gate = h @ layer.gate.T
        x = x + rounded(gate / (1 + np.exp(-gate)) * (h @ layer.up.T)).astype(np.float64) @ layer.down.T
    return rounded(_normed(weights, x, weights.output_norm)).astype(np.float64) @ weights.head.T


def _normed(weights: ModelWeights, x: Double, norm: NDArray[np.float32]) -> Double:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + weights.spec.rms_epsilon) * norm


def _rotated(weights: ModelWeights, x: Double) -> Double:
    dim = weights.spec.head_dim
    angles = np.outer(np.arange(len(x)), weights.spec.rope_frequencies())[:, None]
    a, b = x[..., : dim // 2], x[..., dim // 2 :]
    turned = [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)]
    return weights.spec.rope_amplitude() * np.concatenate(turned, -1)


def _attention(weights: ModelWeights, layer: LayerWeights, h: NDArray[np.float32], kv_dtype: str) -> Double:
    spec, rows = weights.spec, len(h)
    group = spec.heads // spec.kv_heads
    wide = h.astype(np.float64)
    biases = [0.0 if bias is None else bias for bias in (layer.q_bias, layer.k_bias, layer.v_bias)]
    q, k, v = (
        (wide @ matrix.T + bias).reshape(rows, -1, spec.head_dim)
        for matrix, bias in zip((layer.q, layer.k, layer.v), biases, strict=True)
    )
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = _normed(weights, q, layer.q_norm), _normed(weights, k, layer.k_norm)
    stored = rounded if kv_dtype == "bf16" else rounded_int8
    q, k, v = (
        kept(x).astype(np.float64)
        for kept, x in ((rounded, _rotated(weights, q)), (stored, _rotated(weights, k)), (stored, v))
    )
    kept_weights = rounded if kv_dtype == "bf16" else np.asarray
    out = np.zeros_like(q)
    for head in range(spec.heads):
        scores = q[:, head] @ k[:, head // group].T / np.sqrt(spec.head_dim)
        scores[np.triu_indices(rows, 1)] = -np.inf
        out[:, head] = _weighted(scores, v[:, head // group], kept_weights)
    return rounded(out.reshape(rows, -1)).astype(np.float64) @ layer.o.T


def _weighted(scores: Double, values: Double, kept: Callable[[Double], NDArray[Any]]) -> Double:
    """Softmax-weighted values; weights are ``kept`` relative to the largest of their segment."""
    top = scores.max(-1, keepdims=True)
    sums, total = np.zeros((len(scores), values.shape[1])), np.zeros((len(scores), 1))
    for begin in range(0, scores.shape[1], SEGMENT):
        part = scores[:, begin : begin + SEGMENT]
        local = np.maximum(part.max(-1, keepdims=True), -1e30)
        weights = np.exp(part - local)
        sums += np.exp(local - top) * (kept(weights).astype(np.float64) @ values[begin : begin + SEGMENT])
        total += np.exp(local - top) * weights.sum(-1, keepdims=True)
    return sums / total
