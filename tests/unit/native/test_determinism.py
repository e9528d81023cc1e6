"""A row's bits depend on its own tokens only: not on chunks, batch mates, cached prefixes or threads."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memserve import _native

EVERY_ISA = [*_native.supported_isas(), *_native.emulated_isas()]
KV_DTYPES = ["bf16", "int8"]
SHAPE = {"heads": 6, "kv_heads": 2, "head_dim": 32, "hidden": 96, "feed_forward": 176, "vocabulary": 90}
SHAPE |= {"attention_bias": True, "qk_norm": True}
CONTEXT = 560  # three segments, and more rows than go through the layers together

Build = Callable[..., Any]


@pytest.fixture
def whole(build: Build, isa: str, kv_dtype: str) -> np.ndarray:
    """Logits of the whole conversation in one pass on one thread."""
    model = build(isa, context=CONTEXT, **SHAPE, kv_dtype=kv_dtype)
    (logits,) = model.forward([model.rows(0, 0, CONTEXT)])
    assert np.isfinite(logits).all()
    return logits


@pytest.fixture(params=EVERY_ISA)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=KV_DTYPES)
def kv_dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("chunk", [1, 3, 16, 31, 100, 512])
def test_chunks(build: Build, whole: np.ndarray, isa: str, kv_dtype: str, threads: int, chunk: int) -> None:
    model = build(isa, threads=threads, context=CONTEXT, **SHAPE, kv_dtype=kv_dtype)
    edges = [*range(0, CONTEXT, chunk), CONTEXT]
    chunks = [model.forward([model.rows(0, begin, end)])[0] for begin, end in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(chunks), whole)


@pytest.mark.parametrize("threads", [1, 2])
def test_batch_mates(build: Build, whole: np.ndarray, isa: str, kv_dtype: str, threads: int) -> None:
    """Decode rows at a segment's edge beside prefills of every size: rows land in every place of a tile."""
    model = build(isa, threads=threads, context=CONTEXT, sequences=4, **SHAPE, kv_dtype=kv_dtype)
    model.forward([model.rows(0, 0, 250), model.rows(1, 0, 33)])
    at = 250
    for mates in range(1, 20):
        parts = [model.rows(2, 0, mates), model.rows(0, at, at + 1), model.rows(3, 0, 2 * mates)]
        if mates % 3 == 0:
            parts.reverse()
        results = dict(zip(parts, model.forward(parts), strict=True))
        np.testing.assert_array_equal(results[model.rows(0, at, at + 1)][0], whole[at])
        at += 1


def test_many_decodes_at_once(build: Build, isa: str, kv_dtype: str) -> None:
    """The same conversation in 40 places of one batch gives the same row 40 times."""
    model = build(isa, threads=2, context=64, sequences=40, **SHAPE, kv_dtype=kv_dtype)
    model.tokens[:] = model.tokens[0]
    model.forward([model.rows(s, 0, 37) for s in range(40)])
    rows = model.forward([model.rows(s, 37, 38) for s in range(40)])
    for row in rows[1:]:
        np.testing.assert_array_equal(row, rows[0])


def test_recomputing_a_cached_token(build: Build, whole: np.ndarray, isa: str, kv_dtype: str) -> None:
    """Logits of a fully cached prompt: its last token runs again, into blocks that hold more already."""
    model = build(isa, context=CONTEXT, **SHAPE, kv_dtype=kv_dtype)
    model.forward([model.rows(0, 0, 320)])
    for last in (0, 1, 14, 15, 16, 254, 255, 256, 318):
        (again,) = model.forward([model.rows(0, last, last + 1)])
        np.testing.assert_array_equal(again[0], whole[last])
    (after,) = model.forward([model.rows(0, 320, 330)])
    np.testing.assert_array_equal(after, whole[320:330])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.integers(1, CONTEXT - 1), max_size=6, unique=True),
    threads=st.sampled_from([1, 2]),
    kv_dtype=st.sampled_from(KV_DTYPES),
)
def test_any_chunking_on_the_best_isa(build: Build, cuts: list[int], threads: int, kv_dtype: str) -> None:
    isa = _native.supported_isas()[0]
    model = build(isa, threads=threads, context=CONTEXT, **SHAPE, kv_dtype=kv_dtype)
    reference = build(isa, context=CONTEXT, **SHAPE, kv_dtype=kv_dtype)
    (expected,) = reference.forward([reference.rows(0, 0, CONTEXT)])
    edges = [0, *sorted(cuts), CONTEXT]
    chunks = [model.forward([model.rows(0, begin, end)])[0] for begin, end in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(chunks), expected)
