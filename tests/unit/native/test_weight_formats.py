"""Weights kept in 4 and 8 bits: bit for bit what the same weights give in bf16, in passes of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest

from memserve import _native
from memserve.core.errors import ModelError
from memserve.engine.models.ggml_types import GGML_TYPES
from memserve.engine.models.spec import (
    Float,
    LayerWeights,
    Matrix,
    ModelSpec,
    ModelWeights,
    StoredLayer,
    StoredMatrix,
    StoredWeights,
)
from memserve.engine.models.tiny import tiny_weights
from memserve.engine.runners.base import ForwardBatch
from memserve.engine.runners.native import NativeRunner

EVERY_ISA = [*_native.supported_isas(), *_native.emulated_isas()]
TYPES = {kind.name: kind for kind in GGML_TYPES.values()}
# Bytes of a block's f16 numbers, and how large they may be for weights of about 1 / sqrt(256).
SCALES = {
    "Q4_0": ((0,), 2e-2),
    "Q4_1": ((0, 2), 1e-2),
    "Q8_0": ((0,), 1e-3),
    "Q4_K": ((0, 2), 2e-4),
    "Q6_K": ((208,), 3e-5),
}
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
ROWS = 45

Kinds = dict[str, str]
Build = Callable[..., NativeRunner]


@pytest.fixture
def build() -> Iterator[Build]:
    """Build runners that are closed after the test."""
    built: list[NativeRunner] = []

    def make(
        weights: ModelWeights | StoredWeights, isa: str, *, threads: int = 1, **more: str
    ) -> NativeRunner:
        built.append(NativeRunner(weights, threads=threads, context=64, isa=isa, **more))  # type: ignore[arg-type]
        return built[-1]

    yield make
    for runner in built:
        runner.close()


def random_blocks(rng: np.random.Generator, kind: str, outputs: int, inputs: int) -> StoredMatrix:
    """Any bytes; scales and minima of both signs, some of them zero or too small to be normal in f16."""
    stored = TYPES[kind]
    raw = rng.integers(0, 256, (outputs * inputs // stored.values, stored.size), dtype=np.uint8)
    starts, size = SCALES[kind]
    for start in starts:
        scales = rng.standard_normal(len(raw)) * size * rng.choice([1, 1, 1, 1, 1e-3, 0], len(raw))
        raw[:, start : start + 2] = scales.astype(np.float16)[:, None].view(np.uint8)
    return StoredMatrix(kind, raw.reshape(outputs, -1), inputs)


def expanded(matrix: Matrix) -> Float:
    if not isinstance(matrix, StoredMatrix):
        return matrix
    return TYPES[matrix.kind].dequantize(matrix.rows.reshape(-1)).reshape(len(matrix.rows), matrix.inputs)


def stored_weights(kinds: Kinds, *, seed: int = 1, **shape: int) -> StoredWeights:
    """A model whose parts are blocks of the types in ``kinds``; others, and what is not named, is float32."""
    rng = np.random.default_rng(seed)
    base = tiny_weights(
        seed, **{"hidden": 256, "feed_forward": 256, "vocabulary": 301, "tied": False, **shape}
    )

    def matrix(part: str, values: Float) -> Matrix:
        kind = kinds.get(part, kinds.get("all"))
        return random_blocks(rng, kind, *values.shape) if kind else values

    layers = [
        StoredLayer(
            attention_norm=layer.attention_norm,
            ffn_norm=layer.ffn_norm,
            **{part: matrix(part, getattr(layer, part)) for part in MATRICES},
        )
        for layer in base.layers
    ]
    embedding, head = matrix("embedding", base.embedding), matrix("head", base.head)
    return StoredWeights(base.spec, embedding, base.output_norm, head, layers)


def in_floats(weights: StoredWeights) -> ModelWeights:
    """The same model in float32, expanded by numpy."""
    assert weights.head is not None
    layers = [
        LayerWeights(
            attention_norm=layer.attention_norm,
            ffn_norm=layer.ffn_norm,
            **{part: expanded(getattr(layer, part)) for part in MATRICES},
        )
        for layer in weights.layers
    ]
    head = expanded(weights.head)
    return ModelWeights(weights.spec, expanded(weights.embedding), weights.output_norm, head, layers)


def logits_of(runner: NativeRunner, spec: ModelSpec, chunks: list[int]) -> Float:
    """Logits of all rows of one conversation that arrives in ``chunks``."""
    layout = runner.layout
    width = layout.blocks_for(sum(chunks))
    memory = np.full(width * layout.block_bytes, 0xFF, np.uint8)
    blocks = np.uint64(memory.ctypes.data) + np.arange(width, dtype=np.uint64) * np.uint64(layout.block_bytes)
    tokens = np.random.default_rng(5).integers(0, spec.vocabulary, sum(chunks), np.int32)
    edges = np.cumsum([0, *chunks])
    parts = []
    for begin, end in pairwise(edges):
        rows = np.arange(end - begin, dtype=np.int32)
        positions = rows + np.int32(begin)
        batch = ForwardBatch(
            tokens[begin:end], positions, np.array([0, len(rows)], np.int32), blocks[None], rows
        )
        parts.append(np.array(runner.forward(batch)))
    return np.concatenate(parts)


CHUNKS = [ROWS], [1, 2, 3, 4, 5, 6, 7, 17]


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_give_the_bits_of_bf16(build: Build, kind: str, isa: str, threads: int) -> None:
    weights = stored_weights({"all": kind})
    expected = logits_of(build(in_floats(weights), isa), weights.spec, [ROWS])
    assert np.isfinite(expected).all()
    assert np.std(expected) > 1e-3
    runner = build(weights, isa, threads=threads)
    for chunks in CHUNKS:
        np.testing.assert_array_equal(logits_of(runner, weights.spec, chunks), expected)


@pytest.mark.parametrize("isa", EVERY_ISA)
def test_formats_that_differ_inside_a_layer(build: Build, isa: str) -> None:
    """Fused products take neighbours of one format together; gate and up must share one."""
    kinds = {
        "q": "Q4_K",
        "k": "Q4_K",
        "v": "Q6_K",
        "gate": "Q4_0",
        "up": "Q8_0",
        "down": "Q6_K",
        "head": "Q6_K",
    }
    weights = stored_weights(kinds)
    expected = logits_of(build(in_floats(weights), isa), weights.spec, [ROWS])
    for chunks in CHUNKS:
        np.testing.assert_array_equal(
            logits_of(build(weights, isa, threads=2), weights.spec, chunks), expected
        )


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize(
    "shape",
    [
        {"hidden": 32, "heads": 2, "kv_heads": 1, "feed_forward": 96, "vocabulary": 17},
        {"hidden": 96, "heads": 6, "kv_heads": 2, "head_dim": 32, "feed_forward": 160, "vocabulary": 250},
        {"hidden": 576, "heads": 9, "kv_heads": 3, "feed_forward": 1536, "layers": 1},
    ],
)
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_shapes_of_any_width(build: Build, shape: dict[str, int], kind: str, isa: str) -> None:
    weights = stored_weights({"all": kind}, **shape)
    expected = logits_of(build(in_floats(weights), isa), weights.spec, [ROWS])
    for chunks in CHUNKS:
        np.testing.assert_array_equal(logits_of(build(weights, isa), weights.spec, chunks), expected)


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("kind", SCALES)
def test_kept_as_bf16(build: Build, kind: str, isa: str) -> None:
    weights = stored_weights({"all": kind})
    stored, wide = build(weights, isa), build(weights, isa, keep="bf16")
    np.testing.assert_array_equal(
        logits_of(wide, weights.spec, [ROWS]), logits_of(stored, weights.spec, [ROWS])
    )
    assert stored.weight_bytes < 0.6 * wide.weight_bytes
    assert stored.layout.fingerprint == wide.layout.fingerprint


@pytest.mark.parametrize("isa", EVERY_ISA)
def test_floats_as_8_bit_groups(build: Build, isa: str) -> None:
    """As ggml's Q8_0: the largest of 32 weights is 127 times an f16 scale. Another model, so other KV."""
    weights = stored_weights({})
    groups = build(weights, isa, keep="int8")
    rounded = StoredWeights(
        weights.spec,
        as_q8_0(weights.embedding),
        weights.output_norm,
        as_q8_0(weights.head),
        [
            StoredLayer(
                attention_norm=layer.attention_norm,
                ffn_norm=layer.ffn_norm,
                **{part: as_q8_0(getattr(layer, part)) for part in MATRICES},
            )
            for layer in weights.layers
        ],
    )
    np.testing.assert_array_equal(
        logits_of(groups, weights.spec, [ROWS]), logits_of(build(rounded, isa), weights.spec, [ROWS])
    )
    assert groups.layout.fingerprint != build(weights, isa).layout.fingerprint


def as_q8_0(matrix: Matrix | None) -> StoredMatrix:
    assert isinstance(matrix, np.ndarray)
    groups = matrix.reshape(-1, 32)
    scales = (np.abs(groups).max(1) / np.float32(127)).astype(np.float16)
    values = np.rint(groups / scales[:, None].astype(np.float32)).clip(-127, 127).astype(np.int8)
    raw = np.concatenate([scales[:, None].view(np.uint8), values.view(np.uint8)], axis=1)
    return StoredMatrix("Q8_0", raw.reshape(len(matrix), -1), matrix.shape[1])


@pytest.mark.parametrize("keep", ["stored", "bf16"])
@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E01])
def test_scales_that_are_not_finite(keep: str, bits: int) -> None:
    weights = stored_weights({"down": "Q4_1"})
    layers = list(weights.layers)
    down = layers[1].down
    assert isinstance(down, StoredMatrix)
    down.rows[3, 20:22] = np.array([bits], np.uint16).view(np.uint8)
    with pytest.raises(ModelError, match="down: a scale is not a finite number"):
        NativeRunner(weights, threads=1, context=64, keep=keep)


@pytest.mark.parametrize(
    ("kind", "size", "inputs", "message"),
    [
        ("Q4_1", 19, 32, "rows of 19 bytes do not hold 32 inputs of type Q4_1"),
        ("Q4_K", 72, 128, "rows of 72 bytes do not hold 128 inputs of type Q4_K"),
        ("Q8_0", 0, 0, "do not hold 0 inputs"),
        ("Q5_K", 176, 256, "blocks of type Q5_K have no packed form"),
    ],
)
def test_blocks_that_do_not_fit(kind: str, size: int, inputs: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _native.Matrix.of_blocks(kind, np.zeros((4, size), np.uint8), inputs)
