"""The runner for CPUs: C++ kernels on bf16 weights, reading KV in place in the pool's blocks.

Knows how ModelWeights map onto the native model; what the kernels compute is in ``native/``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memserve import _native
from memserve.core.config import Activations
from memserve.core.errors import ConfigError, ModelError
from memserve.engine.models.packed import PackedVectors, PackedWeights
from memserve.engine.models.spec import (
    LayerWeights,
    Matrix,
    ModelSpec,
    ModelWeights,
    StoredLayer,
    StoredMatrix,
    StoredWeights,
)
from memserve.engine.runners.base import ForwardBatch, LayerSignal
from memserve.mempool.layout import KVLayout

Float = NDArray[np.float32]


class NativeRunner:
    """Forward passes of a Llama-like model on this machine's CPU.

    float32 sums, residual stream, norms, rotary embedding and softmax. What the file has in 4 or 8 bits is
    kept and read like that; matrices are multiplied in bf16, or those in 4 and 8 bits as integers.
    The bits of a row depend on its tokens alone: not on the batch, chunking, cached prefixes or threads.
    Instruction sets round differently: KV computed on one is valid, not bit-equal, on another.

    Parameters
    ----------
    weights : copied into packed form, and the caller may drop them afterwards; or packed before, and used in
        place: ``keep`` must be what it was then.
    keep : ``stored``: GGML blocks as they are, all else as bf16; ``bf16``: everything, which gives the same
        bits from more memory; ``int8``: float32 becomes groups of 8 bits, which changes the model a little.
    activations : ``int8``: inputs of products with weights of 4 and 8 bits are rounded to 8 bits in groups of
        32, and multiplied as integers; faster, and other numerics, so its KV has an identity of its own.
    kv_dtype : ``bf16`` or ``int8``, how KV is kept. Rows are rounded once, when they are written, and all
        attention reads what was written. An int8 row that is not finite makes all NaN that attends to it.
    threads : threads per pass, the caller's included; at most the cores this process may use.
    context : longest position + 1 that will be asked for, in tokens.
    isa : one of ``_native.supported_isas()``; by default the best.
    cores : one per thread: workers stay on theirs; the first is for the thread that calls ``forward``, which
        has to see to that itself. By default threads run where the system puts them.

    Raises
    ------
    ConfigError : threads, cores, context or isa are impossible here.
    ModelError : the weights do not have the shapes that their spec states.
    """

    def __init__(
        self,
        weights: ModelWeights | StoredWeights | PackedWeights,
        *,
        threads: int,
        context: int,
        isa: str | None = None,
        cores: Sequence[int] = (),
        keep: str = "stored",
        activations: Activations = Activations.BF16,
        kv_dtype: str = "bf16",
    ) -> None:
        spec = weights.spec
        if context < 1:
            raise ConfigError(f"context is {context}; it must be at least 1 token")
        self._model: _native.Model | None = _build_model(
            spec, threads, context, isa, cores, keep, activations, kv_dtype
        )
        self._isa: str = self._model.isa
        self._spec, self._keep = spec, keep
        try:
            self._vectors = _fill_model(self._model, weights)
        except (ValueError, TypeError) as error:
            raise ModelError(f"{spec.identity}: {error}") from error
        identity = f"{spec.identity}-int8" if keep == "int8" else spec.identity
        if self._model.multiplies_integers:
            identity += "-int8-activations"
        self._layout = KVLayout(identity, spec.layers, spec.kv_heads, spec.head_dim, dtype=kv_dtype)

    @property
    def layout(self) -> KVLayout:
        """Tile order."""
        return self._layout

    @property
    def weight_bytes(self) -> int:
        """Memory of the packed weights."""
        assert self._model is not None, "weight_bytes of a closed runner"
        return self._model.weight_bytes

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._isa

    @property
    def tile_rows(self) -> int:
        """Bounded by the scratch memory."""
        return _native.Model.tile_rows

    def packed(self) -> PackedWeights:
        """The weights as this runner reads them, in place: they outlive the runner."""
        assert self._model is not None, "packed() of a closed runner"
        vectors = self._vectors
        return PackedWeights(
            self._spec,
            self._keep,
            self._model.packed(),
            self._model.placed(),
            vectors.layers,
            vectors.output_norm,
        )

    def forward(self, batch: ForwardBatch, signal: LayerSignal | None = None) -> Float:
        """Write the rows' KV into their blocks and return logits float32[wanted, vocabulary].

        Raises ValueError, before anything is written, if the batch does not hold together.
        """
        assert self._model is not None, "forward() on a closed runner"
        return self._model.forward(
            batch.tokens,
            batch.positions,
            batch.starts,
            batch.blocks,
            batch.logit_rows,
            -1 if signal is None else signal.fd,
            1 if signal is None else signal.every,
        )

    def close(self) -> None:
        """End the worker threads and release the weights."""
        self._model = None


def rope_tables(spec: ModelSpec, context: int) -> tuple[Float, Float]:
    """Cosines and sines, float32[context, head_dim / 2]; angles computed in float64."""
    angles = np.outer(np.arange(context, dtype=np.float64), spec.rope_frequencies())
    amplitude = spec.rope_amplitude()
    return (amplitude * np.cos(angles)).astype(np.float32), (amplitude * np.sin(angles)).astype(np.float32)


def _build_model(
    spec: ModelSpec,
    threads: int,
    context: int,
    isa: str | None,
    cores: Sequence[int],
    keep: str,
    activations: str,
    kv_dtype: str,
) -> _native.Model:
    cosines, sines = rope_tables(spec, context)
    try:
        return _native.Model(
            layers=spec.layers,
            hidden=spec.hidden,
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            feed_forward=spec.feed_forward,
            vocabulary=spec.vocabulary,
            rms_epsilon=spec.rms_epsilon,
            cosines=cosines,
            sines=sines,
            threads=threads,
            cores=cores,
            isa=isa,
            keep=keep,
            activations=activations,
            kv_dtype=kv_dtype,
        )
    except ValueError as error:
        raise ConfigError(f"{spec.identity}: {error}") from error


@dataclass(frozen=True, slots=True)
class _Vectors:
    layers: list[PackedVectors]
    output_norm: bytes


def _fill_model(model: _native.Model, weights: ModelWeights | StoredWeights | PackedWeights) -> _Vectors:
    if isinstance(weights, PackedWeights):
        model.adopt(weights.memory, weights.matrices)
        vectors = _Vectors(weights.layers, weights.output_norm)
    else:
        vectors = _pack_weights(model, weights)
    if len(vectors.layers) != weights.spec.layers:
        raise ValueError(f"{len(vectors.layers)} layers of weights, the spec says {weights.spec.layers}")
    for index, layer in enumerate(vectors.layers):
        _set_vectors(model, index, layer)
    model.set_output_norm(_from_bytes(vectors.output_norm))
    return vectors


def _pack_weights(model: _native.Model, weights: ModelWeights | StoredWeights) -> _Vectors:
    vectors: list[PackedVectors] = []
    layer: LayerWeights | StoredLayer
    for layer in weights.layers:
        index = len(vectors)
        _require_vectors(weights.spec, index, layer)
        model.set_layer(
            index,
            q=_matrix(layer.q),
            k=_matrix(layer.k),
            v=_matrix(layer.v),
            o=_matrix(layer.o),
            gate=_matrix(layer.gate),
            up=_matrix(layer.up),
            down=_matrix(layer.down),
        )
        vectors.append(_vectors_of(layer))
    model.set_embedding(_matrix(weights.embedding))
    head = None if weights.head is None or weights.head is weights.embedding else _matrix(weights.head)
    model.set_head(head)
    return _Vectors(vectors, _to_bytes(weights.output_norm))


def _require_vectors(spec: ModelSpec, index: int, layer: LayerWeights | StoredLayer) -> None:
    """Raise ValueError unless the layer has the biases and norms of heads that its spec states, no others."""
    wanted = {
        "q_bias": spec.attention_bias,
        "k_bias": spec.attention_bias,
        "v_bias": spec.attention_bias,
        "q_norm": spec.qk_norm,
        "k_norm": spec.qk_norm,
    }
    for name, needed in wanted.items():
        if needed != (getattr(layer, name) is not None):
            problem = "has no" if needed else "has a"
            raise ValueError(f"layer {index} {problem} {name}; the model's settings say otherwise")


def _vectors_of(layer: LayerWeights | StoredLayer) -> PackedVectors:
    biases = [bias for bias in (layer.q_bias, layer.k_bias, layer.v_bias) if bias is not None]
    return PackedVectors(
        attention_norm=_to_bytes(layer.attention_norm),
        ffn_norm=_to_bytes(layer.ffn_norm),
        qkv_bias=_to_bytes(np.concatenate(biases)) if biases else None,
        q_norm=None if layer.q_norm is None else _to_bytes(layer.q_norm),
        k_norm=None if layer.k_norm is None else _to_bytes(layer.k_norm),
    )


def _set_vectors(model: _native.Model, index: int, layer: PackedVectors) -> None:
    model.set_norms(
        index, attention_norm=_from_bytes(layer.attention_norm), ffn_norm=_from_bytes(layer.ffn_norm)
    )
    model.set_head_vectors(
        index,
        qkv_bias=None if layer.qkv_bias is None else _from_bytes(layer.qkv_bias),
        q_norm=None if layer.q_norm is None else _from_bytes(layer.q_norm),
        k_norm=None if layer.k_norm is None else _from_bytes(layer.k_norm),
    )


def _matrix(matrix: Matrix) -> _native.Matrix:
    if isinstance(matrix, StoredMatrix):
        return _native.Matrix.of_blocks(matrix.kind, np.ascontiguousarray(matrix.rows), matrix.inputs)
    return _native.Matrix(_contiguous(matrix))


def _contiguous(values: Float) -> Float:
    return np.ascontiguousarray(values, np.float32)


def _to_bytes(vector: Float) -> bytes:
    return _contiguous(vector).tobytes()


def _from_bytes(raw: bytes) -> Float:
    return np.frombuffer(raw, np.float32)
