"""The native model against a float64 oracle that rounds to bf16 where the kernels do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memserve import _native
from memserve.engine.models.rope import YarnScaling
from memserve.engine.models.spec import ModelWeights

EVERY_ISA = [*_native.supported_isas(), *_native.emulated_isas()]
KV_DTYPES = ["bf16", "int8"]

SHAPES = [
    pytest.param({"heads": 4, "kv_heads": 4}, id="mha"),
    pytest.param({"heads": 4, "kv_heads": 2, "head_dim": 32, "tied": False}, id="gqa2-untied"),
    pytest.param(
        {"heads": 9, "kv_heads": 3, "hidden": 576, "layers": 1, "feed_forward": 1536}, id="smollm2-layer"
    ),
    pytest.param({"heads": 4, "kv_heads": 1, "head_dim": 128}, id="gqa4-wide"),
    pytest.param({"heads": 8, "kv_heads": 1, "head_dim": 64, "vocabulary": 301}, id="gqa8-odd-vocabulary"),
    pytest.param({"heads": 6, "kv_heads": 2, "head_dim": 48, "hidden": 80}, id="gqa3-dims-of-16"),
    pytest.param(
        {"heads": 2, "kv_heads": 1, "head_dim": 16, "hidden": 36, "feed_forward": 48}, id="tiny-dims"
    ),
    pytest.param({"heads": 2, "kv_heads": 1, "head_dim": 256, "layers": 1}, id="widest-head"),
    pytest.param({"heads": 6, "kv_heads": 2, "head_dim": 48, "attention_bias": True}, id="biases"),
    pytest.param({"heads": 4, "kv_heads": 2, "head_dim": 112, "qk_norm": True}, id="norms-of-heads"),
    pytest.param(
        {"heads": 7, "kv_heads": 1, "head_dim": 16, "attention_bias": True, "qk_norm": True}, id="both"
    ),
    pytest.param({"rope_scaling": YarnScaling(4.0, 16), "head_dim": 64}, id="yarn"),
]


def assert_close(logits: np.ndarray, expected: np.ndarray, kv_dtype: str) -> None:
    """Logits have a spread of about 1. The kernels sum in float32 (errors of 1e-6), which now and then tips
    an input to the neighbouring bf16 (2^-9 of its size), or KV to the next int8 (1/127 of the largest);
    a wrong position, head or mask costs 0.1 or more."""
    assert np.isfinite(logits).all()
    error = logits - expected
    margin = 1.5 if kv_dtype == "int8" else 1.0
    assert np.sqrt((error**2).mean()) < 8e-3 * margin
    assert np.sqrt((error**2).mean(-1)).max() < 5e-2 * margin


def sharpen(weights: ModelWeights) -> None:
    for layer in weights.layers:
        layer.q *= np.float32(30)


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
def test_prompt_of_any_length(
    build: Callable[..., Any],
    oracle: Callable[..., Any],
    isa: str,
    shape: dict[str, Any],
    kv_dtype: str,
    rows: int,
) -> None:
    model = build(isa, kv_dtype=kv_dtype, **shape)
    (logits,) = model.forward([model.rows(0, 0, rows)])
    assert_close(logits, oracle(model.weights, model.tokens[0, :rows], kv_dtype), kv_dtype)


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_context_of_several_segments_and_row_tiles(
    build: Callable[..., Any], oracle: Callable[..., Any], isa: str, kv_dtype: str, threads: int
) -> None:
    rows = 600
    model = build(isa, threads=threads, context=rows, kv_dtype=kv_dtype, heads=6, kv_heads=2, head_dim=32)
    (logits,) = model.forward([model.rows(0, 0, rows)])
    assert_close(logits, oracle(model.weights, model.tokens[0, :rows], kv_dtype), kv_dtype)


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_mixed_prefill_and_decode(
    build: Callable[..., Any], oracle: Callable[..., Any], isa: str, kv_dtype: str
) -> None:
    model = build(isa, threads=2, context=300, sequences=4, kv_dtype=kv_dtype)
    model.forward([model.rows(0, 0, 290), model.rows(1, 0, 15), model.rows(2, 0, 16)])
    parts = [model.rows(0, 290, 291), model.rows(3, 0, 40), model.rows(1, 15, 16), model.rows(2, 16, 19)]
    for part, logits in zip(parts, model.forward(parts), strict=True):
        expected = oracle(model.weights, model.tokens[part.sequence, : part.end], kv_dtype)
        assert_close(logits, expected[part.begin :], kv_dtype)


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_large_scores_neither_overflow_nor_vanish(
    build: Callable[..., Any], oracle: Callable[..., Any], isa: str, kv_dtype: str
) -> None:
    model = build(isa, context=300, kv_dtype=kv_dtype, change=sharpen)
    (logits,) = model.forward([model.rows(0, 0, 300)])
    assert np.isfinite(logits).all()
    # Scores in the thousands turn attention into a choice of one token: most rows still agree.
    error = np.abs(logits - oracle(model.weights, model.tokens[0, :300], kv_dtype)).max(-1)
    assert np.median(error) < 2e-2


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_on_the_best_isa(
    build: Callable[..., Any], oracle: Callable[..., Any], data: st.DataObject
) -> None:
    kv_heads, group = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    shape = {
        "heads": kv_heads * group,
        "kv_heads": kv_heads,
        "head_dim": 16 * data.draw(st.integers(2, 16)),
        "hidden": data.draw(st.integers(8, 160)),
        "feed_forward": 16 * data.draw(st.integers(1, 12)),
        "vocabulary": data.draw(st.integers(2, 200)),
        "layers": 1,
        "tied": data.draw(st.booleans()),
        "attention_bias": data.draw(st.booleans()),
        "qk_norm": data.draw(st.booleans()),
    }
    rows, kv_dtype = data.draw(st.integers(1, 40)), data.draw(st.sampled_from(KV_DTYPES))
    model = build(_native.supported_isas()[0], kv_dtype=kv_dtype, **shape)
    (logits,) = model.forward([model.rows(0, 0, rows)])
    assert_close(logits, oracle(model.weights, model.tokens[0, :rows], kv_dtype), kv_dtype)
    model.close()
