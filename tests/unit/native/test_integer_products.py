"""Products of 8-bit inputs and stored weights: bit for bit a numpy model of the arithmetic, on each level."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from memserve import _native
from memserve.core.config import Activations
from memserve.engine.models.ggml_types import GGML_TYPES
from memserve.engine.models.spec import (
    Float,
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
KINDS = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K")
TYPES = {kind.name: kind for kind in GGML_TYPES.values()}
ROWS = (1, 2, 3, 5, 6, 7, 12, 17, 33)

Bits = NDArray[np.uint16]


def random_matrix(rng: np.random.Generator, kind: str, outputs: int, inputs: int) -> StoredMatrix:
    """Any bytes; scales and minima of both signs, some of them zero or too small to be normal in f16."""
    stored = TYPES[kind]
    raw = rng.integers(0, 256, (outputs * inputs // stored.values, stored.size), dtype=np.uint8)
    starts = {"Q4_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,)}.get(kind, (0,))
    for start in starts:
        scales = rng.standard_normal(len(raw)) * 1e-3 * rng.choice([1, 1, 1, 1, 1e-3, 0], len(raw))
        raw[:, start : start + 2] = scales.astype(np.float16)[:, None].view(np.uint8)
    return StoredMatrix(kind, raw.reshape(outputs, -1), inputs)


def random_inputs(rng: np.random.Generator, rows: int, inputs: int) -> Bits:
    """bf16 of very different sizes from group to group; some groups all zero, or all but negligible."""
    sizes = rng.choice([1.0, 1e-3, 1e4, 1e-20, 0.0, 1e-36], (rows, inputs // 32, 1))
    values = rng.standard_normal((rows, inputs // 32, 32)) * sizes
    return to_bf16(values.reshape(rows, inputs))


def to_bf16(values: NDArray[np.floating]) -> Bits:
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: Bits) -> Float:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f16(raw: NDArray[np.uint8]) -> Float:
    return raw.copy().view(np.float16).astype(np.float32)[..., 0]


def stored_steps(matrix: StoredMatrix) -> tuple[NDArray[np.int64], Float, Float]:
    """Of every 32 inputs: values [outputs, steps, 32], scales [.., 2 (per 16)], minima [..]; as ggml says."""
    outputs, steps = len(matrix.rows), matrix.inputs // 32
    blocks = matrix.rows.reshape(outputs, -1, TYPES[matrix.kind].size)
    read = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q6_K": _q6_k}[matrix.kind]
    values, scales, minima = read(blocks)
    return (
        values.reshape(outputs, steps, 32).astype(np.int64),
        scales.reshape(outputs, steps, 2),
        minima.reshape(outputs, steps),
    )


Steps = tuple[NDArray[np.integer], Float, Float]


def _nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _twice(scales: Float) -> Float:
    return np.stack([scales, scales], axis=-1)


def _q4_0(blocks: NDArray[np.uint8]) -> Steps:
    scales = f16(blocks[..., :2])
    return _nibbles(blocks[..., 2:]), _twice(scales), -8 * scales


def _q4_1(blocks: NDArray[np.uint8]) -> Steps:
    return _nibbles(blocks[..., 4:]), _twice(f16(blocks[..., :2])), f16(blocks[..., 2:4])


def _q8_0(blocks: NDArray[np.uint8]) -> Steps:
    scales = f16(blocks[..., :2])
    return blocks[..., 2:].view(np.int8), _twice(scales), np.zeros_like(scales)


def _q4_k(blocks: NDArray[np.uint8]) -> Steps:
    low, mid, high = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    fine = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=-1)
    minimum = np.concatenate([mid & 63, (high >> 4) | (mid >> 6 << 4)], axis=-1)
    quants = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)
    values = np.stack([quants & 15, quants >> 4], axis=-2)
    scales = f16(blocks[..., :2])[..., None] * fine.astype(np.float32)
    return values, _twice(scales), -f16(blocks[..., 2:4])[..., None] * minimum.astype(np.float32)


def _q6_k(blocks: NDArray[np.uint8]) -> Steps:
    shape = blocks.shape[:2]
    low = blocks[..., :128].reshape(*shape, 2, 64)
    high = blocks[..., 128:192].reshape(*shape, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    nibbles = np.concatenate([low & 15, low >> 4], axis=-1).reshape(*shape, 2, 4, 32)
    values = (nibbles | ((high & 3) << 4)).astype(np.int8) - 32
    scales = f16(blocks[..., 208:210])[..., None] * blocks[..., 192:208].view(np.int8).astype(np.float32)
    return values, scales, np.zeros((*shape, 8), np.float32)


def quantise(inputs: Bits) -> tuple[NDArray[np.int64], Float, Float]:
    """Values [rows, groups, 32], scales and sums [rows, groups]; groups are 32 inputs."""
    groups = from_bf16(inputs).reshape(len(inputs), -1, 32)
    largest = np.abs(groups).max(-1)
    counts = largest >= np.float32(2.0**-100)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inverse = np.where(counts, np.float32(127) / largest, np.float32(0))
    values = np.rint(groups * inverse[..., None]).astype(np.int64)
    scales = np.where(counts, largest / np.float32(127), np.float32(0))
    return values, scales, scales * values.sum(-1).astype(np.float32)


def model_of_product(matrix: StoredMatrix, inputs: Bits) -> Float:
    """float32[rows, outputs]; every operation is rounded, in the order that gemm_int8.h states."""
    weights, scales, minima = stored_steps(matrix)
    values, input_scales, sums = quantise(inputs)
    out = np.zeros((len(inputs), len(weights)), np.float32)
    parts = [slice(0, 16), slice(16, 32)] if matrix.kind == "Q6_K" else [slice(0, 32)]
    for step in range(weights.shape[1]):
        for part, lanes in enumerate(parts):
            dots = (values[:, step, lanes] @ weights[:, step, lanes].T).astype(np.float32)
            out += dots * (scales[:, step, part] * input_scales[:, step, None])
        if TYPES[matrix.kind].name.startswith("Q4"):
            out += minima[:, step] * sums[:, step, None]
    return out


def product(matrix: StoredMatrix, inputs: Bits, isa: str) -> Float:
    packed = _native.Matrix.of_blocks(matrix.kind, matrix.rows, matrix.inputs)
    return _native.multiply(packed, inputs, isa=isa, activations="int8")


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_the_arithmetic(kind: str, isa: str) -> None:
    """Every height of register block, odd numbers of column groups, and a last group that is not full."""
    rng = np.random.default_rng(1)
    for outputs in (1, 16, 33, 250):
        matrix = random_matrix(rng, kind, outputs, 512)
        inputs = random_inputs(rng, max(ROWS), 512)
        expected = model_of_product(matrix, inputs)
        assert np.isfinite(expected).all()
        for rows in ROWS:
            np.testing.assert_array_equal(product(matrix, inputs[:rows], isa), expected[:rows])


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("inputs", [32, 96, 608])
def test_depths(kind: str, inputs: int, isa: str) -> None:
    rng = np.random.default_rng(2)
    matrix = random_matrix(rng, kind, 48, inputs)
    rows = random_inputs(rng, 17, inputs)
    np.testing.assert_array_equal(product(matrix, rows, isa), model_of_product(matrix, rows))


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_values_do_not_saturate(kind: str, isa: str) -> None:
    """All bits set, all clear, and the sign bit alone, against inputs of all signs at full scale."""
    rng = np.random.default_rng(3)
    matrix = random_matrix(rng, kind, 48, 256)
    sizes, starts = TYPES[kind].size, {"Q4_1": 4, "Q4_K": 4, "Q6_K": 208}.get(kind, 2)
    blocks = matrix.rows.reshape(48, -1, sizes)
    for row, byte in enumerate((0xFF, 0x00, 0x80, 0x7F) * 12):
        body = blocks[row, :, :starts] if kind == "Q6_K" else blocks[row, :, starts:]
        body[:] = byte
    signs = rng.choice([-1.0, 1.0], (8, 256))
    signs[0], signs[1] = 1, -1
    inputs = to_bf16(signs)
    np.testing.assert_array_equal(product(matrix, inputs, isa), model_of_product(matrix, inputs))


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC1])
def test_what_is_not_finite_stays_in_its_row(kind: str, bits: int, isa: str) -> None:
    """Infinity and NaN make all outputs of their row NaN, and change no other row."""
    rng = np.random.default_rng(4)
    matrix = random_matrix(rng, kind, 20, 256)
    inputs = random_inputs(rng, 7, 256)
    expected = product(matrix, inputs, isa)
    inputs[3, 77] = bits
    found = product(matrix, inputs, isa)
    assert np.isnan(found[3]).all()
    others = np.arange(7) != 3
    np.testing.assert_array_equal(found[others], expected[others])


@pytest.mark.parametrize("isa", EVERY_ISA)
def test_floats_as_8_bit_groups(isa: str) -> None:
    """``keep="int8"`` is multiplied in integers too; a float32 matrix that stays bf16 is not."""
    rng = np.random.default_rng(5)
    values = rng.standard_normal((33, 96), dtype=np.float32)
    inputs = random_inputs(rng, 9, 96)
    groups = values.reshape(33, 3, 32)
    scales = (np.abs(groups).max(-1) / np.float32(127)).astype(np.float16)
    quants = np.rint(groups / scales.astype(np.float32)[..., None]).clip(-127, 127).astype(np.int8)
    raw = np.concatenate([scales[..., None].view(np.uint8), quants.view(np.uint8)], axis=-1)
    matrix = StoredMatrix("Q8_0", raw.reshape(33, -1), 96)
    kept = _native.multiply(_native.Matrix(values), inputs, isa=isa, keep="int8", activations="int8")
    np.testing.assert_array_equal(kept, model_of_product(matrix, inputs))
    wide = [_native.multiply(_native.Matrix(values), inputs, isa=isa, activations=a) for a in Activations]
    np.testing.assert_array_equal(*wide)


def test_rows_of_another_length() -> None:
    matrix = random_matrix(np.random.default_rng(6), "Q8_0", 16, 64)
    packed = _native.Matrix.of_blocks("Q8_0", matrix.rows, 64)
    with pytest.raises(ValueError, match="rows of 32 inputs for a matrix of 64"):
        _native.multiply(packed, np.zeros((1, 32), np.uint16), activations="int8")


# --- whole models ---

Build = Callable[..., NativeRunner]
CONTEXT = 45


@pytest.fixture
def build() -> Iterator[Build]:
    """Build runners that multiply in integers; closed after the test."""
    built: list[NativeRunner] = []

    def make(
        weights: ModelWeights | StoredWeights,
        isa: str | None = None,
        *,
        threads: int = 1,
        keep: str = "int8",
        activations: Activations = Activations.INT8,
    ) -> NativeRunner:
        built.append(
            NativeRunner(weights, threads=threads, context=64, isa=isa, keep=keep, activations=activations)
        )
        return built[-1]

    yield make
    for runner in built:
        runner.close()


def logits_of(runner: NativeRunner, spec: ModelSpec, chunks: list[int], mates: int = 0) -> Float:
    """Logits of one conversation that arrives in ``chunks``, each beside first tokens of ``mates`` others."""
    layout = runner.layout
    width = layout.blocks_for(sum(chunks))
    memory = np.full((1 + mates) * width * layout.block_bytes, 0xFF, np.uint8)
    blocks = np.arange(memory.ctypes.data, memory.ctypes.data + memory.nbytes, layout.block_bytes)
    table = blocks.astype(np.uint64).reshape(1 + mates, width)
    tokens = np.random.default_rng(5).integers(0, spec.vocabulary, sum(chunks), np.int32)
    parts = []
    for begin, end in pairwise(np.cumsum([0, *chunks])):
        own = np.arange(begin, end, dtype=np.int32)
        others = np.zeros(mates, np.int32)
        starts = np.concatenate([np.arange(mates + 1), [mates + len(own)]]).astype(np.int32)
        # The conversation comes last, its mates are one-token prompts.
        batch = ForwardBatch(
            tokens=np.concatenate([others, tokens[begin:end]]),
            positions=np.concatenate([others, own]),
            starts=starts,
            blocks=np.concatenate([table[1:], table[:1]]),
            logit_rows=np.arange(mates, mates + len(own), dtype=np.int32),
        )
        parts.append(np.array(runner.forward(batch)))
    return np.concatenate(parts)


def mixed_weights() -> StoredWeights:
    """Formats that differ inside a layer, as files have them; o is float32 and so becomes bf16."""
    rng = np.random.default_rng(1)
    base = tiny_weights(1, hidden=256, feed_forward=256, vocabulary=301)
    kinds = {"q": "Q4_K", "k": "Q4_K", "v": "Q6_K", "gate": "Q4_1", "up": "Q4_1", "down": "Q6_K"}
    layers = [
        StoredLayer(
            attention_norm=layer.attention_norm,
            ffn_norm=layer.ffn_norm,
            o=layer.o,
            **{part: random_matrix(rng, kind, *getattr(layer, part).shape) for part, kind in kinds.items()},
        )
        for layer in base.layers
    ]
    embedding = random_matrix(rng, "Q8_0", *base.embedding.shape)
    return StoredWeights(base.spec, embedding, base.output_norm, None, layers)


def even_weights() -> ModelWeights:
    return tiny_weights(1, hidden=96, heads=6, kv_heads=2, head_dim=32, feed_forward=176, vocabulary=301)


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("weights", [even_weights(), mixed_weights()], ids=["even", "mixed"])
def test_rows_are_their_own(
    build: Build, weights: ModelWeights | StoredWeights, isa: str, threads: int
) -> None:
    """Chunks, batch mates and threads change no bit of a row."""
    expected = logits_of(build(weights, isa), weights.spec, [CONTEXT])
    assert np.isfinite(expected).all()
    assert np.std(expected) > 1e-3
    runner = build(weights, isa, threads=threads)
    for chunks in ([CONTEXT], [1, 2, 3, 4, 5, 6, 7, 17], [1] * CONTEXT):
        for mates in (0, 1, 20):
            np.testing.assert_array_equal(logits_of(runner, weights.spec, chunks, mates), expected)


def test_identity_of_kv(build: Build) -> None:
    """Integers make other KV; where every matrix is bf16 there are none, and KV is the same."""
    weights = tiny_weights(1)
    layouts = {
        (keep, activations): build(weights, keep=keep, activations=activations).layout.fingerprint
        for keep in ("int8", "stored")
        for activations in Activations
    }
    assert layouts["stored", Activations.INT8] == layouts["stored", Activations.BF16]
    assert len(set(layouts.values())) == 3


def test_close_to_bf16(build: Build) -> None:
    weights = tiny_weights(1)
    exact = logits_of(build(weights, activations=Activations.BF16), weights.spec, [CONTEXT])
    found = logits_of(build(weights), weights.spec, [CONTEXT])
    error = np.sqrt(np.mean((found - exact) ** 2)) / np.std(exact)
    assert 0 < error < 0.1
