"""The runner for CPUs: C++ kernels on bf16 weights and KV, reading pool blocks in place.

Knows how ModelWeights map onto the native model; what the kernels compute is in ``native/``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memserve import _native
from memserve.core.errors import ConfigError, ModelError
from memserve.engine.models.spec import LayerWeights, ModelSpec, ModelWeights
from memserve.engine.runners.base import ForwardBatch
from memserve.mempool.layout import KVLayout

Float = NDArray[np.float32]


class NativeRunner:
    """Forward passes of a Llama-like model on this machine's CPU.

    bf16 weights, KV and inputs of matrix products; float32 sums, residual stream, norms, rotary embedding
    and softmax. The bits of a row depend on its tokens alone: not on the batch, chunking, cached prefixes or
    threads. Instruction sets round differently: KV computed on one is valid, not bit-equal, on another.

    Parameters
    ----------
    weights : copied into packed form; the caller may drop them afterwards.
    threads : threads per pass, the caller's included; at most the cores this process may use.
    context : longest position + 1 that will be asked for, in tokens.
    isa : one of ``_native.supported_isas()``; by default the best.
    pin : keep each worker thread on a core of its own.

    Raises
    ------
    ConfigError : threads, context or isa are impossible here.
    ModelError : the weights do not have the shapes that their spec states.
    """

    def __init__(
        self, weights: ModelWeights, *, threads: int, context: int, isa: str | None = None, pin: bool = False
    ) -> None:
        spec = weights.spec
        if context < 1:
            raise ConfigError(f"context is {context}; it must be at least 1 token")
        if len(weights.layers) != spec.layers:
            given = len(weights.layers)
            raise ModelError(f"{spec.identity}: {given} layers of weights, the spec says {spec.layers}")
        self._layout = KVLayout(spec.identity, spec.layers, spec.kv_heads, spec.head_dim)
        self._model: _native.Model | None = _build_model(spec, threads, context, isa, pin)
        self._isa: str = self._model.isa
        try:
            _fill_model(self._model, weights)
        except (ValueError, TypeError) as error:
            raise ModelError(f"{spec.identity}: {error}") from error

    @property
    def layout(self) -> KVLayout:
        """bf16, tile order."""
        return self._layout

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._isa

    def forward(self, batch: ForwardBatch) -> Float:
        """Write the rows' KV into their blocks and return logits float32[wanted, vocabulary].

        Raises ValueError, before anything is written, if the batch does not hold together.
        """
        assert self._model is not None, "forward() on a closed runner"
        return self._model.forward(
            batch.tokens, batch.positions, batch.starts, batch.blocks, batch.logit_rows
        )

    def close(self) -> None:
        """End the worker threads and release the weights."""
        self._model = None


def rope_tables(spec: ModelSpec, context: int) -> tuple[Float, Float]:
    """Cosines and sines, float32[context, head_dim / 2]; angles computed in float64."""
    angles = np.outer(np.arange(context, dtype=np.float64), spec.rope_frequencies())
    amplitude = spec.rope_amplitude()
    return (amplitude * np.cos(angles)).astype(np.float32), (amplitude * np.sin(angles)).astype(np.float32)


def _build_model(spec: ModelSpec, threads: int, context: int, isa: str | None, pin: bool) -> _native.Model:
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
            pin=pin,
            isa=isa,
        )
    except ValueError as error:
        raise ConfigError(f"{spec.identity}: {error}") from error


def _fill_model(model: _native.Model, weights: ModelWeights) -> None:
    for index, layer in enumerate(weights.layers):
        _set_layer(model, index, layer)
        _set_head_vectors(model, index, layer)
    model.set_embedding(_rows(weights.embedding))
    tied = weights.head is weights.embedding
    model.set_output(_rows(weights.output_norm), None if tied else _rows(weights.head))


def _set_layer(model: _native.Model, index: int, layer: LayerWeights) -> None:
    model.set_layer(
        index,
        attention_norm=_rows(layer.attention_norm),
        q=_rows(layer.q),
        k=_rows(layer.k),
        v=_rows(layer.v),
        o=_rows(layer.o),
        ffn_norm=_rows(layer.ffn_norm),
        gate=_rows(layer.gate),
        up=_rows(layer.up),
        down=_rows(layer.down),
    )


def _set_head_vectors(model: _native.Model, index: int, layer: LayerWeights) -> None:
    biases = [bias for bias in (layer.q_bias, layer.k_bias, layer.v_bias) if bias is not None]
    model.set_head_vectors(
        index,
        qkv_bias=_rows(np.concatenate(biases)) if biases else None,
        q_norm=None if layer.q_norm is None else _rows(layer.q_norm),
        k_norm=None if layer.k_norm is None else _rows(layer.k_norm),
    )


def _rows(values: Float) -> Float:
    return np.ascontiguousarray(values, np.float32)
