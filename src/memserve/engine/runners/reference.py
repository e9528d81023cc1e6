"""The runner that is the tests' oracle: plain numpy, float32, one row at a time.

A row's result is bit-for-bit independent of what else is in the batch and of how a prompt is cut into
chunks, because every product has a shape that depends on the row's position only. Speed comes second.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memserve.engine.models.ggml_types import widen_bf16
from memserve.engine.models.spec import Float, LayerWeights, ModelWeights
from memserve.engine.runners.base import ForwardBatch, LayerSignal
from memserve.mempool.layout import KVLayout

Double = NDArray[np.float64]


class ReferenceRunner:
    """Forward passes of Llama-like models on blocks in ``plain`` order.

    ``layout_dtype`` is how KV is stored: ``f32``, ``bf16`` or ``int8``. ``bf16_math`` also rounds weights,
    and the inputs of every matrix product, to bf16: close to what a bf16 runner with float32 sums computes.
    """

    isa = "reference"
    tile_rows = 1 << 30

    def __init__(self, weights: ModelWeights, *, layout_dtype: str = "f32", bf16_math: bool = False) -> None:
        spec = weights.spec
        self.layout = KVLayout(
            spec.identity, spec.layers, spec.kv_heads, spec.head_dim, dtype=layout_dtype, order="plain"
        )
        self._weights = _round_weights(weights) if bf16_math else weights
        self._round = round_bf16 if bf16_math else _keep
        self._frequencies, self._amplitude = spec.rope_frequencies(), spec.rope_amplitude()

    def forward(self, batch: ForwardBatch, signal: LayerSignal | None = None) -> Float:
        """Write the rows' KV into their blocks and return logits float32[wanted, vocabulary]."""
        sequences = self._open_sequences(batch)
        hidden = self._weights.embedding[batch.tokens]
        for index, layer in enumerate(self._weights.layers):
            hidden = hidden + self._attend(index, layer, hidden, sequences)
            hidden = hidden + self._feed_forward(layer, hidden)
            if signal is not None:
                os.eventfd_write(signal.fd, 1)
        wanted = self._normalise(hidden[batch.logit_rows], self._weights.output_norm)
        return self._project(self._weights.head, wanted)

    def close(self) -> None:
        """Nothing to end."""

    def _open_sequences(self, batch: ForwardBatch) -> list[_SequenceRows]:
        sequences, tokens = [], self.layout.block_tokens
        for at, (start, stop) in enumerate(zip(batch.starts[:-1], batch.starts[1:], strict=True)):
            positions = batch.positions[start:stop]
            if len(positions):
                count = self.layout.blocks_for(int(positions[-1]) + 1)
                blocks = [map_block(int(address), self.layout) for address in batch.blocks[at, :count]]
                sequences.append(_SequenceRows(slice(start, stop), positions, tokens, blocks))
        return sequences

    def _attend(
        self, index: int, layer: LayerWeights, hidden: Float, sequences: list[_SequenceRows]
    ) -> Float:
        rows = self._normalise(hidden, layer.attention_norm)
        queries = self._heads(rows, layer.q, layer.q_bias, layer.q_norm)
        keys = self._heads(rows, layer.k, layer.k_bias, layer.k_norm)
        values = self._heads(rows, layer.v, layer.v_bias, None)
        mixed = np.empty_like(queries)
        for sequence in sequences:
            at, positions = sequence.rows, sequence.positions
            sequence.write(index, 0, self._rotate(keys[at], positions))
            sequence.write(index, 1, values[at])
            rotated = self._round(self._rotate(queries[at], positions)).astype(np.float64)
            past = sequence.read(index, 0), sequence.read(index, 1)
            for row, position in enumerate(positions):
                mixed[at.start + row] = _attention(rotated[row], *past, int(position) + 1)
        return self._project(layer.o, mixed.reshape(len(rows), -1))

    def _heads(self, rows: Float, matrix: Float, bias: Float | None, norm: Float | None) -> Float:
        """q, k or v before rotation: [rows, heads, head_dim]."""
        projected = self._project(matrix, rows)
        if bias is not None:
            projected += bias
        heads = projected.reshape(len(rows), -1, self._weights.spec.head_dim)
        return heads if norm is None else self._normalise(heads, norm)

    def _feed_forward(self, layer: LayerWeights, hidden: Float) -> Float:
        rows = self._normalise(hidden, layer.ffn_norm)
        gate, up = self._project(layer.gate, rows), self._project(layer.up, rows)
        activated = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64))) * up
        return self._project(layer.down, activated.astype(np.float32))

    def _normalise(self, rows: Float, scale: Float) -> Float:
        """Root mean square norm over the last axis."""
        wide = rows.astype(np.float64)
        root = np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + self._weights.spec.rms_epsilon)
        normal: Double = wide / root * scale
        return normal.astype(np.float32)

    def _project(self, matrix: Float, rows: Float) -> Float:
        # A matrix product of all rows at once may sum in an order that depends on their number.
        out = np.empty((len(rows), len(matrix)), np.float32)
        for row, target in zip(self._round(rows), out, strict=True):
            target[:] = matrix @ row
        return out

    def _rotate(self, heads: Float, positions: NDArray[np.int32]) -> Float:
        """Rotary embedding of [rows, heads, head_dim]: pairs are (i, i + head_dim / 2)."""
        angles = positions[:, None, None].astype(np.float64) * self._frequencies
        first, second = np.split(heads.astype(np.float64), 2, axis=-1)
        cosine, sine = self._amplitude * np.cos(angles), self._amplitude * np.sin(angles)
        turned = [first * cosine - second * sine, second * cosine + first * sine]
        return np.concatenate(turned, axis=-1).astype(np.float32)


@dataclass(frozen=True, slots=True)
class _SequenceRows:
    """One sequence of a batch: its rows, their positions, and its blocks as arrays (see ``map_block``)."""

    rows: slice
    positions: NDArray[np.int32]
    block_tokens: int
    blocks: list[NDArray[Any]]

    def write(self, layer: int, half: int, heads: Float) -> None:
        """Store [rows, kv_heads, head_dim] as K (``half`` 0) or V (1) of ``layer``."""
        for position, vector in zip(self.positions, heads, strict=True):
            block = self.blocks[position // self.block_tokens][layer, half]
            slot = position % self.block_tokens
            if block.dtype.names:
                block["scales"][:, slot], block["values"][:, slot] = quantise_int8(vector)
            else:
                block[:, slot] = narrow_bf16(vector) if block.dtype == np.uint16 else vector

    def read(self, layer: int, half: int) -> Double:
        """K or V of ``layer`` as [kv_heads, positions, head_dim], up to the end of the last block."""
        values = [_widen(block[layer, half]) for block in self.blocks]
        return np.concatenate(values, axis=1).astype(np.float64)


def _attention(query: Double, keys: Double, values: Double, length: int) -> Double:
    """Softmax attention of [heads, head_dim] over the first ``length`` positions."""
    kv_heads, _, head_dim = keys.shape
    groups = query.reshape(kv_heads, -1, head_dim)
    mixed = np.empty_like(groups)
    for head in range(kv_heads):
        # Beyond ``length`` a block holds whatever was there before, so those positions never take part.
        scores = groups[head] @ keys[head, :length].T / np.sqrt(head_dim)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed[head] = weights @ values[head, :length] / weights.sum(axis=-1, keepdims=True)
    return mixed.reshape(-1, head_dim)


def map_block(address: int, layout: KVLayout) -> NDArray[Any]:
    """The block at ``address`` as a writable array [layers, 2, kv_heads, block_tokens, head_dim].

    float32, or uint16 holding bf16. For int8: [layers, 2, kv_heads] of records with float32 ``scales``
    [block_tokens] and int8 ``values`` [block_tokens, head_dim]. The memory belongs to the pool.
    """
    assert layout.order == "plain", f"the reference runner reads plain blocks, not {layout.order}"
    raw = np.ctypeslib.as_array((ctypes.c_uint8 * layout.block_bytes).from_address(address))
    tokens, dim = layout.block_tokens, layout.head_dim
    if layout.dtype == "int8":
        record = np.dtype([("scales", np.float32, (tokens,)), ("values", np.int8, (tokens, dim))])
        heads: NDArray[Any] = raw.view(record)
        return heads.reshape(layout.layers, 2, layout.kv_heads)
    numbers: NDArray[Any] = raw.view(np.uint16 if layout.dtype == "bf16" else np.float32)
    return numbers.reshape(layout.layers, 2, layout.kv_heads, tokens, dim)


def quantise_int8(rows: Float) -> tuple[Float, NDArray[np.int8]]:
    """Scales float32[...] and int8[..., n] of ``rows`` [..., n]: value = int8 x scale, largest / 127.

    Rows below the normal numbers become 0; those that are not finite get the scale NaN.
    """
    scales = (np.abs(rows).max(-1) / np.float32(127)).astype(np.float32)
    scales[scales < np.finfo(np.float32).tiny] = 0
    scales[~np.isfinite(rows).all(-1)] = np.nan
    inverse = np.zeros_like(scales)
    np.divide(np.float32(1), scales, out=inverse, where=scales > 0)
    steps = np.where(np.isfinite(rows), rows, 0) * inverse[..., None]
    return scales, np.rint(steps).astype(np.int8)


def _widen(stored: NDArray[Any]) -> Float:
    """Stored K or V of one layer and block as float32[kv_heads, block_tokens, head_dim]."""
    if stored.dtype.names:
        scaled: Float = stored["values"] * stored["scales"][..., None]
        return scaled
    return widen_bf16(stored) if stored.dtype == np.uint16 else stored


def narrow_bf16(values: Float) -> NDArray[np.uint16]:
    """bf16 bits nearest to ``values``, ties to even; finite values only."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def round_bf16(values: Float) -> Float:
    """``values`` rounded to the nearest numbers that bf16 can hold."""
    return widen_bf16(narrow_bf16(values))


def _keep(values: Float) -> Float:
    return values


def _round_weights(weights: ModelWeights) -> ModelWeights:
    """Matrices rounded to bf16, norms and biases as they are."""
    embedding = round_bf16(weights.embedding)
    head = embedding if weights.head is weights.embedding else round_bf16(weights.head)
    layers = [
        LayerWeights(**{part.name: _round_matrix(getattr(layer, part.name)) for part in fields(layer)})
        for layer in weights.layers
    ]
    return ModelWeights(weights.spec, embedding, weights.output_norm, head, layers)


def _round_matrix(values: Any) -> Any:
    is_matrix = values is not None and values.ndim == 2
    return round_bf16(values) if is_matrix else values
