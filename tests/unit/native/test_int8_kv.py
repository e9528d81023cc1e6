"""KV in int8: what is written into a block, and what zeros, extreme and broken numbers do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from memserve import _native
from memserve.engine.models.spec import ModelWeights

EVERY_ISA = [*_native.supported_isas(), *_native.emulated_isas()]
SHAPE = {"layers": 2, "heads": 6, "kv_heads": 2, "head_dim": 32}
BLOCK = 16
ROWS = 300  # more than a segment

Build = Callable[..., Any]


def heads_of(model: Any, sequence: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales [layers, 2, kv_heads, tokens] and int8 values [layers, 2, kv_heads, tokens, head_dim]."""
    layout = model.runner.layout
    dim, shape = layout.head_dim, (layout.layers, 2, layout.kv_heads)
    heads = model.kv_of(sequence).reshape(-1, *shape, 4 * BLOCK + BLOCK * dim)
    scales = np.ascontiguousarray(heads[..., : 4 * BLOCK]).view(np.float32)
    values = np.ascontiguousarray(heads[..., 4 * BLOCK :]).view(np.int8)
    keys = values[:, :, 0].reshape(-1, *shape[::2], dim // 2, BLOCK, 2)
    keys = keys.transpose(0, 1, 2, 4, 3, 5).reshape(-1, *shape[::2], BLOCK, dim)
    pairs = values[:, :, 1].reshape(-1, *shape[::2], BLOCK // 2, dim, 2)
    pairs = pairs.transpose(0, 1, 2, 3, 5, 4).reshape(-1, *shape[::2], BLOCK, dim)
    both = np.stack([keys, pairs], axis=2)
    return np.concatenate(list(scales), axis=-1), np.concatenate(list(both), axis=-2)


def bf16_heads_of(model: Any, sequence: int) -> np.ndarray:
    """[layers, 2, kv_heads, tokens, head_dim] of a model with KV in bf16."""
    layout = model.runner.layout
    shape, dim = (layout.layers, layout.kv_heads), layout.head_dim
    bits = model.kv_of(sequence).view(np.uint16).astype(np.uint32) << 16
    numbers = bits.view(np.float32).reshape(-1, layout.layers, 2, layout.kv_heads, BLOCK * dim)
    keys = numbers[:, :, 0].reshape(-1, *shape, dim // 2, BLOCK, 2).transpose(0, 1, 2, 4, 3, 5)
    pairs = numbers[:, :, 1].reshape(-1, *shape, BLOCK // 2, dim, 2).transpose(0, 1, 2, 3, 5, 4)
    both = np.stack([part.reshape(-1, *shape, BLOCK, dim) for part in (keys, pairs)], axis=2)
    return np.concatenate(list(both), axis=-2)


@pytest.mark.parametrize("isa", EVERY_ISA)
def test_a_value_is_its_token_s_scale_times_a_step(build: Build, isa: str) -> None:
    rows = 33
    int8, bf16 = (build(isa, kv_dtype=dtype, **SHAPE) for dtype in ("int8", "bf16"))
    for model in (int8, bf16):
        model.forward([model.rows(0, 0, rows)])
    scales, steps = (part[:1, :, :, :rows] for part in heads_of(int8, 0))
    expected = bf16_heads_of(bf16, 0)[:1, :, :, :rows]
    assert (np.abs(steps.astype(int)).max(-1) == 127).all()
    np.testing.assert_allclose(127 * scales, np.abs(expected).max(-1), rtol=2**-8)
    error = np.abs(scales[..., None] * steps - expected)
    assert (error <= 0.5001 * scales[..., None] + 2**-8 * np.abs(expected)).all()


@pytest.mark.parametrize("isa", EVERY_ISA)
def test_nothing_is_written_beside_a_row(build: Build, isa: str) -> None:
    model = build(isa, kv_dtype="int8", context=64, **SHAPE)
    model.forward([model.rows(0, 0, 19)])
    scales, steps = heads_of(model, 0)
    assert np.isfinite(scales[..., :19]).all()
    assert (scales[..., 19:].view(np.uint32) == 0xFFFFFFFF).all()
    assert (steps[..., 19:, :] == -1).all()


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("silent", ["k", "v", "q"])
def test_vectors_of_zeros(build: Build, oracle: Callable[..., Any], isa: str, silent: str) -> None:
    def change(weights: ModelWeights) -> None:
        for layer in weights.layers:
            getattr(layer, silent)[:] = 0

    model = build(isa, kv_dtype="int8", context=ROWS, change=change, **SHAPE)
    (logits,) = model.forward([model.rows(0, 0, ROWS)])
    expected = oracle(model.weights, model.tokens[0, :ROWS], "int8")
    assert np.sqrt(((logits - expected) ** 2).mean()) < 8e-3
    if silent != "q":
        scales, steps = (part[:, "kv".index(silent)] for part in heads_of(model, 0))
        assert not scales[..., :ROWS].any()
        assert not steps[..., :ROWS, :].any()


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize(("grown", "shrunk"), [("v", "o"), ("k", "q"), ("q", "k")])
@pytest.mark.parametrize("power", [60, 100])
def test_huge_and_tiny_numbers(build: Build, isa: str, grown: str, shrunk: str, power: int) -> None:
    """A power of two more in one matrix and less in the next: every sum is the same, to the last bit."""

    def change(weights: ModelWeights) -> None:
        for layer in weights.layers:
            getattr(layer, grown)[:] *= np.float32(2.0**power)
            getattr(layer, shrunk)[:] *= np.float32(2.0**-power)

    usual, extreme = (
        build(isa, kv_dtype="int8", context=ROWS, **SHAPE, **changed) for changed in ({}, {"change": change})
    )
    expected, found = (model.forward([model.rows(0, 0, ROWS)])[0] for model in (usual, extreme))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("broken", [np.inf, np.nan])
def test_what_is_not_finite_spoils_what_attends_to_it_and_nothing_else(
    build: Build, isa: str, broken: float
) -> None:
    def change(weights: ModelWeights) -> None:
        weights.embedding = weights.embedding.copy()  # not the tied head
        weights.embedding[7, 3] = broken

    sound, model = (
        build(isa, kv_dtype="int8", context=ROWS, sequences=2, tied=False, **SHAPE, **changed)
        for changed in ({}, {"change": change})
    )
    for each in (sound, model):
        each.tokens[each.tokens == 7] = 8
    model.tokens[0, 270] = 7
    parts = [model.rows(0, 0, ROWS), model.rows(1, 0, 40)]
    (spoiled, neighbour), expected = model.forward(parts), sound.forward(parts)
    np.testing.assert_array_equal(spoiled[:270], expected[0][:270])
    np.testing.assert_array_equal(neighbour, expected[1])
    assert np.isnan(spoiled[270:]).any(-1).all()
