"""Small random models that behave like real ones: for tests, examples and simulations."""

from __future__ import annotations

import numpy as np

from memserve.engine.models.rope import RopeScaling
from memserve.engine.models.spec import Float, LayerWeights, ModelSpec, ModelWeights


def tiny_weights(
    seed: int,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    feed_forward: int | None = None,
    vocabulary: int = 256,
    context: int = 512,
    tied: bool = True,
    attention_bias: bool = False,
    qk_norm: bool = False,
    rope_scaling: RopeScaling | None = None,
) -> ModelWeights:
    """A random model, equal for equal arguments; logits have a spread of about 1, so that tokens differ.

    ``head_dim`` defaults to hidden / heads, ``feed_forward`` to 2 * hidden.
    """
    extras = [attention_bias and "bias", qk_norm and "norm", rope_scaling]
    traits = "".join(f"-{extra}" for extra in extras if extra)
    shape = f"{layers}x{hidden}-{heads}-{kv_heads}-{head_dim}-{feed_forward}-{vocabulary}"
    spec = ModelSpec(
        identity=f"tiny-{seed}-{shape}{traits}",
        architecture="llama",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim or hidden // heads,
        feed_forward=feed_forward or 2 * hidden,
        vocabulary=vocabulary,
        context=context,
        rms_epsilon=1e-5,
        rope_theta=10000.0,
        eos_tokens=(0,),
        rope_scaling=rope_scaling,
        attention_bias=attention_bias,
        qk_norm=qk_norm,
    )
    rng = np.random.default_rng(seed)
    embedding = _matrix(rng, vocabulary, hidden)
    head = embedding if tied else _matrix(rng, vocabulary, hidden)
    weights = ModelWeights(spec, embedding, _norm(rng, hidden), head)
    weights.layers = [_layer(rng, spec) for _ in range(layers)]
    for layer in weights.layers:
        _add_vectors(rng, spec, layer)
    return weights


def _layer(rng: np.random.Generator, spec: ModelSpec) -> LayerWeights:
    hidden, wide, narrow = spec.hidden, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    return LayerWeights(
        attention_norm=_norm(rng, hidden),
        # Larger q and k make attention choose instead of averaging over everything.
        q=_matrix(rng, wide, hidden) * np.float32(2),
        k=_matrix(rng, narrow, hidden) * np.float32(2),
        v=_matrix(rng, narrow, hidden),
        o=_matrix(rng, hidden, wide),
        ffn_norm=_norm(rng, hidden),
        gate=_matrix(rng, spec.feed_forward, hidden),
        up=_matrix(rng, spec.feed_forward, hidden),
        down=_matrix(rng, hidden, spec.feed_forward),
    )


def _add_vectors(rng: np.random.Generator, spec: ModelSpec, layer: LayerWeights) -> None:
    # Drawn after all matrices, so that models of one seed share those whatever they have besides.
    wide, narrow = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    if spec.attention_bias:
        layer.q_bias, layer.k_bias, layer.v_bias = (
            np.float32(0.5) * rng.standard_normal(size, dtype=np.float32) for size in (wide, narrow, narrow)
        )
    if spec.qk_norm:
        layer.q_norm, layer.k_norm = (np.float32(2) * _norm(rng, spec.head_dim) for _ in range(2))


def _matrix(rng: np.random.Generator, outputs: int, inputs: int) -> Float:
    """Entries that keep the size of a unit-variance input."""
    return rng.standard_normal((outputs, inputs), dtype=np.float32) / np.float32(np.sqrt(inputs))


def _norm(rng: np.random.Generator, size: int) -> Float:
    return np.float32(1) + np.float32(0.1) * rng.standard_normal(size, dtype=np.float32)
