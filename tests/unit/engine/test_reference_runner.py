"""The oracle itself: against a dense forward pass written from the formulas, and against its own promises."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.engine.models.chat_template import ChatMessage
from memserve.engine.models.loader import open_model
from memserve.engine.models.spec import Float, ModelWeights
from memserve.engine.models.tiny import tiny_weights
from memserve.engine.runners.base import ForwardBatch, Runner
from memserve.engine.runners.reference import (
    ReferenceRunner,
    map_block,
    narrow_bf16,
    quantise_int8,
    round_bf16,
)
from memserve.mempool.layout import KVLayout

WEIGHTS = tiny_weights(3, layers=2, hidden=64, heads=4, kv_heads=2, vocabulary=97)
PROMPT = np.random.default_rng(0).integers(0, 97, 70).astype(np.int32)


class Arena:
    """Blocks in scattered order, full of NaN: what was never written must never be read.

    Keep it alive while its addresses are in use.
    """

    def __init__(self, layout: KVLayout, blocks: int) -> None:
        self._memory = np.full(blocks * layout.block_bytes, 0xFF, np.uint8)
        order = np.random.default_rng(1).permutation(blocks).astype(np.uint64)
        self.addresses = np.uint64(self._memory.ctypes.data) + order * np.uint64(layout.block_bytes)


def forward(runner: Runner, pieces: Sequence[tuple[np.ndarray, int, np.ndarray]]) -> Float:
    """Run ``pieces`` of (tokens, first position, block addresses); logits of every row."""
    counts = [len(tokens) for tokens, _, _ in pieces]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    positions = [np.arange(first, first + len(tokens)) for tokens, first, _ in pieces]
    blocks = np.zeros((len(pieces), max(len(addresses) for *_, addresses in pieces)), np.uint64)
    for row, (*_, addresses) in zip(blocks, pieces, strict=True):
        row[: len(addresses)] = addresses
    tokens = np.concatenate([tokens for tokens, _, _ in pieces]).astype(np.int32)
    rows = np.arange(len(tokens), dtype=np.int32)
    return runner.forward(
        ForwardBatch(tokens, np.concatenate(positions).astype(np.int32), starts, blocks, rows)
    )


def dense_logits(weights: ModelWeights, tokens: np.ndarray) -> np.ndarray:
    """The Llama formulas over the whole sequence in float64, with complex numbers for the rotations."""
    spec, count = weights.spec, len(tokens)
    hidden = weights.embedding[tokens].astype(np.float64)

    def norm(rows: np.ndarray, scale: Float) -> np.ndarray:
        return rows / np.sqrt((rows**2).mean(-1, keepdims=True) + spec.rms_epsilon) * scale

    def rotate(heads: np.ndarray) -> np.ndarray:
        half = spec.head_dim // 2
        turn = np.exp(1j * np.outer(np.arange(count), spec.rope_theta ** (-np.arange(half) / half)))
        turned = (heads[..., :half] + 1j * heads[..., half:]) * turn[:, None]
        return np.concatenate([turned.real, turned.imag], -1)

    mask = np.triu(np.full((count, count), -np.inf), 1)
    for layer in weights.layers:
        rows = norm(hidden, layer.attention_norm)
        q, k, v = ((rows @ part.T).reshape(count, -1, spec.head_dim) for part in (layer.q, layer.k, layer.v))
        k, v = (np.repeat(part, spec.heads // spec.kv_heads, 1) for part in (rotate(k), v))
        scores = np.einsum("qhd,khd->hqk", rotate(q), k) / np.sqrt(spec.head_dim) + mask
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", shares / shares.sum(-1, keepdims=True), v)
        hidden = hidden + mixed.reshape(count, -1) @ layer.o.T
        rows = norm(hidden, layer.ffn_norm)
        gate = rows @ layer.gate.T
        hidden = hidden + (gate / (1 + np.exp(-gate)) * (rows @ layer.up.T)) @ layer.down.T
    return norm(hidden, weights.output_norm) @ weights.head.T


def whole(runner: ReferenceRunner) -> Float:
    arena = Arena(runner.layout, 5)
    return forward(runner, [(PROMPT, 0, arena.addresses)])


@pytest.mark.parametrize(
    "weights",
    [
        WEIGHTS,
        tiny_weights(4, layers=1, hidden=48, heads=6, kv_heads=6, vocabulary=97, tied=False),
        tiny_weights(5, layers=3, hidden=32, heads=3, kv_heads=1, head_dim=8, vocabulary=97),
    ],
)
def test_equals_the_formulas(weights: ModelWeights) -> None:
    np.testing.assert_allclose(whole(ReferenceRunner(weights)), dense_logits(weights, PROMPT), atol=2e-5)


def test_tiny_models_tell_tokens_apart() -> None:
    logits = whole(ReferenceRunner(WEIGHTS))
    assert 0.5 < logits.std() < 2
    assert len(set(logits.argmax(-1).tolist())) > 20


CUTS = st.sets(st.integers(1, len(PROMPT) - 1), max_size=5).map(lambda cuts: [0, *sorted(cuts), len(PROMPT)])


@pytest.mark.parametrize(
    "options",
    [{}, {"layout_dtype": "bf16"}, {"layout_dtype": "int8"}, {"layout_dtype": "bf16", "bf16_math": True}],
)
@settings(max_examples=15, deadline=None)
@given(first=CUTS, second=CUTS)
def test_rows_do_not_depend_on_company_or_chunks(
    options: dict[str, object], first: list[int], second: list[int]
) -> None:
    """Two sequences in random chunks side by side: every row is bit for bit as in the whole prompt."""
    check_chunks(ReferenceRunner(WEIGHTS, **options), first, second)  # type: ignore[arg-type]


def test_nor_with_products_that_blas_spreads_over_threads() -> None:
    weights = tiny_weights(6, layers=1, hidden=576, heads=9, kv_heads=3, feed_forward=1536, vocabulary=97)
    check_chunks(ReferenceRunner(weights), [0, 13, 33, 34, 70], [0, 1, 70])


def check_chunks(runner: ReferenceRunner, first: list[int], second: list[int]) -> None:
    expected = whole(runner)
    arenas = Arena(runner.layout, 5), Arena(runner.layout, 5)
    steps = itertools.zip_longest(itertools.pairwise(first), itertools.pairwise(second))
    for chunks in steps:
        running = [(chunk, arena) for chunk, arena in zip(chunks, arenas, strict=True) if chunk]
        pieces = [
            (PROMPT[start:stop], start, arena.addresses[: runner.layout.blocks_for(stop)])
            for (start, stop), arena in running
        ]
        rows = np.concatenate([np.arange(*chunk) for chunk, _ in running])
        np.testing.assert_array_equal(forward(runner, pieces), expected[rows])


def test_a_prefix_can_move_between_arenas() -> None:
    """KV copied block by block to other addresses is as good as computed: what caching relies on."""
    runner = ReferenceRunner(WEIGHTS)
    source, target = Arena(runner.layout, 5), Arena(runner.layout, 5)
    expected = forward(runner, [(PROMPT, 0, source.addresses)])
    for old, new in zip(source.addresses[:3], target.addresses[::-1][:3], strict=True):
        map_block(int(new), runner.layout)[:] = map_block(int(old), runner.layout)
    found = forward(runner, [(PROMPT[48:], 48, target.addresses[::-1])])
    np.testing.assert_array_equal(found, expected[48:])


def test_only_wanted_rows_are_returned() -> None:
    runner = ReferenceRunner(WEIGHTS)
    arena = Arena(runner.layout, 5)
    starts, positions = np.array([0, 70], np.int32), np.arange(70, dtype=np.int32)
    wanted = np.array([3, 69], np.int32)
    found = runner.forward(ForwardBatch(PROMPT, positions, starts, arena.addresses[None], wanted))
    np.testing.assert_array_equal(found, whole(runner)[wanted])
    none = ForwardBatch(PROMPT, positions, starts, arena.addresses[None], wanted[:0])
    assert runner.forward(none).shape == (0, 97)


def test_bf16_stays_close() -> None:
    exact = whole(ReferenceRunner(WEIGHTS))
    rounded = whole(ReferenceRunner(WEIGHTS, layout_dtype="bf16", bf16_math=True))
    assert 1e-4 < np.abs(rounded - exact).max() < 0.15


def test_int8_stays_close() -> None:
    exact = whole(ReferenceRunner(WEIGHTS))
    rounded = whole(ReferenceRunner(WEIGHTS, layout_dtype="int8"))
    error = np.sqrt(((rounded - exact) ** 2).mean())
    assert 1e-3 < error < 0.06, "logits have a spread of 1"


def test_int8_steps_and_scales() -> None:
    rows = np.array([[127.0, -63.5, 0.5, 1.5], [0.0, 0.0, -0.0, 0.0], [1e-40, 0, 0, 0]], np.float32)
    scales, steps = quantise_int8(rows)
    assert scales.tolist() == [1.0, 0.0, 0.0]
    assert steps.tolist() == [[127, -64, 0, 2], [0, 0, 0, 0], [0, 0, 0, 0]]
    scales, steps = quantise_int8(np.array([[3e38, -1e38, 0, 1]], np.float32))
    assert steps.tolist() == [[127, -42, 0, 0]]
    np.testing.assert_allclose(scales * 127, 3e38, rtol=1e-6)
    scales, steps = quantise_int8(np.array([[1.0, np.nan], [np.inf, 1.0], [2.0, 1.0]], np.float32))
    assert np.isnan(scales).tolist() == [True, True, False]
    assert steps.tolist() == [[0, 0], [0, 0], [127, 64]]


def test_bf16_rounds_to_nearest_even() -> None:
    values = np.array([1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 1.0 + 2**-8 + 2**-20, -0.0, 3.4e38], np.float32)
    expected = np.array([1.0, 1.0, 1.0 + 2**-6, 1.0 + 2**-7, -0.0, np.inf], np.float32)
    np.testing.assert_array_equal(round_bf16(values), expected)
    assert narrow_bf16(np.array([1.0], np.float32)).tolist() == [0x3F80]


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])
def test_layout_names_model_and_order(dtype: str) -> None:
    layout = ReferenceRunner(WEIGHTS, layout_dtype=dtype).layout
    assert (layout.order, layout.dtype, layout.model) == ("plain", dtype, WEIGHTS.spec.identity)


@pytest.mark.model
def test_smollm2_knows_the_capital_of_france() -> None:
    source = open_model("smollm2-135m")
    tokenizer, template = source.tokenizer(), source.chat_template()
    assert template is not None
    question = [ChatMessage("user", "What is the capital of France?")]
    text = template.render(question, add_generation_prompt=True)
    tokens = tokenizer.encode(text, special=True)
    runner = ReferenceRunner(source.weights())
    arena = Arena(runner.layout, 4)
    answer: list[int] = []
    while len(answer) < 12 and not set(answer) & set(tokenizer.eos_tokens):
        at = len(tokens) + len(answer) - 1 if answer else 0
        fed = np.array(answer[-1:], np.int32) if answer else tokens
        count = np.array([0, len(fed)], np.int32)
        positions = np.arange(at, at + len(fed), dtype=np.int32)
        batch = ForwardBatch(fed, positions, count, arena.addresses[None], count[1:] - 1)
        answer.append(int(runner.forward(batch)[0].argmax()))
    assert tokenizer.decode(answer, skip_special=True) == "The capital of France is Paris."
