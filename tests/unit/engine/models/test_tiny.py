"""Tiny models: equal for equal seeds, in the requested shapes, and of the size that real ones have."""

from __future__ import annotations

import numpy as np

from memserve.engine.models.llama import layer_shapes
from memserve.engine.models.tiny import tiny_weights


def test_equal_seeds_give_equal_models() -> None:
    one, two, other = tiny_weights(5), tiny_weights(5), tiny_weights(6)
    np.testing.assert_array_equal(one.layers[1].down, two.layers[1].down)
    assert one.spec.identity == two.spec.identity != other.spec.identity
    assert np.abs(one.embedding - other.embedding).max() > 0.1


def test_shapes_are_those_of_the_family() -> None:
    weights = tiny_weights(
        0, layers=3, hidden=48, heads=6, kv_heads=3, head_dim=16, feed_forward=80, tied=False
    )
    shapes = layer_shapes(weights.spec)
    assert len(weights.layers) == 3
    assert all(
        getattr(layer, part).shape == shape for layer in weights.layers for part, shape in shapes.items()
    )
    assert shapes["q"] == (96, 48)
    assert weights.head is not weights.embedding
    assert weights.embedding.dtype == weights.layers[0].q.dtype == np.float32
